"""`family.json`: the newest build of a family, derived from the manifests of its artifacts.

Its keys are stable for programs: more may be added, none is renamed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from rich.errors import ConsoleError

from cascade.errors import InputError, IntegrityError
from cascade.family.addresses import INDEX, right_address
from cascade.family.graph import ExtendedNodes, Graph, Node, StageNodes
from cascade.family.ledger import ledger
from cascade.family.runner import Outcome
from cascade.parsing import parse_json
from cascade.storage.lease import Lease
from cascade.storage.locations import Location

WRITING = ".family.json.writing"
Json = dict[str, Any]


def write_index(
    index: Json, store: Location, complete: bool, beside: Mapping[str, bytes] | None = None
) -> bool:
    """Replace `family.json` in one step, and then the files `beside` it; returns whether it was ours to do.

    complete: all of its recipe is built. What is not stands there only until a build ends: neither an
    interrupted rebuild nor another recipe's build beside this one hides a family that is whole.
    """
    text = json.dumps(index | {"complete": complete}, indent=2) + "\n"
    family = store / index["family"]
    # From the look until the last write nobody else may write.
    with Lease(family / WRITING):
        ours = complete or not stands(family, index["run"])
        if ours:
            for path, data in {INDEX: text.encode(), **(beside or {})}.items():
                (family / path).write_bytes(data)
    return ours


def stands(family: Location, run: str) -> bool:
    """Whether there is an index that this run must not replace by an incomplete one."""
    try:
        found = json.loads((family / INDEX).read_bytes())
    except (FileNotFoundError, ValueError):
        return False
    # Older versions did not say whether it is complete.
    return bool(found["run"] != run and found.get("complete", True))


def read_index(family: Location) -> Json:
    """Read `<root>/<family>/family.json`; raises InputError when the family was never built there."""
    try:
        index: Json = parse_json((family / INDEX).read_bytes())
    except FileNotFoundError:
        raise InputError(
            "there is no family and no artifact here",
            value=family.uri,
            where=f"neither {INDEX} nor manifest.json exists",
            remedy=right_address(family)
            or "give <root>/<family>, or the folder of an artifact; `cascade build` makes them",
        ) from None
    except ValueError as error:
        raise damaged(family, error) from error
    if not isinstance(index, dict):
        raise damaged(family, "it is no JSON object")
    return index


@contextmanager
def damage_named(family: Location) -> Iterator[None]:
    """While an index is read: whatever it lacks, or has in another form, becomes an IntegrityError."""
    try:
        yield
    except (AttributeError, ConsoleError, LookupError, TypeError, ValueError) as error:
        reason = f"a figure is missing, or is none ({type(error).__name__}: {error})"
        raise damaged(family, reason) from error


def damaged(family: Location, reason: object) -> IntegrityError:
    """The error for an index that cannot be read, or does not say what it should."""
    return IntegrityError(
        f"{INDEX} is damaged",
        value=reason,
        where=f"{family.uri}/{INDEX}",
        remedy="`cascade build` writes it again; no artifact is touched",
    )


def family_index(graph: Graph, store: Location, done: dict[str, Outcome], run: str) -> Json:
    """The family as plain JSON: the parent, the finished stages, and every artifact with its key."""
    parent = done[graph.evaluated.key].manifest.facts
    return {
        "family": graph.recipe.family,
        "run": run,
        "updated": datetime.now(UTC).isoformat(timespec="seconds"),
        "recipe": graph.recipe.model_dump(mode="json"),
        "parent": {
            "uri": graph.parent.location(store).uri,
            "parameters": graph.original.parameters,
            "non_embedding_parameters": graph.original.non_embedding_parameters,
            **{name: parent["parent"][name] for name in ("held_out_ce", "tokens_per_second")},
        },
        "stages": [stage_record(stage, store, done) for stage in graph.stages if stage.evaluated.key in done],
        "extended": [
            extended_record(branch, store, done) for branch in graph.extended if branch.evaluated.key in done
        ],
        "controls": [
            control_record(control, graph.stages[-1], store, done)
            for control in graph.controls
            if control.evaluated.key in done
        ],
        "ledger": ledger(graph, done),
        "artifacts": [artifact_record(node, store, done[node.key]) for node in graph if node.key in done],
    }


def artifact_record(node: Node, store: Location, outcome: Outcome) -> Json:
    """One artifact of the build; `run` names the build that made it. inputs: role -> key of the artifact."""
    return {
        "node": node.name,
        "uri": node.location(store).uri,
        "key": node.key,
        "inputs": {role: source.key for role, source in node.inputs.items()},
        "reused": outcome.reused,
        "seconds": outcome.manifest.seconds,
        "bytes": outcome.manifest.bytes,
        "tokens": outcome.manifest.tokens,
        "flops": outcome.manifest.flops,
        "run": outcome.manifest.run,
    }


def stage_record(stage: StageNodes, store: Location, done: dict[str, Outcome]) -> Json:
    """One child's row: what it is, what pruning cost and distillation won back, and what it took.

    seconds: of the stage's nodes, from the manifests, whichever run made them. reused: the trained
    checkpoint was there before this build. before_on_policy: the figures of the distilled child, where it was
    then taught by what it wrote. watched: what the watch of each training found, where there was one;
    tokens_trained are all that were trained, even where the child is that of an earlier step. held_out_ce and
    kl_to_parent are nats a token.
    """
    nodes = [node for node in stage if node.key in done]
    facts = done[stage.evaluated.key].manifest.facts
    pruned, child = facts["pruned"], facts[stage.checkpoint.kind]
    return {
        "name": stage.stage.name,
        "checkpoint": stage.checkpoint.location(store).uri,
        "architecture": stage.architecture.record(),
        "parameters": stage.architecture.parameters,
        "non_embedding_parameters": stage.architecture.non_embedding_parameters,
        "pruned_held_out_ce": pruned["held_out_ce"],
        "held_out_ce": child["held_out_ce"],
        "pruned_kl_to_parent": pruned["kl_to_parent"],
        "kl_to_parent": child["kl_to_parent"],
        "top1_agreement": child["top1_agreement"],
        "tokens_trained": sum(done[node.key].manifest.facts["last"]["tokens"] for node in stage.trained),
        "tokens_per_second": child["tokens_per_second"],
        "seconds": round(sum(done[node.key].manifest.seconds for node in nodes), 1),
        "reused": all(done[node.key].reused for node in stage.trained),
        "race": race_record(stage, done),
        "before_on_policy": facts["distilled"] if stage.on_policy else None,
        "watched": {
            node.kind.value: found
            for node in stage.trained
            if (found := done[node.key].manifest.facts.get("watched"))
        },
    }


def extended_record(branch: ExtendedNodes, store: Location, done: dict[str, Outcome]) -> Json:
    """A long-context child's row: figures on held-out long rows.

    before_*: of the short child with the same RoPE settings, untrained on them; parent_held_out_ce: of the
    teacher. All in nats a token.
    """
    trained, facts = done[branch.extended.key].manifest, done[branch.evaluated.key].manifest.facts
    before, after = facts["distilled"], facts["extended"]
    return {
        "name": branch.name,
        "of": branch.child.stage.name,
        "checkpoint": branch.extended.location(store).uri,
        "sequence_length": branch.length,
        "max_position_embeddings": trained.facts["max_position_embeddings"],
        "rope_parameters": trained.facts["rope_parameters"],
        "parameters": branch.child.architecture.parameters,
        "before_held_out_ce": before["held_out_ce"],
        "held_out_ce": after["held_out_ce"],
        "parent_held_out_ce": facts["parent"]["held_out_ce"],
        "before_kl_to_parent": before["kl_to_parent"],
        "kl_to_parent": after["kl_to_parent"],
        "top1_agreement": after["top1_agreement"],
        "tokens_trained": trained.facts["last"]["tokens"],
        "tokens_per_second": after["tokens_per_second"],
        "seconds": round(sum(done[node.key].manifest.seconds for node in branch if node.key in done), 1),
        "reused": done[branch.extended.key].reused,
    }


def control_record(control: StageNodes, child: StageNodes, store: Location, done: dict[str, Outcome]) -> Json:
    """A control's row: that of a stage, and by how much it is worse than the child that it stands beside.

    Differences are in nats a token, positive where the child is better.
    """
    record, own = stage_record(control, store, done), stage_record(child, store, done)
    return {
        **record,
        "control": control.control,
        "of": child.stage.name,
        "seed": control.distilled.section["seed"],
        "held_out_ce_difference": record["held_out_ce"] - own["held_out_ce"],
        "kl_to_parent_difference": record["kl_to_parent"] - own["kl_to_parent"],
    }


def race_record(stage: StageNodes, done: dict[str, Outcome]) -> list[Json]:
    """The candidates of a stage and their curves; empty without a race.

    curve: tokens trained and cross-entropy in nats a token on rows that no leg trains on, after each leg run.
    """
    if len(stage.candidates) == 1:
        return []
    return [
        {
            "architecture": candidate.architecture.record(),
            "parameters": candidate.architecture.parameters,
            "curve": [done[leg.key].manifest.facts["end"] for leg in candidate.legs if leg.key in done],
            "won": index == stage.winner,
        }
        for index, candidate in enumerate(stage.candidates)
    ]
