"""The graph of a family: every node with its key and its place in the store, before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from cascade.architecture import Architecture
from cascade.kinds import SHARED, SHARED_FOLDER, Kind
from cascade.recipe import Recipe, Stage
from cascade.roles import Control
from cascade.storage.locations import Location
from cascade.storage.manifest import artifact_key

Section = dict[str, Any]


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
        return owner_folder(store, self.kind, self.family, self.stage) / self.kind / self.key[:12]


def owner_folder(store: Location, kind: str, family: str, stage: str) -> Location:
    """Where a node of this kind is browsed: in its stage's folder, or in the one that families share."""
    return store / SHARED_FOLDER if kind in SHARED else store / family / stage


@dataclass(frozen=True)
class Nodes:
    """Makes the nodes of one family: what was laid out before, for whatever stage, is taken again."""

    family: str
    known: dict[str, Node] = field(default_factory=dict)

    def node(
        self,
        kind: Kind,
        stage: str,
        section: Section,
        inputs: dict[str, Node] | None = None,
        hints: Section | None = None,
    ) -> Node:
        """The node with this kind, section and inputs."""
        node = Node(kind, stage, self.family, section, inputs or {}, hints or {})
        return self.known.setdefault(node.key, node)


@dataclass(frozen=True)
class StagePlan:
    """Shapes of a stage, cheapest cuts first: the one to build or those that race, and the next in rank."""

    candidates: tuple[Architecture, ...]
    runners_up: tuple[Architecture, ...]


@dataclass(frozen=True)
class Lesson:
    """A node that has to be there before a stage can be taught, and the model it holds or describes."""

    node: Node
    model: Architecture


@dataclass(frozen=True)
class Teaching:
    """Who teaches a stage.

    inputs: of every training node, by role. teachers: those that answer, with the weights of a mixture.
    stored: they answer from stored signals. lessons: what has to be made first, each after its inputs.
    """

    inputs: dict[str, Node] = field(default_factory=dict)
    teachers: tuple[Architecture, ...] = ()
    weights: tuple[float, ...] = ()
    stored: bool = False
    lessons: tuple[Lesson, ...] = ()

    @property
    def online(self) -> Teaching:
        """The same teachers, running beside the student: what it will write was never stored."""
        models = {role: node for role, node in self.inputs.items() if node.kind is not Kind.SIGNALS}
        return replace(self, inputs=models, stored=False)


@dataclass(frozen=True)
class Candidate:
    """One shape of a stage: what its student starts as, `pruned` even where it is no cut, and in a race the
    legs of its training, each going on from the last."""

    architecture: Architecture
    pruned: Node
    legs: tuple[Node, ...] = ()


@dataclass(frozen=True)
class StageNodes:
    """The nodes of one child. candidates: one, or those that race; winner: the index of the one that goes on,
    the first as long as the race is `open`. importance: of what is cut. on_policy: the distilled child after
    it was taught by what it writes. control: what it is compared as."""

    stage: Stage
    candidates: tuple[Candidate, ...]
    runners_up: tuple[Architecture, ...]
    winner: int
    open: bool
    importance: Node | None
    teaching: Teaching
    distilled: Node
    on_policy: Node | None
    evaluated: Node
    control: Control | None = None

    @property
    def architecture(self) -> Architecture:
        """The child's."""
        return self.candidates[self.winner].architecture

    @property
    def pruned(self) -> Node:
        """The child before it is taught: right after its cut, where it is one."""
        return self.candidates[self.winner].pruned

    @property
    def trained(self) -> list[Node]:
        """Its trainings, one going on from the other."""
        return [self.distilled, *([self.on_policy] if self.on_policy else [])]

    @property
    def checkpoint(self) -> Node:
        """The finished child: what is evaluated, and what the next one is cut from."""
        return self.trained[-1]

    @property
    def before(self) -> list[Node]:
        """What the cut and the training need first."""
        lessons = [lesson.node for lesson in self.teaching.lessons]
        return [*lessons, *([self.importance] if self.importance else [])]

    def __iter__(self) -> Iterator[Node]:
        """Every node after its inputs; of a race all legs, though losers run only some."""
        yield from self.before
        for candidate in self.candidates:
            yield candidate.pruned
            yield from candidate.legs
        yield from self.trained
        yield self.evaluated


@dataclass(frozen=True)
class ExtendedNodes:
    """The long-context branch of a child, beside the trunk: nothing is cut from it. corpus: of long rows."""

    child: StageNodes
    corpus: Node
    teaching: Teaching
    extended: Node
    evaluated: Node

    @property
    def name(self) -> str:
        """What its row in tables is called."""
        return f"{self.child.stage.name} extended"

    @property
    def length(self) -> int:
        """Tokens of a long row."""
        return int(self.corpus.section["sequence_length"])

    def __iter__(self) -> Iterator[Node]:
        """Every node after its inputs; the corpus comes before all stages."""
        yield from (lesson.node for lesson in self.teaching.lessons)
        yield self.extended
        yield self.evaluated


@dataclass(frozen=True)
class Graph:
    """A planned family. Iterating yields every node after its inputs.

    signals: of the parent, where it teaches from them; what else teaches belongs to the stages. extended: the
    long-context branches. controls: of the last stage. watched: the second corpus, if there is one.
    """

    recipe: Recipe
    original: Architecture
    corpus: Node
    watched: Node | None
    parent: Node
    signals: Node | None
    evaluated: Node
    stages: tuple[StageNodes, ...]
    extended: tuple[ExtendedNodes, ...]
    controls: tuple[StageNodes, ...]
    decide: Callable[[str, int], Graph] = field(compare=False)
    """The graph once the race of a stage is won: what follows is planned anew for the winner."""

    @property
    def corpora(self) -> list[Node]:
        """All rows, short and long: too little text for a branch is found before the trunk is built."""
        found = [self.corpus, *(branch.corpus for branch in self.extended)]
        return list({node.key: node for node in found}.values())

    @property
    def trunk(self) -> list[Node]:
        """What comes before the first stage."""
        packed = [*self.corpora, *([self.watched] if self.watched else [])]
        return [*packed, self.parent, *([self.signals] if self.signals else []), self.evaluated]

    def __iter__(self) -> Iterator[Node]:
        """The order on one machine; a node that several stages need comes once.

        Each stage is evaluated before the next is cut: it takes seconds, and a bad child should be
        seen before the next stage spends hours on it. Branches wait until the trunk is done.
        """
        groups: list[Iterable[Node]] = [self.trunk, *self.stages, *self.extended, *self.controls]
        yield from {node.key: node for group in groups for node in group}.values()
