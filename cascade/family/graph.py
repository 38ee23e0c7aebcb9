"""The graph of a family: every node with its key and its place in the store, before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Any

from cascade.architecture import Architecture
from cascade.recipe import Recipe, Stage
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
    RACED = "raced"
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
class StagePlan:
    """Shapes of a stage, cheapest cuts first: the one to build or those that race, and the next in rank."""

    candidates: tuple[Architecture, ...]
    runners_up: tuple[Architecture, ...]


@dataclass(frozen=True)
class Candidate:
    """One shape of a stage: its cut, and in a race the legs of its training, each going on from the last."""

    architecture: Architecture
    pruned: Node
    legs: tuple[Node, ...] = ()


@dataclass(frozen=True)
class StageNodes:
    """The nodes of one child. candidates: one, or those that race; winner: the index of the one that goes on,
    the first as long as the race is `open`."""

    stage: Stage
    candidates: tuple[Candidate, ...]
    runners_up: tuple[Architecture, ...]
    winner: int
    open: bool
    importance: Node
    distilled: Node
    evaluated: Node

    @property
    def architecture(self) -> Architecture:
        """The child's."""
        return self.candidates[self.winner].architecture

    @property
    def pruned(self) -> Node:
        """The child right after its cut."""
        return self.candidates[self.winner].pruned

    def __iter__(self) -> Iterator[Node]:
        """Every node after its inputs; of a race all legs, though losers run only some."""
        yield self.importance
        for candidate in self.candidates:
            yield candidate.pruned
            yield from candidate.legs
        yield self.distilled
        yield self.evaluated


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
    decide: Callable[[str, int], Graph] = field(compare=False)
    """The graph once the race of a stage is won: what follows is planned anew for the winner."""

    @property
    def trunk(self) -> list[Node]:
        """What comes before the first stage."""
        return [self.corpus, self.parent, *([self.signals] if self.signals else []), self.evaluated]

    def __iter__(self) -> Iterator[Node]:
        """The order on one machine.

        Each stage is evaluated before the next is cut: it takes seconds, and a bad child should be
        seen before the next stage spends hours on it.
        """
        yield from self.trunk
        for stage in self.stages:
            yield from stage
