"""The graph of a family: every node with its key and its place in the store, before anything runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Any

from cascade.architecture import Architecture
from cascade.data import PACKING
from cascade.distillation.settings import DistillSettings
from cascade.importance.method import Method
from cascade.recipe import Prune, Recipe, Signals, Stage
from cascade.storage.locations import Location
from cascade.storage.manifest import artifact_key

Section = dict[str, Any]


class Kind(StrEnum):
    """What a node makes; also the name of its folder in the store."""

    CORPUS = "corpus"
    PARENT = "parent"
    SIGNALS = "signals"
    IMPORTANCE = "importance"
    PRUNED = "pruned"
    DISTILLED = "distilled"
    EVALUATED = "evaluated"


# Shared by every family with the same teacher, corpus and packing.
SHARED = (Kind.CORPUS, Kind.SIGNALS)


@dataclass(frozen=True)
class Node:
    """A pure function `(kind, section, inputs) -> artifact`; the stage says where it is browsed.

    `section` and the inputs' keys make the key. `hints` tell the process how to get there (a path, a
    check to make first) and are left out of the key, because they do not change the result.
    """

    kind: Kind
    stage: str
    family: str
    section: Section
    inputs: dict[str, Node] = field(default_factory=dict)
    hints: Section = field(default_factory=dict)

    @cached_property
    def key(self) -> str:
        """64 hexadecimal digits; known before the node or its inputs have run."""
        return artifact_key(self.kind, self.section, {name: node.key for name, node in self.inputs.items()})

    @property
    def name(self) -> str:
        """What people call the node: stage and kind."""
        return f"{self.stage}/{self.kind}"

    def location(self, store: Location) -> Location:
        """`<root>/<family>/<stage>/<kind>/<key12>`, or `<root>/shared/<kind>/<key12>`."""
        folder = store / "shared" if self.kind in SHARED else store / self.family / self.stage
        return folder / self.kind / self.key[:12]


@dataclass(frozen=True)
class StageNodes:
    """The nodes of one child."""

    stage: Stage
    architecture: Architecture
    importance: Node
    pruned: Node
    distilled: Node
    evaluated: Node


@dataclass(frozen=True)
class Graph:
    """A planned family. Iterating yields every node after its inputs."""

    recipe: Recipe
    original: Architecture
    corpus: Node
    parent: Node
    signals: Node | None
    evaluated: Node
    stages: tuple[StageNodes, ...]

    def __iter__(self) -> Iterator[Node]:
        """The order on one machine.

        Each stage is evaluated before the next is cut: it takes seconds, and a bad child should be
        seen before the next stage spends hours on it.
        """
        yield self.corpus
        yield self.parent
        if self.signals:
            yield self.signals
        yield self.evaluated
        for stage in self.stages:
            yield from (stage.importance, stage.pruned, stage.distilled, stage.evaluated)


@dataclass(frozen=True)
class Parent:
    """What the graph has to know about the parent; `fingerprint` identifies its content."""

    reference: str
    fingerprint: str
    architecture: Architecture


def build_graph(
    recipe: Recipe, parent: Parent, plans: tuple[Architecture, ...], fingerprints: tuple[str, ...]
) -> Graph:
    """Lay out the nodes of a recipe.

    plans: one architecture a stage. fingerprints: the content identity of each corpus source.
    """
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
    stages = _stage_nodes(recipe, plans, root, measured)
    return Graph(recipe, parent.architecture, corpus, root, signals, evaluated, stages)


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
    section = {"held_out_tokens": recipe.corpus.held_out_tokens}
    return Node(Kind.EVALUATED, stage, recipe.family, section, inputs)


def _stage_nodes(
    recipe: Recipe, plans: tuple[Architecture, ...], parent: Node, measured: dict[str, Node]
) -> tuple[StageNodes, ...]:
    """Each stage is cut from the distilled child before it and taught by the original parent."""
    seed, stages = parent, []
    for stage, architecture in zip(recipe.stages, plans, strict=True):
        importance = Node(
            Kind.IMPORTANCE,
            stage.name,
            recipe.family,
            importance_section(recipe, stage),
            {"checkpoint": seed, "corpus": measured["corpus"]},
        )
        pruned = Node(
            Kind.PRUNED,
            stage.name,
            recipe.family,
            {"architecture": architecture.record()},
            {"checkpoint": seed, "importance": importance},
        )
        distilled = Node(
            Kind.DISTILLED,
            stage.name,
            recipe.family,
            {"distill": training_section(recipe, stage, architecture), "seed": recipe.seed},
            {"student": pruned, **measured},
        )
        evaluated = _evaluated_node(
            recipe, stage.name, {"pruned": pruned, "distilled": distilled, **measured}
        )
        stages.append(StageNodes(stage, architecture, importance, pruned, distilled, evaluated))
        seed = distilled
    return tuple(stages)


def importance_section(recipe: Recipe, stage: Stage) -> Section:
    """How units are scored; the seed only where it matters."""
    dials = stage.prune
    section = {"method": dials.importance.value, "calibration_tokens": dials.calibration_tokens}
    return section | ({"seed": recipe.seed} if dials.importance is Method.RANDOM else {})


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
    )
    return asdict(settings.resolved(child.hidden, length).settings)


def dial(prune: Prune) -> str:
    """The dial as the user set it, for tables."""
    return f"{prune.parameters:,} parameters" if prune.parameters else f"ratio {prune.ratio}"
