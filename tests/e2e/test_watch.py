"""A family whose first child learns a short corpus by heart, while another text is watched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cascade.architecture import Architecture
from cascade.storage.artifacts import read_manifest
from cascade.storage.locations import open_location
from cascade.storage.manifest import Manifest
from tests.e2e.conftest import Command
from tests.tiny import make_corpus
from tests.tiny_family import tiny_tree, write_recipe

LENGTH, WATCHED = 32, 640
BY_HEART = {
    "tokens": 40_960,
    "batch_tokens": 512,
    "epochs": 100,
    "learning_rate": 0.02,
    "cross_entropy_weight": 1.0,
}
Index = dict[str, Any]


def manifest(uri: str) -> Manifest:
    found = read_manifest(open_location(uri))
    assert found
    return found


def backwards(path: Path) -> Path:
    """The same letters, so that the first steps help; then what is learned of their order is wrong."""
    texts = [json.loads(line)["text"][::-1] for line in path.read_text("ascii").splitlines()]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "ascii")
    return path


def index_of(store: Path) -> Index:
    found: Index = json.loads((store / "tiny" / "family.json").read_text())
    return found


def test_over_fitting_ends_a_stage_and_says_so(tiny_parent: Path, tmp_path: Path, command: Command) -> None:
    tree = tiny_tree(tiny_parent, make_corpus(tmp_path / "few.jsonl", documents=12))
    tree["corpus"]["held_out_tokens"] = 64
    tree["stages"][0]["distill"] = BY_HEART
    tree["stages"][1]["distill"] = {"tokens": 1024, "batch_tokens": 256}
    other = backwards(make_corpus(tmp_path / "other.jsonl", documents=6, seed=9))
    tree["watch"] = {"sources": [str(other)], "tokens": WATCHED, "every": 4}
    recipe, store = write_recipe(tmp_path / "recipe.yaml", tree), tmp_path / "store"
    arguments = ("build", str(recipe), "--store", str(store), "--direct")
    code, said = command(*arguments)
    assert code == 0, said
    assert "ended early" in said
    assert "stopped early: best at" in " ".join(said.split())
    first, second = index_of(store)["stages"]
    found, node = first["watched"]["distilled"], manifest(first["checkpoint"])
    lines = (Path(first["checkpoint"]) / "steps.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    measured = {step["step"]: step["watched_ce"] for step in steps if step["watched_ce"] is not None}
    assert found == node.facts["watched"]
    assert found["stopped_early"]
    assert found["measurements"] == len(measured)
    assert found["best_ce"] == min(measured.values()) == measured[found["best_step"]]
    assert found["best_tokens"] == steps[found["best_step"]]["tokens"]
    assert len(steps) == found["best_step"] + 1 + 3 * 4 < 80
    assert first["tokens_trained"] == node.tokens == steps[-1]["tokens"] > found["best_tokens"]
    shape = Architecture.from_record(first["architecture"])
    measuring = len(measured) * WATCHED * shape.forward_flops(LENGTH)
    training = 3 * node.tokens * shape.forward_flops(LENGTH)
    assert node.flops == training + node.teacher_flops + measuring
    assert second["watched"]["distilled"]["measurements"] == 1
    assert {"parent/watched"} <= {one["node"] for one in index_of(store)["artifacts"]}

    code, said = command(*arguments)
    assert code == 0, said
    assert all(one["reused"] for one in index_of(store)["artifacts"])
    code, said = command("plan", str(recipe))
    assert code == 0, said
    code, said = command("show", str(store / "tiny"), "--ledger")
    assert code == 0, said
    assert "parent/watched" in said
