"""What a family will cost, from its plan alone."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from rich.table import Table

from cascade.architecture import Architecture
from cascade.distillation.settings import rows_of
from cascade.distillation.signals.codecs import BfloatStates, Codec, codec_of
from cascade.family.cost import body_flops, importance_flops, student_flops, teacher_flops, writing_flops
from cascade.family.graph import ExtendedNodes, Graph, Kind, Lesson, Node, StageNodes
from cascade.models.positions import RopeType
from cascade.planning.cost import cost_of_cuts
from cascade.pruning.repair import Repair, can_fit
from cascade.recipe import Stage
from cascade.roles import Control, Correction, Student

# Share of the matmul rate that a whole training step reaches: SmolLM2-135M trains at about 0.6 of the
# rate of a large float32 product on 2 cores. Doubtful elsewhere: a forecast, not a promise.
STEP_EFFICIENCY = 0.6
CONTEXT_OF_CACHE = 4096


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
    flops += (1 + len(stage.trained)) * evaluation_cost(child, graph)
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


def extended_cost(branch: ExtendedNodes, graph: Graph, made: set[str]) -> Cost:
    """Training on long rows, and three evaluations on them; the stored checkpoint. made: as above."""
    child, teaching = branch.child.architecture, branch.teaching
    whole = not graph.recipe.teacher.signals.keeps_entries
    teachers = sum(teacher_flops(model, branch.length, teaching.stored, whole) for model in teaching.teachers)
    lessons = [lesson for lesson in teaching.lessons if lesson.node.key not in made]
    costs = [lesson_cost(lesson, branch.length) for lesson in lessons]
    trained = branch.extended.section["distill"]["tokens"]
    flops = trained * (student_flops(child, branch.length) + teachers)
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


def plan_table(graph: Graph, rate: float) -> Table:
    """One row a model: shape, counts, memory, and what making it costs at `rate` FLOP/s."""
    signals = all_signals(graph)
    table = Table(
        title=f"plan of family {graph.recipe.family}",
        title_justify="left",
        caption="\n".join(map(str, signals)) or NO_SIGNALS,
        caption_justify="left",
    )
    for column in ("model", "dial", *SHAPE_COLUMNS, "TFLOPs", "storage", "about"):
        table.add_column(column, justify="left" if column in ("model", "dial") else "right")
    rows: list[tuple[str, str, Architecture, Cost]] = [("parent", "", graph.original, parent_cost(graph))]
    seed, before, made = graph.original, graph.original, {node.key for node in graph.trunk}
    for stage in (*graph.stages, *graph.controls):
        start = control_seed(stage, graph.original, before) if stage.control else seed
        cost = stage_cost(stage, start, graph, made)
        rows.append((stage.stage.name, dial(stage.stage), stage.architecture, cost))
        if not stage.control:
            seed, before = stage.architecture, seed
    for branch in graph.extended:
        shape, cost = branch.child.architecture, extended_cost(branch, graph, made)
        rows.append((branch.name, rope_text(branch), shape, cost))
    for name, setting, shape, cost in rows:
        table.add_row(name, setting, *shape_cells(shape), *cost_cells(cost, rate))
    costs = [row[3] for row in rows]
    total = Cost(sum(cost.flops for cost in costs), sum(cost.stored_bytes for cost in costs))
    table.add_section()
    table.add_row("family", "", *[""] * len(SHAPE_COLUMNS), *cost_cells(total, rate))
    return table


def control_seed(stage: StageNodes, original: Architecture, before: Architecture) -> Architecture:
    """What a control is cut from: the parent, or what the last child is cut from."""
    return original if stage.control is Control.ONE_SHOT else before


def ranking_table(graph: Graph) -> Table:
    """For every stage the best shapes within its budget; those that race are marked, then come the next.

    expected rise: of the cross-entropy in nats right after the cut, see `cascade.planning.cost`.
    """
    table = Table(title="shapes within each budget, cheapest cuts first", title_justify="left")
    for column in ("stage", "", *SHAPE_COLUMNS, "expected rise"):
        table.add_column(column, justify="left" if column in ("stage", "") else "right")
    for stage in graph.stages:
        candidates = [candidate.architecture for candidate in stage.candidates]
        role = "races" if len(candidates) > 1 else "chosen"
        fitted = stage.stage.prune.resolved.repair is Repair.LEAST_SQUARES
        for shape in (*candidates, *stage.runners_up):
            cut = stage.stage.student is Student.PRUNED
            rise = f"{cost_of_cuts(graph.original, shape, fitted=fitted):.2f}" if cut else ""
            cells = shape_cells(shape)
            table.add_row(stage.stage.name, role if shape in candidates else "", *cells, rise)
        table.add_section()
    return table


def dial(stage: Stage) -> str:
    """The dial, or the checkpoint, as the user set it, for tables."""
    if stage.checkpoint:
        return stage.checkpoint
    prune = stage.prune
    if prune.shape.sizes():
        return ", ".join(f"{axis} {size}" for axis, size in prune.shape.sizes().items())
    texts = {
        "parameters": f"{prune.parameters or 0:,} parameters",
        "ratio": f"ratio {prune.ratio}",
        "memory": f"{(prune.memory or 0) / 1e6:,.0f} MB",
        "latency": f"{prune.latency} ms",
    }
    return next(text for name, text in texts.items() if getattr(prune, name) is not None)


def rope_text(branch: ExtendedNodes) -> str:
    """What a child is extended to and by which settings, for tables: `to 256, yarn 4`."""
    rope = branch.child.stage.extend.rope
    scaling = f"{rope.type.value} {rope.factor or ''}".strip() if rope.type is not RopeType.NONE else ""
    theta = f"theta {rope.theta:,.0f}" if rope.theta is not None else ""
    return ", ".join(text for text in (f"to {branch.length:,}", scaling, theta) if text)


SHAPE_COLUMNS = (
    "layers",
    "hidden",
    "FFN",
    "heads/KV",
    "parameters",
    "non-embedding",
    "weights",
    "KV cache 4k",
)


def shape_cells(shape: Architecture) -> list[str]:
    """The architecture and its memory in float32."""
    return [
        str(shape.layers),
        str(shape.hidden),
        f"{shape.experts} x {shape.ffn}" if shape.experts else str(shape.ffn),
        f"{shape.heads}/{shape.kv_groups}",
        f"{shape.parameters:,}",
        f"{shape.non_embedding_parameters:,}",
        megabytes(shape.weight_bytes()),
        megabytes(shape.kv_cache_bytes(CONTEXT_OF_CACHE)),
    ]


def cost_cells(cost: Cost, rate: float) -> list[str]:
    """FLOPs, bytes and the time that follows from the machine's rate."""
    seconds = cost.flops / (rate * STEP_EFFICIENCY)
    return [f"{cost.flops / 1e12:,.1f}", megabytes(cost.stored_bytes), duration(seconds)]


def megabytes(count: int) -> str:
    """Decimal megabytes."""
    return f"{count / 1e6:,.0f} MB"


def duration(seconds: float) -> str:
    """`42 s`, `3.5 min`, `2.1 h` or `5.0 d`."""
    for limit, unit, size in ((90, "s", 1), (5400, "min", 60), (172_800, "h", 3600)):
        if seconds < limit:
            return f"{seconds / size:.0f} {unit}" if unit == "s" else f"{seconds / size:.1f} {unit}"
    return f"{seconds / 86_400:.1f} d"
