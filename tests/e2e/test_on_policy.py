"""A family whose first child is taught by what it writes: built, planned, interrupted, measured."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from cascade.architecture import Architecture
from cascade.family.forecast import on_policy_flops
from cascade.family.plan import plan_family
from cascade.recipe import Recipe
from cascade.storage.artifacts import read_manifest
from cascade.storage.locations import open_location
from cascade.storage.manifest import Manifest
from tests.e2e.conftest import Command
from tests.tiny_family import tiny_tree, write_recipe
from tests.waiting import LONG, wait_until

# 64 rows in 32 steps, three in four of them the student's own.
LENGTH, TOKENS, ROWS = 32, 2048, 48
WRITTEN = {"tokens": TOKENS, "mixture": 0.75, "prompt_tokens": 12, "batch_tokens": 64}
Index = dict[str, Any]


def tree_of(parent: Path, corpus: Path) -> dict[str, Any]:
    tree = tiny_tree(parent, corpus)
    for stage in tree["stages"]:
        stage["distill"]["tokens"] = 1024
    tree["stages"][0]["on_policy"] = WRITTEN
    return tree


def manifest(uri: str) -> Manifest:
    found = read_manifest(open_location(uri))
    assert found
    return found


def index_of(store: Path) -> Index:
    found: Index = json.loads((store / "tiny" / "family.json").read_text())
    return found


@pytest.fixture(scope="module")
def built(tiny_parent: Path, tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a recipe and of the store that it was built in."""
    folder = tmp_path_factory.mktemp("on-policy")
    recipe = write_recipe(folder / "recipe.yaml", tree_of(tiny_parent, tiny_corpus))
    process = build_in_a_process(recipe, folder / "store", folder / "cache")
    output, _ = process.communicate(timeout=LONG)
    assert process.returncode == 0, output
    return folder


def build_in_a_process(recipe: Path, store: Path, cache: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "cascade.cli", "build", str(recipe), "--store", str(store), "--direct"]
    options = ["--cache", str(cache), "--checkpoint-seconds", "0"]
    return subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_the_child_that_wrote_is_the_one_that_counts(built: Path) -> None:
    index = index_of(built / "store")
    first, second = index["stages"]
    node = manifest(first["checkpoint"])
    assert node.kind == "on_policy"
    assert f"{os.sep}large{os.sep}on_policy{os.sep}" in first["checkpoint"]
    pruned = next(one for one in index["artifacts"] if one["node"] == "small/pruned")
    assert manifest(pruned["uri"]).inputs["checkpoint"].key == node.key
    measured = next(one for one in index["artifacts"] if one["node"] == "large/evaluated")
    facts = manifest(measured["uri"]).facts
    assert set(facts) == {"pruned", "distilled", "on_policy"}
    assert first["kl_to_parent"] == facts["on_policy"]["kl_to_parent"]
    assert first["before_on_policy"] == facts["distilled"]
    assert first["held_out_ce"] != facts["distilled"]["held_out_ce"]
    assert first["tokens_trained"] == 1024 + TOKENS
    assert second["before_on_policy"] is None
    child = AutoModelForCausalLM.from_pretrained(first["checkpoint"], dtype=torch.float32)
    assert child.num_parameters() == first["parameters"]


def test_manifest_steps_and_plan_count_what_was_written(built: Path, tmp_path: Path) -> None:
    index = index_of(built / "store")
    stage = index["stages"][0]
    node, shape = manifest(stage["checkpoint"]), Architecture.from_record(stage["architecture"])
    lines = (Path(stage["checkpoint"]) / "steps.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    own = sum(step["own_targets"] for step in steps)
    assert node.facts["written_rows"] == ROWS
    assert ROWS < own == node.facts["own_targets"] <= ROWS * (LENGTH - 12)
    parent = Architecture.from_record(manifest(index["parent"]["uri"]).facts["architecture"])
    taught = TOKENS * parent.forward_flops(LENGTH)
    writing, training = ROWS * LENGTH, 3 * TOKENS
    assert node.tokens == TOKENS
    assert node.teacher_flops == taught
    assert node.flops == taught + (writing + training) * shape.forward_flops(LENGTH)
    recipe = Recipe.model_validate(index["recipe"])
    assert on_policy_flops(plan_family(recipe, tmp_path).stages[0], LENGTH) == node.flops
    entries = [line for entry in index["ledger"]["entries"] for line in entry["nodes"]]
    assert [line["flops"] for line in entries if line["name"] == "large/on_policy"] == [node.flops]
    distilled = sum(
        3 * 1024 * Architecture.from_record(one["architecture"]).forward_flops(LENGTH)
        for one in index["stages"]
    )
    assert index["ledger"]["floor_flops"] == distilled + 1024 * parent.forward_flops(LENGTH) + node.flops


@pytest.mark.slow
def test_a_build_that_is_stopped_while_the_child_writes_ends_at_the_same_bits(
    built: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    arguments = (built / "recipe.yaml", store, tmp_path / "cache")
    process = build_in_a_process(*arguments)
    key = Path(index_of(built / "store")["stages"][0]["checkpoint"]).name
    kept = f"tiny/large/training/{key}/step-*"
    assert wait_until(lambda: any(store.glob(kept)) or process.poll() is not None, rest=0.02)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=LONG)
    assert process.returncode == 143, output
    assert not list(store.glob("tiny/large/on_policy/*/manifest.json"))
    process = build_in_a_process(*arguments)
    output, _ = process.communicate(timeout=LONG)
    assert process.returncode == 0, output
    assert "resumed after step" in output
    expected, found = (
        open_location(index_of(place)["stages"][0]["checkpoint"]) for place in (built / "store", store)
    )
    for name in ("model.safetensors", "config.json"):
        assert (found / name).sha256() == (expected / name).sha256()


def test_an_unchanged_recipe_makes_nothing_again_and_a_plan_prints(built: Path, command: Command) -> None:
    code, said = command("build", str(built / "recipe.yaml"), "--store", str(built / "store"), "--direct")
    assert code == 0, said
    assert all(one["reused"] for one in index_of(built / "store")["artifacts"])
    code, said = command("plan", str(built / "recipe.yaml"))
    assert code == 0, said
    code, said = command("show", str(built / "store" / "tiny"))
    assert code == 0, said
