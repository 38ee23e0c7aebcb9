"""The layout of a family's graph: every node with its section, its inputs, and so its key."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from cascade.architecture import Architecture
from cascade.distillation.settings import DistillSettings
from cascade.distillation.watch import derived_every
from cascade.family.controls import control_stage
from cascade.family.corpora import corpus_node, watched_node
from cascade.family.extension import lengths, longer, rope_sections, teacher_section
from cascade.family.graph import (
    Candidate,
    ExtendedNodes,
    Graph,
    Lesson,
    Node,
    Nodes,
    Section,
    StageNodes,
    StagePlan,
    Teaching,
)
from cascade.family.origins import cut_inputs
from cascade.family.race import JUDGED_TOKENS, legs_of
from cascade.family.sections import (
    held_out_section,
    importance_section,
    on_policy_section,
    pruning_section,
    steps_of,
    training_section,
    writing_section,
)
from cascade.family.teachers import Faculty, Parent, given_node, signals_section
from cascade.kinds import PARENT_STAGE, Kind
from cascade.recipe import Recipe, Stage
from cascade.roles import Control, Student
from cascade.teacher import Signals

NOTHING: Mapping[str, Parent] = MappingProxyType({})

Planner = Callable[[dict[str, int]], tuple[StagePlan, ...]]
"""From the races won so far, the winner's index by stage, to a plan for every stage."""


def build_graph(
    recipe: Recipe,
    parent: Parent,
    planner: Planner,
    fingerprints: tuple[str, ...],
    winners: Mapping[str, int] | None = None,
    given: Mapping[str, Parent] = NOTHING,
    watched: tuple[str, ...] = (),
) -> Graph:
    """Lay out the nodes of a recipe.

    fingerprints: the content identity of each corpus source. winners: of races that are over. given: models
    that the recipe names beside the parent, by reference. watched: the content identity of each source that
    is watched.
    """
    decided = dict(winners or {})
    nodes = Nodes(recipe.family)
    corpus = corpus_node(recipe, parent, fingerprints)
    root = nodes.node(Kind.PARENT, PARENT_STAGE, {"fingerprint": parent.fingerprint}, hints=parent.hints)
    faculty = Faculty(recipe, nodes, (root, parent.architecture), corpus, given)
    signals = faculty.parent_signals()
    measured = {"parent": root, "corpus": corpus, **({"signals": signals} if signals else {})}
    evaluated = nodes.node(Kind.EVALUATED, PARENT_STAGE, held_out_section(recipe), measured)
    watch = watched_node(recipe, parent, watched) if watched else None
    layout = Layout(recipe, nodes, faculty, measured, watch)
    stages: list[StageNodes] = []
    starts = [Start(root, parent.architecture, root)]
    for index, (stage, plan) in enumerate(zip(recipe.stages, planner(decided), strict=True)):
        teaching = faculty.of(index, (starts[-1].seed, starts[-1].shape))
        stages.append(layout.stage(stage, plan, starts[-1], teaching, decided.get(stage.name)))
        base = stages[-1].pruned if stage.student is Student.GIVEN else starts[-1].base
        starts.append(Start(stages[-1].checkpoint, stages[-1].architecture, base))
    extended = []
    for length in lengths(recipe):
        long_rows = longer(recipe, length)
        rows = corpus_node(long_rows, parent, fingerprints, "extend")
        rows = replace(rows, stage=long_rows.stages[0].name)
        extended += layout.extended(long_rows, rows, stages)
    controls = tuple(
        layout.control(control, stages[-1], starts[0], starts[-2]) for control in recipe.controls
    )

    def decide(stage: str, winner: int) -> Graph:
        return build_graph(recipe, parent, planner, fingerprints, {**decided, stage: winner}, given, watched)

    return Graph(
        recipe,
        parent.architecture,
        corpus,
        watch,
        root,
        signals,
        evaluated,
        tuple(stages),
        tuple(extended),
        controls,
        decide,
    )


@dataclass(frozen=True)
class Start:
    """Where a stage starts: the model that is cut, its shape, and the one whose class it has."""

    seed: Node
    shape: Architecture
    base: Node


@dataclass(frozen=True)
class Layout:
    """Lays out stages. measured: what every child is measured against. watched: while it is trained."""

    recipe: Recipe
    nodes: Nodes
    faculty: Faculty
    measured: dict[str, Node]
    watched: Node | None = None

    def stage(
        self,
        stage: Stage,
        plan: StagePlan,
        start: Start,
        teaching: Teaching,
        winner: int | None = None,
        pruned: Node | None = None,
    ) -> StageNodes:
        """The nodes of one child; pruned: what its student starts as, if that is there already."""
        importance = None
        if stage.student is Student.PRUNED and not pruned:
            importance = self.importance(stage, plan, start)
        candidates = []
        for shape in plan.candidates:
            student = pruned or self.student(stage, shape, start, importance)
            legs = self.legs(stage, shape, student, teaching, len(plan.candidates))
            candidates.append(Candidate(shape, student, legs))
        chosen = candidates[winner or 0]
        section = self.training(stage, chosen.architecture, teaching)
        section |= self.watch_section(section["distill"], chosen.architecture)
        inputs = self.taught(chosen.pruned, chosen.legs, teaching) | self.watching
        inputs |= cut_inputs(section["distill"], chosen.pruned, teaching)
        distilled = self.nodes.node(Kind.DISTILLED, stage.name, section, inputs)
        on_policy = self.on_policy(stage, chosen.architecture, distilled, teaching)
        trained = {"distilled": distilled, **({"on_policy": on_policy} if on_policy else {})}
        inputs = {"pruned": chosen.pruned, **trained, **self.measured}
        return StageNodes(
            stage,
            tuple(candidates),
            plan.runners_up,
            winner or 0,
            len(candidates) > 1 and winner is None,
            importance,
            teaching,
            distilled,
            on_policy,
            self.nodes.node(Kind.EVALUATED, stage.name, held_out_section(self.recipe), inputs),
        )

    def control(self, control: Control, child: StageNodes, first: Start, before: Start) -> StageNodes:
        """A control of the last child; first: where the family starts; before: where that child does."""
        stage = control_stage(self.recipe, control)
        start = before if control in (Control.CE_ONLY, Control.RANDOM_PRUNE) else first
        teaching, pruned = Teaching(), None
        if control is Control.CE_ONLY:
            pruned = child.pruned
        else:
            previous = (before.seed, before.shape)
            teaching = self.faculty.of(len(self.recipe.stages) - 1, previous, stage.distill.tokens)
        plan = StagePlan((child.architecture,), ())
        return replace(self.stage(stage, plan, start, teaching, pruned=pruned), control=control)

    def extended(self, recipe: Recipe, corpus: Node, children: list[StageNodes]) -> list[ExtendedNodes]:
        """The long-context branches of all children that are extended to rows of this length.

        recipe: the family on long rows. corpus: those rows. The parent teaches, from signals of its own for
        long rows where signals are stored.
        """
        (root, architecture), length = self.faculty.root, recipe.corpus.sequence_length
        inputs, lessons = {"parent": root}, list[Lesson]()
        if stored := recipe.teacher.signals is not Signals.ONLINE:
            needed = max(stage.distill.tokens for stage in recipe.stages)
            section = signals_section(recipe, needed) | teacher_section(recipe, length)
            taught = {"parent": root, "corpus": corpus}
            inputs["signals"] = self.nodes.node(Kind.SIGNALS, corpus.stage, section, taught)
            lessons.append(Lesson(inputs["signals"], architecture))
        teaching = Teaching(inputs, (architecture,), (), stored, tuple(lessons))
        by_name = {child.stage.name: child for child in children}
        branches = []
        for stage in recipe.stages:
            child, ropes = by_name[stage.name], rope_sections(recipe, stage, length)
            section = {
                "distill": training_section(recipe, stage, child.architecture, teaching),
                "seed": recipe.seed,
                **ropes,
            }
            sources = {"corpus": corpus, **inputs}
            student = {"student": child.checkpoint, **sources}
            student |= cut_inputs(section["distill"], child.checkpoint, teaching)
            extended = self.nodes.node(Kind.EXTENDED, stage.name, section, student)
            measured = {"distilled": child.checkpoint, "extended": extended, **sources}
            section = held_out_section(recipe) | ropes
            evaluated = self.nodes.node(Kind.EVALUATED_LONG, stage.name, section, measured)
            branches.append(ExtendedNodes(child, corpus, teaching, extended, evaluated))
        return branches

    def importance(self, stage: Stage, plan: StagePlan, start: Start) -> Node:
        """One calibration for all candidates."""
        section = importance_section(self.recipe, stage, start.shape, plan.candidates)
        inputs = {"checkpoint": start.seed, "corpus": self.measured["corpus"]}
        return self.nodes.node(Kind.IMPORTANCE, stage.name, section, inputs)

    def student(self, stage: Stage, shape: Architecture, start: Start, importance: Node | None) -> Node:
        """What the student starts as: a cut, a given checkpoint, or random weights."""
        if stage.checkpoint:
            return given_node(self.nodes, stage.name, self.faculty.given[stage.checkpoint])
        if importance is None:
            section = {"architecture": shape.record(), "seed": self.recipe.seed}
            return self.nodes.node(Kind.INITIALISED, stage.name, section, {"checkpoint": start.base})
        section = pruning_section(stage, start.shape, shape)
        inputs = {"checkpoint": start.seed, "importance": importance}
        if "calibration_tokens" in section:
            inputs["corpus"] = self.measured["corpus"]
        return self.nodes.node(Kind.PRUNED, stage.name, section, inputs)

    def legs(
        self, stage: Stage, shape: Architecture, student: Node, teaching: Teaching, racing: int
    ) -> tuple[Node, ...]:
        """The legs of a candidate's training, each going on from the last; none without a race."""
        legs: tuple[Node, ...] = ()
        for part in legs_of(racing, steps_of(self.recipe, stage, shape), f"stage {stage.name}"):
            leg = {"part": part, "judged_tokens": JUDGED_TOKENS} | held_out_section(self.recipe)
            section = self.training(stage, shape, teaching) | leg
            inputs = self.taught(student, legs, teaching) | cut_inputs(section["distill"], student, teaching)
            legs += (self.nodes.node(Kind.RACED, stage.name, section, inputs),)
        return legs

    def on_policy(
        self, stage: Stage, shape: Architecture, distilled: Node, teaching: Teaching
    ) -> Node | None:
        """The child's training on what it writes; none if its stage asks for none."""
        if not stage.on_policy.tokens:
            return None
        settings = on_policy_section(self.recipe, stage, shape)
        section = {
            "distill": settings,
            "writing": writing_section(self.recipe, stage),
            **self.common(teaching),
            **self.watch_section(settings, shape),
        }
        inputs = self.taught(distilled, (), teaching.online) | self.watching
        return self.nodes.node(Kind.ON_POLICY, stage.name, section, inputs)

    @property
    def watching(self) -> dict[str, Node]:
        """The input of a training that is watched."""
        return {"watched": self.watched} if self.watched else {}

    def watch_section(self, settings: Section, shape: Architecture) -> Section:
        """How a training with these settings is watched, every number of it; empty if it is not."""
        if not self.watched:
            return {}
        dials, length = self.recipe.watch, self.recipe.corpus.sequence_length
        steps = DistillSettings(**settings).resolved(shape.hidden, length).steps
        every = dials.every or derived_every(steps)
        return {"watch": {"tokens": dials.tokens, "every": every, "patience": dials.patience}}

    def training(self, stage: Stage, shape: Architecture, teaching: Teaching) -> Section:
        """The section of a training node."""
        return {"distill": training_section(self.recipe, stage, shape, teaching), **self.common(teaching)}

    def common(self, teaching: Teaching) -> Section:
        """What every training's section has."""
        weights: Section = {"weights": list(teaching.weights)} if teaching.weights else {}
        return {"seed": self.recipe.seed, **weights}

    def taught(self, student: Node, legs: tuple[Node, ...], teaching: Teaching) -> dict[str, Node]:
        """The inputs of a training node."""
        start = {"raced": legs[-1]} if legs else {}
        return {"student": student, **start, "corpus": self.measured["corpus"], **teaching.inputs}
