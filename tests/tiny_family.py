"""A tiny family: the whole graph on a model of a few thousand parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from cascade.recipe import Recipe


def tiny_tree(parent: Path, corpus: Path) -> dict[str, Any]:
    """The recipe as a plain tree, for tests that change a key."""
    return {
        "family": "tiny",
        "parent": str(parent),
        "corpus": {
            "sources": [str(corpus)],
            "sequence_length": 32,
            "held_out": 0.1,
            "held_out_tokens": 512,
        },
        "stages": [
            {
                "name": "large",
                "prune": {"ratio": 0.8, "calibration_tokens": 512},
                "distill": {"tokens": 20480, "batch_tokens": 256},
            },
            {
                "name": "small",
                "prune": {"ratio": 0.5, "calibration_tokens": 512},
                "distill": {"tokens": 4096, "batch_tokens": 256},
            },
        ],
    }


def brief_tree(parent: Path, corpus: Path) -> dict[str, Any]:
    """The same with a few training steps, for tests of what happens around the nodes."""
    tree = tiny_tree(parent, corpus)
    tree["corpus"] |= {"sequence_length": 16, "held_out_tokens": 64}
    for stage in tree["stages"]:
        stage["prune"]["calibration_tokens"] = 64
        stage["distill"] = {"tokens": 256, "batch_tokens": 128}
    return tree


def tiny_recipe(parent: Path, corpus: Path) -> Recipe:
    """The validated recipe."""
    return Recipe.model_validate(tiny_tree(parent, corpus))


def write_recipe(path: Path, tree: dict[str, Any]) -> Path:
    """Save a tree as the YAML file a person would write."""
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path
