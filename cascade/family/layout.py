"""The layout of a family's graph: every node with its section, its inputs, and so its key."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType

from cascade.architecture import Architecture
from cascade.data import PACKING
from cascade.distillation.settings import DistillSettings
from cascade.errors import InputError
from cascade.family.controls import control_stage
from cascade.family.extension import lengths, longer, rope_sections, teacher_section
from cascade.family.graph import (
    Candidate,
    ExtendedNodes,
    Graph,
    Kind,
    Lesson,
    Node,
    Nodes,
    Section,
    StageNodes,
    StagePlan,
    Teaching,
)
from cascade.family.teachers import Faculty, Parent, given_node, signals_section
from cascade.importance.method import Method
from cascade.pruning.repair import Repair, can_fit
from cascade.recipe import Recipe, Signals, Stage
from cascade.roles import Control, Student

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
) -> Graph:
    """Lay out the nodes of a recipe.

    fingerprints: the content identity of each corpus source. winners: of races that are over. given: models
    that the recipe names beside the parent, by reference.
    """
    decided = dict(winners or {})
    nodes = Nodes(recipe.family)
    corpus = _corpus_node(recipe, parent, fingerprints)
    root = nodes.node(Kind.PARENT, "parent", {"fingerprint": parent.fingerprint}, hints=parent.hints)
    faculty = Faculty(recipe, nodes, (root, parent.architecture), corpus, given)
    signals = faculty.parent_signals()
    measured = {"parent": root, "corpus": corpus, **({"signals": signals} if signals else {})}
    evaluated = nodes.node(Kind.EVALUATED, "parent", held_out_section(recipe), measured)
    layout = Layout(recipe, nodes, faculty, measured)
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
        rows = _corpus_node(long_rows, parent, fingerprints, "extend")
        rows = replace(rows, stage=long_rows.stages[0].name)
        extended += layout.extended(long_rows, rows, stages)
    controls = tuple(
        layout.control(control, stages[-1], starts[0], starts[-2]) for control in recipe.controls
    )

    def decide(stage: str, winner: int) -> Graph:
        return build_graph(recipe, parent, planner, fingerprints, {**decided, stage: winner}, given)

    return Graph(
        recipe,
        parent.architecture,
        corpus,
        root,
        signals,
        evaluated,
        tuple(stages),
        tuple(extended),
        controls,
        decide,
    )


def _corpus_node(
    recipe: Recipe, parent: Parent, fingerprints: tuple[str, ...], part: str = "distill"
) -> Node:
    """It comes first and needs only the parent's tokenizer: too little text is found before any write.

    part: of a stage, that says how many tokens it needs.
    """
    corpus = recipe.corpus
    section = {
        "sources": [
            {
                "field": source.field,
                "split": source.split,
                "config": source.config,
                "fingerprint": fingerprint,
            }
            for source, fingerprint in zip(corpus.sources, fingerprints, strict=True)
        ],
        "tokenizer": parent.fingerprint,
        "sequence_length": corpus.sequence_length,
        "held_out": corpus.held_out,
        "seed": recipe.seed,
        "packing": PACKING,
    }
    if corpus.separate_documents:
        section["separate_documents"] = True
    hints = {
        "parent": parent.reference,
        "sources": [source.model_dump(mode="json") for source in corpus.sources],
        "needs": [
            {"stage": stage.name, "part": what, "tokens": tokens, "epochs": stage.distill.epochs}
            for stage in recipe.stages
            for what, tokens in ((part, stage.distill.tokens), ("on_policy", stage.on_policy.tokens))
            if tokens
        ]
        + correction_needs(recipe),
    }
    return Node(Kind.CORPUS, "parent", recipe.family, section, hints=hints)


def correction_needs(recipe: Recipe) -> list[Section]:
    """Tokens of the teacher's correction, in as many epochs as the stage that asks for most."""
    epochs = max(stage.distill.epochs for stage in recipe.stages)
    tokens = recipe.teacher.correction_tokens
    return [{"stage": "teacher", "tokens": tokens, "epochs": epochs}] if tokens else []


def held_out_section(recipe: Recipe) -> Section:
    """How much is held out to measure on."""
    return {"held_out_tokens": recipe.corpus.held_out_tokens}


@dataclass(frozen=True)
class Start:
    """Where a stage starts: the model that is cut, its shape, and the one whose class it has."""

    seed: Node
    shape: Architecture
    base: Node


@dataclass(frozen=True)
class Layout:
    """Lays out stages. measured: what every child is measured against."""

    recipe: Recipe
    nodes: Nodes
    faculty: Faculty
    measured: dict[str, Node]

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
        inputs = self.taught(chosen.pruned, chosen.legs, teaching)
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
                "distill": training_section(recipe, stage, child.architecture),
                "seed": recipe.seed,
                **ropes,
            }
            sources = {"corpus": corpus, **inputs}
            student = {"student": child.checkpoint, **sources}
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
            inputs = self.taught(student, legs, teaching)
            legs += (self.nodes.node(Kind.RACED, stage.name, section, inputs),)
        return legs

    def on_policy(
        self, stage: Stage, shape: Architecture, distilled: Node, teaching: Teaching
    ) -> Node | None:
        """The child's training on what it writes; none if its stage asks for none."""
        if not stage.on_policy.tokens:
            return None
        section = {
            "distill": on_policy_section(self.recipe, stage, shape),
            "writing": writing_section(self.recipe, stage),
            **self.common(teaching),
        }
        inputs = self.taught(distilled, (), teaching.online)
        return self.nodes.node(Kind.ON_POLICY, stage.name, section, inputs)

    def training(self, stage: Stage, shape: Architecture, teaching: Teaching) -> Section:
        """The section of a training node."""
        return {"distill": training_section(self.recipe, stage, shape), **self.common(teaching)}

    def common(self, teaching: Teaching) -> Section:
        """What every training's section has."""
        weights: Section = {"weights": list(teaching.weights)} if teaching.weights else {}
        return {"seed": self.recipe.seed, **weights}

    def taught(self, student: Node, legs: tuple[Node, ...], teaching: Teaching) -> dict[str, Node]:
        """The inputs of a training node."""
        start = {"raced": legs[-1]} if legs else {}
        return {"student": student, **start, "corpus": self.measured["corpus"], **teaching.inputs}


# The last leg of a race ends here: Minitron saw rankings settle within 200 of its 400 steps (2407.14679,
# figure 9), and eight candidates then cost 7/4 of one whole training, or 22 % of training all eight.
RACE_PART = 1 / 4
# A race is judged on so many tokens at most: all candidates on the same ones, so most of their noise cancels.
JUDGED_TOKENS = 16_384


def legs_of(candidates: int, steps: int, where: str = "") -> list[float]:
    """Successive halving (Jamieson and Talwalkar, 1502.07943): the share of the training after each leg.

    After every leg the better half goes on to twice the tokens; the winner's training is the one it would
    have had alone, so a race wastes only what the losers trained. Raises InputError for a training of too few
    steps to tell its legs apart.
    """
    rounds = math.ceil(math.log2(candidates))
    parts = [RACE_PART / 2 ** (rounds - 1 - leg) for leg in range(rounds)]
    if parts and steps * parts[0] < 1:
        raise InputError(
            f"a race of {candidates} candidates needs a training of {round(1 / parts[0])} steps or more",
            value=f"{steps} steps",
            where=f"{where}, prune.candidates",
            remedy="distill on more tokens, set smaller `batch_tokens`, or let fewer shapes race",
        )
    return parts


def steps_of(recipe: Recipe, stage: Stage, child: Architecture) -> int:
    """Steps of the whole training of a child."""
    settings = DistillSettings(**training_section(recipe, stage, child))
    return settings.resolved(child.hidden, recipe.corpus.sequence_length).steps


def importance_section(
    recipe: Recipe, stage: Stage, before: Architecture, shapes: tuple[Architecture, ...]
) -> Section:
    """How units are scored: one pass for all candidates; the seed only where it matters."""
    dials = stage.prune.resolved
    section: Section = {"method": dials.importance.value, "calibration_tokens": dials.calibration_tokens}
    if dials.importance is Method.RANDOM:
        section["seed"] = recipe.seed
    if dials.importance is Method.ACTIVATION:
        dropped = {before.layers - shape.layers for shape in shapes}
        drops = {length for count in dropped for length in stage.prune.scoring.drops(count)}
        section |= {"drops": sorted(drops)} if drops else {}
    return section


def pruning_section(stage: Stage, before: Architecture, shape: Architecture) -> Section:
    """What the cut depends on; calibration tokens only where it looks at the corpus itself."""
    dials = stage.prune.resolved
    section: Section = {
        "architecture": shape.record(),
        "scoring": asdict(stage.prune.scoring),
        "repair": dials.repair.value,
    }
    rotates = dials.rotate and shape.hidden < before.hidden
    section["rotate"] = rotates
    fitted = dials.repair is Repair.LEAST_SQUARES and can_fit(before, shape)
    if rotates or fitted:
        section["calibration_tokens"] = dials.calibration_tokens
    return section


def training_section(recipe: Recipe, stage: Stage, child: Architecture) -> Section:
    """Every number of the training, derived ones included: a better derivation makes a new artifact.

    `epochs` is left out: it is a permission and does not change what is trained.
    """
    dials, length = stage.distill, recipe.corpus.sequence_length
    settings = DistillSettings(
        tokens=dials.tokens,
        batch_rows=max(1, dials.batch_tokens // length) if dials.batch_tokens else None,
        learning_rate=dials.learning_rate,
        cross_entropy_weight=dials.cross_entropy_weight,
        objective=dials.objective,
        objective_weight=dials.objective_weight,
        temperature=dials.temperature,
        seed=recipe.seed,
        schedule=dials.schedule,
        cross_entropy_schedule=dials.cross_entropy_schedule,
    )
    return settings.resolved(child.hidden, length).settings.record()


def on_policy_section(recipe: Recipe, stage: Stage, child: Architecture) -> Section:
    """Every number of the training on what the child writes."""
    dials, length = stage.on_policy, recipe.corpus.sequence_length
    settings = DistillSettings(
        tokens=dials.tokens,
        batch_rows=max(1, dials.batch_tokens // length) if dials.batch_tokens else None,
        learning_rate=dials.learning_rate,
        objective=dials.objective,
        objective_weight=dials.objective_weight,
        temperature=dials.temperature,
        seed=recipe.seed,
    )
    return settings.resolved(child.hidden, length).settings.record()


def writing_section(recipe: Recipe, stage: Stage) -> Section:
    """How the child writes: the fields of `cascade.distillation.on_policy.Writing`."""
    dials = stage.on_policy
    return {
        "mixture": dials.mixture,
        "prompt_tokens": dials.prompt_of(recipe.corpus.sequence_length),
        "temperature": dials.sampling_temperature,
        "seed": recipe.seed,
    }
