"""What a family cost, node by node, against what it could not have cost less than, and against doing without.

FLOPs are analytic (`cascade.family.cost`), of what was really run; seconds and bytes are measured. All are
from the manifests, whichever run made the artifacts.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from cascade.architecture import Architecture
from cascade.family.cost import student_flops
from cascade.family.graph import Graph, Node, StageNodes
from cascade.family.runner import Outcome
from cascade.storage.manifest import Manifest

Json = dict[str, Any]
Done = dict[str, Outcome]
SHARED = "shared"
# Manifests before this schema version do not tell whose FLOPs they count.
TELLS_TEACHER = 2


def ledger(graph: Graph, done: Done) -> Json:
    """Plain JSON: `entries` (what all stages share, then child by child with its nodes), `family` and
    `controls` (their sums), `floor_flops` and `separate_flops`, and the ratios of the two to the family's.

    floor: every teacher's one forward pass over what it is needed for, and the students' training. separate:
    every child trained by itself on as many tokens, with its teachers running beside it.
    """
    seen: set[str] = set()
    shared = [entry(SHARED, graph.trunk, done, seen)]
    stages = [entry(stage.stage.name, stage, done, seen) for stage in graph.stages]
    controls = [entry(control.stage.name, control, done, seen) for control in graph.controls]
    family = total("family", [*shared, *stages])
    trained = [stage for stage in graph.stages if stage.checkpoint.key in done]
    floor, separate = floor_flops(graph, trained, done), separate_flops(graph, trained, done)
    return {
        "entries": [*shared, *stages, *controls],
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


def floor_flops(graph: Graph, trained: list[StageNodes], done: Done) -> int:
    """One forward pass of every teacher over the tokens of the longest stage that it teaches, or over the
    corpus where that is shorter, and the training of every child.

    What a child writes is new, so its teachers' passes over it are part of its training.
    """
    corpus, length = done[graph.corpus.key].manifest.facts, graph.recipe.corpus.sequence_length
    most = corpus["train_rows"] * corpus["sequence_length"]
    taught: dict[str, tuple[Architecture, int]] = {}
    for stage in trained:
        for key, model in teachers_of(stage):
            before = taught[key][1] if key in taught else 0
            taught[key] = model, max(before, min(most, tokens_of(stage, done)))
    forward = sum(tokens * model.forward_flops(length) for model, tokens in taught.values())
    return forward + sum(training_of(stage, length, done) for stage in trained)


def separate_flops(graph: Graph, trained: list[StageNodes], done: Done) -> int:
    """Every child's training with its teachers running beside it."""
    length = graph.recipe.corpus.sequence_length
    return sum(
        training_of(stage, length, done)
        + tokens_of(stage, done) * sum(model.forward_flops(length) for _, model in teachers_of(stage))
        for stage in trained
    )


def teachers_of(stage: StageNodes) -> list[tuple[str, Architecture]]:
    """Key and shape of every model that teaches the stage."""
    keys = [node.key for role, node in stage.teaching.inputs.items() if not role.startswith("signals")]
    return list(zip(keys, stage.teaching.teachers, strict=True))


def training_of(stage: StageNodes, context: int, done: Done) -> int:
    """FLOPs of the child's own forward and backward passes, the winner's legs of a race included, and all
    those of its training on what it writes."""
    on_policy = done[stage.on_policy.key].manifest.flops if stage.on_policy else 0
    return tokens_of(stage, done) * student_flops(stage.architecture, context) + on_policy


def tokens_of(stage: StageNodes, done: Done) -> int:
    """Tokens that the child was distilled on."""
    return int(done[stage.distilled.key].manifest.facts["last"]["tokens"])
