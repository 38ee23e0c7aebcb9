"""What a family will cost, from its plan alone."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from cascade.architecture import Architecture
from cascade.distillation.settings import DistillSettings, rows_of
from cascade.distillation.signals.codecs import BfloatStates, Codec, codec_of
from cascade.family.cost import (
    body_flops,
    importance_flops,
    inner_flops,
    student_flops,
    teacher_flops,
    writing_flops,
)
from cascade.family.graph import ExtendedNodes, Graph, Lesson, Node, StageNodes
from cascade.kinds import Kind
from cascade.pruning.repair import Repair, can_fit
from cascade.roles import Correction


@dataclass(frozen=True)
class Cost:
    """FLOPs and stored bytes of one row of the plan."""

    flops: int
    stored_bytes: int


def parent_cost(graph: Graph) -> Cost:
    """The parent's copy, its evaluation, and its one forward pass over what the hungriest stage needs."""
    parent, length = graph.original, graph.recipe.corpus.sequence_length
    signals = signals_of(graph.signals, parent).cost(length) if graph.signals else Cost(0, 0)
    flops = signals.flops + evaluation_cost(parent, graph)
    return Cost(flops, parent.weight_bytes() + signals.stored_bytes)


@dataclass(frozen=True)
class SignalsCost:
    """What the teacher's signals take. token_bytes: of a training token; expected where entries are drawn.
    rows_of: tokens of a row."""

    codec: Codec
    tokens: int
    held_out_tokens: int
    teacher: Architecture
    rows_of: int

    @property
    def stored_bytes(self) -> int:
        """Of all rows; held-out rows are stored as states in bfloat16 whatever the codec."""
        exact = BfloatStates(self.teacher.hidden).token_bytes()
        return round(self.tokens * self.codec.token_bytes() + self.held_out_tokens * exact)

    def cost(self, length: int) -> Cost:
        """One forward pass, and what it leaves."""
        tokens = self.tokens + self.held_out_tokens
        return Cost(tokens * self.teacher.forward_flops(length), self.stored_bytes)

    def __str__(self) -> str:
        about = "about " if self.codec.flat else ""
        return (
            f"teacher signals: {self.codec.name}, {about}{self.codec.token_bytes():,.0f} bytes a token, "
            f"{self.tokens:,} training and {self.held_out_tokens:,} held-out tokens in "
            f"rows of {self.rows_of:,}: "
            f"{self.stored_bytes / 1e6:,.1f} MB"
        )


def signals_of(signals: Node, teacher: Architecture) -> SignalsCost:
    """What will be stored of a teacher."""
    section = signals.section
    codec = codec_of(section, teacher.hidden, teacher.vocabulary)
    rows_of = signals.inputs["corpus"].section["sequence_length"]
    return SignalsCost(codec, section["tokens"], section["held_out_tokens"], teacher, rows_of)


NO_SIGNALS = "teacher signals: none are stored, the teacher runs beside every student"


def all_signals(graph: Graph) -> list[SignalsCost]:
    """What will be stored of every teacher, each once."""
    taught: list[StageNodes | ExtendedNodes] = [*graph.stages, *graph.extended, *graph.controls]
    lessons = [lesson for one in taught for lesson in one.teaching.lessons]
    found = {lesson.node.key: lesson for lesson in lessons if lesson.node.kind is Kind.SIGNALS}
    return [signals_of(lesson.node, lesson.model) for lesson in found.values()]


def evaluation_cost(model: Architecture, graph: Graph, branch: ExtendedNodes | None = None) -> int:
    """FLOPs of measuring one model against the parent; branch: on its long rows."""
    length = branch.length if branch else graph.recipe.corpus.sequence_length
    stored = branch.teaching.stored if branch else graph.signals is not None
    parent = teacher_flops(graph.original, length, stored)
    return graph.recipe.corpus.held_out_tokens * (model.forward_flops(length) + parent)


def lesson_cost(lesson: Lesson, length: int) -> Cost:
    """What makes a teacher other than the parent as it is: its copy, its correction, its signals."""
    section, model = lesson.node.section, lesson.model
    if lesson.node.kind is Kind.SIGNALS:
        return signals_of(lesson.node, model).cost(length)
    if lesson.node.kind is Kind.CORRECTED:
        frozen = section["correction"] == Correction.LORA
        flops = section["distill"]["tokens"] * student_flops(model, length, frozen)
        return Cost(flops, model.weight_bytes())
    return Cost(0, model.weight_bytes())


def stage_cost(stage: StageNodes, seed: Architecture, graph: Graph, made: set[str]) -> Cost:
    """Calibration of the seed, repairs, trainings, evaluations of the child after each; its checkpoints.

    made: keys of nodes that the rows before have counted; this row's are added.
    """
    recipe, child = graph.recipe, stage.architecture
    length, trained = recipe.corpus.sequence_length, stage.stage.distill.tokens
    stored, whole = stage.teaching.stored, not recipe.teacher.signals.keeps_entries
    teachers = sum(teacher_flops(model, length, stored, whole) for model in stage.teaching.teachers)
    costs = [lesson_cost(lesson, length) for lesson in stage.teaching.lessons if lesson.node.key not in made]
    flops = trained * (student_flops(child, length) + teachers) + on_policy_flops(stage, length)
    for model in stage.teaching.teachers:
        flops += trained * inner_flops(child, model, length, stage.distilled.section["distill"])
    flops += (1 + len(stage.trained)) * evaluation_cost(child, graph)
    flops += sum(watch_flops(node, child, length) for node in stage.trained)
    if stage.importance and stage.importance.key not in made:
        flops += cutting_cost(stage, seed, length)
    lost, states = 0.0, 0
    for leg, standing in race_legs(stage):
        # The winner's legs are part of its own training.
        shapes = [candidate.architecture for candidate in stage.candidates[1:standing]]
        lost += leg * trained * sum(student_flops(shape, length) + teachers for shape in shapes)
        # Weights and two moments of AdamW.
        states += 3 * standing * child.weight_bytes()
    starts = [candidate for candidate in stage.candidates if candidate.pruned.key not in made]
    pruned = sum(candidate.architecture.weight_bytes() for candidate in starts)
    made |= {node.key for node in stage}
    children = len(stage.trained) * child.weight_bytes()
    return Cost(
        flops + round(lost) + sum(cost.flops for cost in costs),
        children + pruned + states + sum(cost.stored_bytes for cost in costs),
    )


def on_policy_flops(stage: StageNodes, length: int) -> int:
    """Of a child's training on what it writes, which its teachers read beside it."""
    if not stage.on_policy:
        return 0
    child, section = stage.architecture, stage.on_policy.section
    rows = rows_of(section["distill"]["tokens"], length)
    teachers = sum(teacher_flops(model, length, stored=False) for model in stage.teaching.teachers)
    written = math.floor(rows * section["writing"]["mixture"])
    return rows * length * (student_flops(child, length) + teachers) + writing_flops(child, length, written)


def watch_flops(trained: Node, child: Architecture, length: int) -> int:
    """Of all measurements of the watched corpus, if the training is watched and runs to its end."""
    watch = trained.section.get("watch")
    if not watch:
        return 0
    steps = DistillSettings(**trained.section["distill"]).resolved(child.hidden, length).steps
    tokens = rows_of(watch["tokens"], length) * length
    return math.ceil(steps / watch["every"]) * tokens * child.forward_flops(length)


def extended_cost(branch: ExtendedNodes, graph: Graph, made: set[str]) -> Cost:
    """Training on long rows, and three evaluations on them; the stored checkpoint. made: as above."""
    child, teaching = branch.child.architecture, branch.teaching
    whole = not graph.recipe.teacher.signals.keeps_entries
    teachers = sum(teacher_flops(model, branch.length, teaching.stored, whole) for model in teaching.teachers)
    lessons = [lesson for lesson in teaching.lessons if lesson.node.key not in made]
    costs = [lesson_cost(lesson, branch.length) for lesson in lessons]
    trained = branch.extended.section["distill"]["tokens"]
    flops = trained * (student_flops(child, branch.length) + teachers)
    flops += sum(
        trained * inner_flops(child, model, branch.length, branch.extended.section["distill"])
        for model in teaching.teachers
    )
    flops += sum(evaluation_cost(model, graph, branch) for model in (child, child, graph.original))
    made |= {node.key for node in branch}
    return Cost(
        flops + sum(cost.flops for cost in costs),
        child.weight_bytes() + sum(cost.stored_bytes for cost in costs),
    )


def cutting_cost(stage: StageNodes, seed: Architecture, length: int) -> int:
    """FLOPs of one calibration pass for all candidates, and of what rotations and repairs look at."""
    prune = stage.stage.prune.resolved
    drops = stage.importance.section.get("drops", ()) if stage.importance else ()
    flops = importance_flops(seed, prune.importance, length, drops)
    for candidate in stage.candidates:
        if "calibration_tokens" in candidate.pruned.section:
            rotated = prune.rotate and candidate.architecture.hidden < seed.hidden
            fitted = prune.repair is Repair.LEAST_SQUARES and can_fit(seed, candidate.architecture)
            # Least squares takes more passes where its sums do not fit into memory at once.
            flops += (rotated + fitted) * body_flops(seed, length)
    return prune.calibration_tokens * flops


def race_legs(stage: StageNodes) -> list[tuple[float, int]]:
    """Of each leg of a race the share of a whole training that it adds, and how many run it."""
    legs, before, standing = [], 0.0, len(stage.candidates)
    for node in stage.candidates[0].legs:
        legs.append((node.section["part"] - before, standing))
        before, standing = node.section["part"], -(-standing // 2)
    return legs


def machine_rate() -> float:
    """Matmul FLOP/s of this machine in the training precision, best of several short runs."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size, dtype = (8192, torch.bfloat16) if device == "cuda" else (1024, torch.float32)
    matrix = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        (matrix @ matrix)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
