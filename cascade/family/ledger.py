"""What a family cost, node by node, against what it could not have cost less than, and against doing without.

FLOPs are analytic (`cascade.family.cost`), of what was really run; seconds and bytes are measured. All are
from the manifests, whichever run made the artifacts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from cascade.architecture import Architecture
from cascade.family.cost import student_flops
from cascade.family.graph import Graph, Node, Teaching
from cascade.family.runner import Outcome
from cascade.kinds import SHARED_FOLDER
from cascade.storage.manifest import Manifest

Json = dict[str, Any]
Done = dict[str, Outcome]
# Manifests before this schema version do not tell whose FLOPs they count.
TELLS_TEACHER = 2


def ledger(graph: Graph, done: Done) -> Json:
    """Plain JSON: `entries` (what all stages share, then child by child with its nodes), `family` and
    `controls` (their sums), `floor_flops` and `separate_flops`, and the ratios of the two to the family's.

    floor: every teacher's one forward pass over what it is needed for, and the students' training. separate:
    every child trained by itself on as many tokens, with its teachers running beside it.
    """
    seen: set[str] = set()
    shared = [entry(SHARED_FOLDER, graph.trunk, done, seen)]
    stages = [entry(stage.stage.name, stage, done, seen) for stage in graph.stages]
    extended = [entry(branch.name, branch, done, seen) for branch in graph.extended]
    controls = [entry(control.stage.name, control, done, seen) for control in graph.controls]
    family = total("family", [*shared, *stages, *extended])
    trained = trainings(graph, done)
    floor, separate = floor_flops(trained), separate_flops(trained)
    return {
        "entries": [*shared, *stages, *extended, *controls],
        "family": family,
        "controls": total("controls", controls),
        "floor_flops": floor,
        "separate_flops": separate,
        "over_floor": family["flops"] / floor if floor else None,
        "separate_over_family": separate / family["flops"] if family["flops"] else None,
    }


def entry(name: str, nodes: Iterable[Node], done: Done, seen: set[str]) -> Json:
    """The nodes of one child that no entry before it has, and their sum."""
    lines = []
    for node in nodes:
        if node.key in done and node.key not in seen:
            seen.add(node.key)
            lines.append(line(node.name, done[node.key].manifest))
    return {**total(name, lines), "nodes": lines}


def line(name: str, manifest: Manifest) -> Json:
    """One node. teacher_flops: of its FLOPs; None where its manifest does not tell."""
    tells = manifest.schema_version >= TELLS_TEACHER or not manifest.flops
    return {
        "name": name,
        "tokens": manifest.tokens,
        "flops": manifest.flops,
        "teacher_flops": manifest.teacher_flops if tells else None,
        "seconds": manifest.seconds,
        "bytes": manifest.bytes,
    }


def total(name: str, lines: list[Json]) -> Json:
    """The sum of lines or entries; None of a figure that one of them lacks."""
    names = ("tokens", "flops", "teacher_flops", "seconds", "bytes")
    columns = {figure: [one[figure] for one in lines] for figure in names}
    sums = {figure: None if None in column else sum(column) for figure, column in columns.items()}
    return {"name": name, **sums}


@dataclass(frozen=True)
class Training:
    """A child's training that is done. teachers: what was asked (a key) and its shape. tokens: trained.
    most: tokens of the corpus, whose rows have `length`. on_policy: FLOPs of all its training on what it
    writes, its teachers' included: what is new to every child cannot be shared."""

    child: Architecture
    teachers: list[tuple[str, Architecture]]
    tokens: int
    most: int
    length: int
    on_policy: int = 0

    @property
    def own(self) -> int:
        """FLOPs of the child's forward and backward passes, the winner's legs of a race included."""
        return self.tokens * student_flops(self.child, self.length) + self.on_policy


def trainings(graph: Graph, done: Done) -> list[Training]:
    """Every child's, on short rows and on long ones."""
    found = []
    for stage in graph.stages:
        if stage.checkpoint.key in done:
            written = on_policy_flops(stage.on_policy, stage.architecture, done) if stage.on_policy else 0
            found.append(training(stage.architecture, stage.distilled, stage.teaching, done, written))
    for branch in graph.extended:
        if branch.extended.key in done:
            found.append(training(branch.child.architecture, branch.extended, branch.teaching, done))
    return found


def on_policy_flops(node: Node, child: Architecture, done: Done) -> int:
    """Of a training on what the child writes, without the measurements of a watched corpus in between."""
    manifest = done[node.key].manifest
    length = done[node.inputs["corpus"].key].manifest.facts["sequence_length"]
    measured: int = manifest.facts.get("watched", {}).get("tokens", 0)
    return manifest.flops - measured * child.forward_flops(length)


def training(child: Architecture, node: Node, teaching: Teaching, done: Done, on_policy: int = 0) -> Training:
    """Of a node that is done."""
    corpus = done[node.inputs["corpus"].key].manifest.facts
    length = corpus["sequence_length"]
    tokens = int(done[node.key].manifest.facts["last"]["tokens"])
    teachers = teachers_of(teaching, node.inputs["corpus"])
    return Training(child, teachers, tokens, corpus["train_rows"] * length, length, on_policy)


def floor_flops(trained: list[Training]) -> int:
    """One forward pass of every teacher over the tokens of the longest training that it teaches on rows of
    one length, or over the corpus where that is shorter, and the training of every child."""
    taught: dict[str, int] = {}
    for one in trained:
        for key, model in one.teachers:
            flops = min(one.most, one.tokens) * model.forward_flops(one.length)
            taught[key] = max(taught.get(key, 0), flops)
    return sum(taught.values()) + sum(one.own for one in trained)


def separate_flops(trained: list[Training]) -> int:
    """Every child's training with its teachers running beside it."""
    return sum(
        one.own + one.tokens * sum(model.forward_flops(one.length) for _, model in one.teachers)
        for one in trained
    )


def teachers_of(teaching: Teaching, corpus: Node) -> list[tuple[str, Architecture]]:
    """Keys, of model and rows, and shape of every model that teaches."""
    keys = [
        f"{node.key} {corpus.key}" for role, node in teaching.inputs.items() if not role.startswith("signals")
    ]
    return list(zip(keys, teaching.teachers, strict=True))
