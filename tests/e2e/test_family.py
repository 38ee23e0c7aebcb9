"""A tiny family, whole: through the Prefect flow into a real S3 server, and directly into a folder."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cascade.recipe import Options
from cascade.storage.locations import Location, open_location
from flows.family import build_family
from tests.tiny_family import tiny_recipe, tiny_tree, write_recipe

NODES = 4 + 2 * 4


def cascade(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a person would."""
    command = [sys.executable, "-m", "cascade.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


def show(uri: str) -> dict[str, Any]:
    """What `cascade show --json` prints."""
    done = cascade("show", uri, "--json")
    assert done.returncode == 0, done.stderr
    record: dict[str, Any] = json.loads(done.stdout)
    return record


def build_directly(recipe: Path, store: str, cache: Path) -> dict[str, Any]:
    """Build without Prefect and return what `show` says of it."""
    done = cascade("build", str(recipe), "--store", store, "--direct", "--cache", str(cache))
    assert done.returncode == 0, done.stderr
    return show(f"{store}/tiny")


def digests(family: Location) -> dict[str, str]:
    """File of a stage's checkpoint -> sha256; seconds and dates are left out."""
    return {
        f"{stage['name']}/{path}": (open_location(stage["checkpoint"]) / path).sha256()
        for stage in show(family.uri)["stages"]
        for path in open_location(stage["checkpoint"]).walk()
        if path not in ("manifest.json", "steps.jsonl")
    }


@pytest.fixture(scope="module")
def recipe_file(tiny_parent: Path, tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe") / "tiny.yaml", tiny_tree(tiny_parent, tiny_corpus))


@pytest.fixture(scope="module")
def folder_store(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished family in a folder, built by the command line without Prefect."""
    store = tmp_path_factory.mktemp("store")
    build_directly(recipe_file, str(store), tmp_path_factory.mktemp("cache"))
    return store


@pytest.fixture
def copied_store(folder_store: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(folder_store, tmp_path / "store"))


def test_the_flow_into_s3_makes_the_same_children_as_the_command_into_a_folder(
    s3: str,
    prefect_server: str,
    tiny_parent: Path,
    tiny_corpus: Path,
    folder_store: Path,
    tmp_path: Path,
) -> None:
    recipe = tiny_recipe(tiny_parent, tiny_corpus)
    index = build_family(recipe, s3, Options(cache=str(tmp_path / "cache")))
    assert [artifact["reused"] for artifact in index["artifacts"]] == [False] * NODES
    assert digests(open_location(f"{s3}/tiny")) == digests(open_location(str(folder_store / "tiny")))

    again = build_family(recipe, s3, Options(cache=str(tmp_path / "other-cache")))
    assert [artifact["reused"] for artifact in again["artifacts"]] == [True] * NODES
    assert cascade("verify", f"{s3}/tiny").returncode == 0


def test_show_has_the_keys_that_programs_rely_on(folder_store: Path) -> None:
    index = show(f"{folder_store}/tiny")
    assert {"family", "parent", "stages"} <= index.keys()
    assert {"uri", "parameters", "held_out_ce", "tokens_per_second"} <= index["parent"].keys()
    for stage, tokens in zip(index["stages"], (4096, 4096), strict=True):
        assert stage["checkpoint"].startswith(str(folder_store / "tiny" / stage["name"] / "distilled"))
        assert stage["parameters"] < index["parent"]["parameters"]
        # A random parent predicts no text, so only the distance to it says whether the child learned.
        assert stage["kl_to_parent"] < stage["pruned_kl_to_parent"]
        assert stage["held_out_ce"] > 0 < stage["pruned_held_out_ce"]
        assert 0 < stage["top1_agreement"] <= 1
        assert stage["tokens_trained"] == tokens
        assert stage["tokens_per_second"] > 0
        assert stage["seconds"] > 0
        assert stage["reused"] is False


def test_show_prints_the_family_and_an_artifact_as_tables(folder_store: Path) -> None:
    family = cascade("show", f"{folder_store}/tiny")
    assert all(name in family.stdout for name in ("parent", "large", "small", "CE distilled"))
    checkpoint = show(f"{folder_store}/tiny")["stages"][0]["checkpoint"]
    artifact = cascade("show", checkpoint)
    assert "facts.gate" in artifact.stdout
    assert "inputs.student.key" in artifact.stdout


def test_every_child_passed_the_gate(folder_store: Path) -> None:
    for stage in show(f"{folder_store}/tiny")["stages"]:
        gate = show(stage["checkpoint"])["facts"]["gate"]
        assert gate["parameters"] == stage["parameters"]


def test_a_second_build_reuses_everything_and_trains_nothing(
    copied_store: Path, recipe_file: Path, tmp_path: Path
) -> None:
    index = build_directly(recipe_file, str(copied_store), tmp_path / "cache")
    assert [artifact["reused"] for artifact in index["artifacts"]] == [True] * NODES
    assert all(stage["reused"] for stage in index["stages"])


def test_a_reused_corpus_still_refuses_a_stage_that_is_too_long_for_it(
    copied_store: Path, tiny_parent: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    tree = tiny_tree(tiny_parent, tiny_corpus)
    tree["stages"][1]["distill"]["tokens"] = 1_000_000
    longer = write_recipe(tmp_path / "longer.yaml", tree)
    done = cascade(
        "build", str(longer), "--store", str(copied_store), "--direct", "--cache", str(tmp_path / "cache")
    )
    assert done.returncode == 2
    assert "epochs: " in done.stderr


def test_a_deleted_child_is_made_again_bit_for_bit_and_nothing_else_is(
    copied_store: Path, recipe_file: Path, tmp_path: Path
) -> None:
    before = digests(open_location(str(copied_store / "tiny")))
    shutil.rmtree(copied_store / "tiny" / "small" / "distilled")
    index = build_directly(recipe_file, str(copied_store), tmp_path / "cache")
    made = [artifact["node"] for artifact in index["artifacts"] if not artifact["reused"]]
    assert made == ["small/distilled"]
    assert digests(open_location(str(copied_store / "tiny"))) == before


def test_a_damaged_child_is_named_by_verify_and_refused_as_an_input(
    copied_store: Path, recipe_file: Path, tmp_path: Path
) -> None:
    (weights,) = copied_store.glob("tiny/large/distilled/*/model.safetensors")
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(bytes(damaged))
    verified = cascade("verify", str(copied_store))
    assert verified.returncode == 1
    assert "model.safetensors" in verified.stdout
    assert "problems: 1" in verified.stdout

    shutil.rmtree(copied_store / "tiny" / "small")
    cache = str(tmp_path / "cache")
    built = cascade("build", str(recipe_file), "--store", str(copied_store), "--direct", "--cache", cache)
    assert built.returncode == 2
    assert "model.safetensors" in built.stderr
    assert "sha256" in built.stderr


def test_an_interrupted_training_goes_on_and_ends_at_the_same_bits(
    tiny_parent: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    tree = tiny_tree(tiny_parent, tiny_corpus)
    tree["stages"] = [tree["stages"][0] | {"distill": {"tokens": 20480, "batch_tokens": 256}}]
    recipe = write_recipe(tmp_path / "one.yaml", tree)
    arguments = ["build", str(recipe), "--direct", "--checkpoint-seconds", "0", "--cache", str(tmp_path)]
    interrupted, whole = tmp_path / "interrupted", tmp_path / "whole"

    command = [sys.executable, "-m", "cascade.cli", *arguments, "--store", str(interrupted)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 600
    while not list(interrupted.glob("tiny/large/training/*/step-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 130, output
    assert not list(interrupted.glob("tiny/large/distilled/*"))

    resumed = cascade(*arguments, "--store", str(interrupted))
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed after step" in resumed.stderr
    assert not list(interrupted.glob("tiny/large/training/*/step-*"))

    shutil.copytree(interrupted, whole)
    shutil.rmtree(whole / "tiny" / "large" / "distilled")
    again = cascade(*arguments, "--store", str(whole))
    assert again.returncode == 0, again.stderr
    assert "resumed" not in again.stderr
    assert digests(open_location(str(interrupted / "tiny"))) == digests(open_location(str(whole / "tiny")))
