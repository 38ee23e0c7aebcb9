"""The layout of a family's graph: every node with its section, its inputs, and so its key."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

from cascade.architecture import Architecture
from cascade.data import PACKING
from cascade.distillation.settings import DistillSettings, stated
from cascade.errors import InputError
from cascade.family.graph import Candidate, Graph, Kind, Node, Section, StageNodes, StagePlan
from cascade.importance.method import Method
from cascade.pruning.repair import Repair, can_fit
from cascade.recipe import Recipe, Signals, Stage


@dataclass(frozen=True)
class Parent:
    """What the graph has to know about the parent; `fingerprint` identifies its content."""

    reference: str
    fingerprint: str
    architecture: Architecture


Planner = Callable[[dict[str, int]], tuple[StagePlan, ...]]
"""From the races won so far, the winner's index by stage, to a plan for every stage."""


def build_graph(
    recipe: Recipe,
    parent: Parent,
    planner: Planner,
    fingerprints: tuple[str, ...],
    winners: Mapping[str, int] | None = None,
) -> Graph:
    """Lay out the nodes of a recipe.

    fingerprints: the content identity of each corpus source. winners: of races that are over.
    """
    decided = dict(winners or {})
    corpus = _corpus_node(recipe, parent, fingerprints)
    identity = {"fingerprint": parent.fingerprint}
    root = Node(Kind.PARENT, "parent", recipe.family, identity, hints={"parent": parent.reference})
    measured = {"parent": root, "corpus": corpus}
    signals = None
    if recipe.teacher.signals is Signals.HIDDEN:
        section = {
            "codec": "hidden_bf16",
            "tokens": max(stage.distill.tokens for stage in recipe.stages),
            "held_out_tokens": recipe.corpus.held_out_tokens,
        }
        signals = Node(Kind.SIGNALS, "parent", recipe.family, section, dict(measured))
        measured["signals"] = signals
    evaluated = _evaluated_node(recipe, "parent", measured)
    stages: list[StageNodes] = []
    seed, shape = root, parent.architecture
    for stage, plan in zip(recipe.stages, planner(decided), strict=True):
        stages.append(_stage_nodes(recipe, stage, plan, (seed, shape), measured, decided.get(stage.name)))
        seed, shape = stages[-1].distilled, stages[-1].architecture

    def decide(stage: str, winner: int) -> Graph:
        return build_graph(recipe, parent, planner, fingerprints, {**decided, stage: winner})

    return Graph(recipe, parent.architecture, corpus, root, signals, evaluated, tuple(stages), decide)


def _corpus_node(recipe: Recipe, parent: Parent, fingerprints: tuple[str, ...]) -> Node:
    """It comes first and needs only the parent's tokenizer: too little text is found before any write."""
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
            {"stage": stage.name, "tokens": stage.distill.tokens, "epochs": stage.distill.epochs}
            for stage in recipe.stages
        ],
    }
    return Node(Kind.CORPUS, "parent", recipe.family, section, hints=hints)


def _evaluated_node(recipe: Recipe, stage: str, inputs: dict[str, Node]) -> Node:
    return Node(Kind.EVALUATED, stage, recipe.family, held_out_section(recipe), inputs)


def held_out_section(recipe: Recipe) -> Section:
    """How much is held out to measure on."""
    return {"held_out_tokens": recipe.corpus.held_out_tokens}


def _stage_nodes(
    recipe: Recipe,
    stage: Stage,
    plan: StagePlan,
    seed: tuple[Node, Architecture],
    measured: dict[str, Node],
    winner: int | None,
) -> StageNodes:
    """A stage is cut from the distilled child before it and taught by the original parent."""
    (parent, before), shapes = seed, plan.candidates

    def node(kind: Kind, section: Section, inputs: dict[str, Node]) -> Node:
        return Node(kind, stage.name, recipe.family, section, inputs)

    corpus = {"corpus": measured["corpus"]}
    scored = importance_section(recipe, stage, before, shapes)
    importance = node(Kind.IMPORTANCE, scored, {"checkpoint": parent, **corpus})
    candidates = []
    for shape in shapes:
        inputs = {"checkpoint": parent, "importance": importance}
        section = pruning_section(stage, before, shape)
        pruned = node(Kind.PRUNED, section, inputs | (corpus if "calibration_tokens" in section else {}))
        legs: list[Node] = []
        training = training_section(recipe, stage, shape)
        for part in legs_of(len(shapes), steps_of(recipe, stage, shape), f"stage {stage.name}"):
            start = {"raced": legs[-1]} if legs else {}
            leg = {"distill": training, "seed": recipe.seed, "part": part} | held_out_section(recipe)
            legs.append(node(Kind.RACED, leg, {"student": pruned, **start, **measured}))
        candidates.append(Candidate(shape, pruned, tuple(legs)))
    chosen = candidates[winner or 0]
    section = {"distill": training_section(recipe, stage, chosen.architecture), "seed": recipe.seed}
    start = {"raced": chosen.legs[-1]} if chosen.legs else {}
    distilled = node(Kind.DISTILLED, section, {"student": chosen.pruned, **start, **measured})
    inputs = {"pruned": chosen.pruned, "distilled": distilled, **measured}
    evaluated = _evaluated_node(recipe, stage.name, inputs)
    racing = len(shapes) > 1 and winner is None
    return StageNodes(
        stage,
        tuple(candidates),
        plan.runners_up,
        winner or 0,
        racing,
        importance,
        distilled,
        evaluated,
    )


# The last leg of a race ends here: Minitron saw rankings settle within 200 of its 400 steps (2407.14679,
# figure 9), and eight candidates then cost 7/4 of one whole training, or 22 % of training all eight.
RACE_PART = 1 / 4


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
        temperature=dials.temperature,
        seed=recipe.seed,
        schedule=dials.schedule,
        cross_entropy_schedule=dials.cross_entropy_schedule,
    )
    return stated(settings.resolved(child.hidden, length).settings)
