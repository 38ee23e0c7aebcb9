"""An index as a build leaves it, small enough to be checked by eye."""

from __future__ import annotations

import copy
from typing import Any

Json = dict[str, Any]
ROOT = "s3://bucket/tiny"
SIZES = {"layers": 3, "hidden": 64, "ffn": 96, "kv_groups": 2, "heads_per_group": 2, "experts": 0}


def key(name: str) -> str:
    """64 digits that are the node's own."""
    return name.encode().hex().ljust(64, "0")[:64]


def artifact(node: str, **inputs: str) -> Json:
    """One of an index; inputs: role -> node."""
    place = node if not node.endswith(("/corpus", "/signals")) else "shared/" + node.rpartition("/")[2]
    return {
        "node": node,
        "uri": f"{ROOT}/{place}/{key(node)[:12]}",
        "key": key(node),
        "inputs": {role: key(source) for role, source in inputs.items()},
        "bytes": 1000 + len(node),
    }


def row(name: str, **changes: Any) -> Json:
    """A stage's."""
    return {
        "name": name,
        "checkpoint": artifact(f"{name}/distilled")["uri"],
        "architecture": SIZES,
        "parameters": 500,
        "non_embedding_parameters": 400,
        "pruned_held_out_ce": 4.0,
        "held_out_ce": 3.0,
        "pruned_kl_to_parent": 1.6,
        "kl_to_parent": 0.4,
        "top1_agreement": 0.755,
        "tokens_per_second": 150.0,
        "tokens_trained": 4096,
        "seconds": 12.0,
        "reused": False,
        "race": [],
        "before_on_policy": None,
        "watched": {},
        **changes,
    }


def cost(name: str, *nodes: str) -> Json:
    """A ledger's line."""
    figures = {"tokens": 10, "flops": 10**9, "teacher_flops": 0, "seconds": 1.0, "bytes": 1000}
    return {"name": name, **figures, "nodes": [{"name": node, **figures} for node in nodes]}


def index() -> Json:
    """A parent, two children, and who made what from what."""
    taught = {"corpus": "parent/corpus", "signals": "parent/signals"}
    return copy.deepcopy(
        {
            "family": "tiny",
            "run": "tiny-20260101T000000-abcdef",
            "updated": "2026-01-01T00:00:00+00:00",
            "recipe": {"parent": "someone/a-parent", "stages": []},
            "parent": {
                "uri": artifact("parent/parent")["uri"],
                "parameters": 1000,
                "non_embedding_parameters": 900,
                "held_out_ce": 2.5,
                "tokens_per_second": 100.0,
            },
            "stages": [row("large", parameters=800, held_out_ce=2.7), row("small", reused=True)],
            "extended": [],
            "controls": [],
            "ledger": {
                "entries": [cost("shared"), cost("large", "large/pruned"), cost("small", "small/pruned")],
                "family": cost("family"),
                "floor_flops": 10**9,
                "separate_flops": 4 * 10**9,
                "over_floor": 3.0,
                "separate_over_family": 1.5,
            },
            "artifacts": [
                artifact("parent/corpus"),
                artifact("parent/parent"),
                artifact("parent/signals", parent="parent/parent", corpus="parent/corpus"),
                artifact("large/importance", checkpoint="parent/parent", corpus="parent/corpus"),
                artifact("large/pruned", checkpoint="parent/parent", importance="large/importance"),
                artifact("large/distilled", student="large/pruned", **taught),
                artifact("small/pruned", checkpoint="large/distilled"),
                artifact("small/distilled", student="small/pruned", **taught),
                artifact("small/evaluated", distilled="small/distilled", parent="parent/parent"),
            ],
        }
    )
