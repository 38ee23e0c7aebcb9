"""A tiny family, whole: through the Prefect flow into a real S3 server, and directly into a folder."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from cascade.family.build import build, run_options
from cascade.family.index import read_index
from cascade.family.job import Job
from cascade.family.plan import plan_family
from cascade.family.runner import Outcome
from cascade.recipe import Options, Recipe
from cascade.report import SILENT
from cascade.storage.artifacts import read_manifest
from cascade.storage.locations import open_location
from flows.family import build_family
from tests.building import build_directly, digests, shared_host
from tests.e2e.conftest import Command
from tests.tiny_family import tiny_recipe, tiny_tree, write_recipe
from tests.waiting import LONG, wait_until

NODES = 4 + 2 * 4


@pytest.fixture
def recipe(tiny_parent: Path, tiny_corpus: Path) -> Recipe:
    return tiny_recipe(tiny_parent, tiny_corpus)


@pytest.fixture
def recipe_file(tiny_parent: Path, tiny_corpus: Path, tmp_path: Path) -> str:
    return str(write_recipe(tmp_path / "tiny.yaml", tiny_tree(tiny_parent, tiny_corpus)))


@pytest.fixture(scope="module")
def folder_store(tiny_parent: Path, tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished family in a folder, built without Prefect."""
    store = tmp_path_factory.mktemp("store")
    recipe = tiny_recipe(tiny_parent, tiny_corpus)
    build_directly(recipe, store, tmp_path_factory.mktemp("cache"), host=shared_host())
    return store


@pytest.fixture
def copied_store(folder_store: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(folder_store, tmp_path / "store"))


def test_the_flow_into_s3_makes_the_same_children_as_the_build_into_a_folder(
    s3: str, prefect_server: str, recipe: Recipe, folder_store: Path, tmp_path: Path, command: Command
) -> None:
    index = build_family(recipe, s3, Options(cache=str(tmp_path / "cache")))
    assert [artifact["reused"] for artifact in index["artifacts"]] == [False] * NODES
    assert digests(open_location(f"{s3}/tiny")) == digests(open_location(str(folder_store / "tiny")))

    again = build_family(recipe, s3, Options(cache=str(tmp_path / "other-cache")))
    assert [artifact["reused"] for artifact in again["artifacts"]] == [True] * NODES
    code, said = command("verify", f"{s3}/tiny")
    assert code == 0, said


def test_show_has_the_keys_that_programs_rely_on(folder_store: Path, command: Command) -> None:
    code, said = command("show", f"{folder_store}/tiny", "--json")
    assert code == 0, said
    index = json.loads(said)
    assert {"family", "parent", "stages"} <= index.keys()
    assert {"uri", "parameters", "held_out_ce", "tokens_per_second"} <= index["parent"].keys()
    for stage, tokens in zip(index["stages"], (20480, 4096), strict=True):
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


def test_show_prints_the_family_and_an_artifact_as_tables(folder_store: Path, command: Command) -> None:
    _, family = command("show", f"{folder_store}/tiny")
    assert all(name in family for name in ("parent", "large", "small", "CE distilled"))
    checkpoint = read_index(open_location(f"{folder_store}/tiny"))["stages"][0]["checkpoint"]
    _, artifact = command("show", checkpoint)
    assert "facts.gate" in artifact
    assert "inputs.student.key" in artifact


def test_every_child_passed_the_gate(folder_store: Path) -> None:
    for stage in read_index(open_location(f"{folder_store}/tiny"))["stages"]:
        manifest = read_manifest(open_location(stage["checkpoint"]))
        assert manifest is not None
        assert manifest.facts["gate"]["parameters"] == stage["parameters"]


def test_a_second_build_reuses_everything_and_trains_nothing(
    copied_store: Path, recipe_file: str, command: Command
) -> None:
    code, said = command("build", recipe_file, "--store", str(copied_store), "--direct")
    assert code == 0, said
    index = read_index(open_location(f"{copied_store}/tiny"))
    assert [artifact["reused"] for artifact in index["artifacts"]] == [True] * NODES
    assert all(stage["reused"] for stage in index["stages"])


def test_a_reused_corpus_still_refuses_a_stage_that_is_too_long_for_it(
    copied_store: Path, tiny_parent: Path, tiny_corpus: Path, tmp_path: Path, command: Command
) -> None:
    tree = tiny_tree(tiny_parent, tiny_corpus)
    tree["stages"][1]["distill"]["tokens"] = 1_000_000
    longer = write_recipe(tmp_path / "longer.yaml", tree)
    code, said = command("build", str(longer), "--store", str(copied_store), "--direct")
    assert code == 2
    assert "epochs: " in said


def test_a_deleted_child_is_made_again_bit_for_bit_and_nothing_else_is(
    copied_store: Path, recipe: Recipe, tmp_path: Path
) -> None:
    before = digests(open_location(f"{copied_store}/tiny"))
    shutil.rmtree(copied_store / "tiny" / "small" / "distilled")
    index = build_directly(recipe, copied_store, tmp_path / "cache", host=shared_host())
    made = [artifact["node"] for artifact in index["artifacts"] if not artifact["reused"]]
    assert made == ["small/distilled"]
    assert digests(open_location(f"{copied_store}/tiny")) == before


def test_a_damaged_child_is_named_by_verify_and_refused_as_an_input(
    copied_store: Path, recipe_file: str, command: Command
) -> None:
    (weights,) = copied_store.glob("tiny/large/distilled/*/model.safetensors")
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(bytes(damaged))
    code, said = command("verify", str(copied_store))
    assert code == 1
    assert "model.safetensors" in said
    assert "problems: 1" in said

    shutil.rmtree(copied_store / "tiny" / "small")
    code, said = command("build", recipe_file, "--store", str(copied_store), "--direct")
    assert code == 2
    assert "model.safetensors" in said
    assert "sha256" in said


def snapshots(store: Path) -> set[str]:
    """Names of the training snapshots of the first stage."""
    return {path.name for path in store.glob("tiny/large/training/*/step-*")}


def is_further_or_ended(store: Path, before: set[str], process: subprocess.Popen[str]) -> bool:
    """Whether a build has stored another snapshot, or has nothing more to store."""
    return bool(snapshots(store) - before) or process.poll() is not None


def test_a_build_that_is_stopped_twice_goes_on_and_ends_at_the_same_bits(
    folder_store: Path, prefect_server: str, recipe: Recipe, recipe_file: str, tmp_path: Path
) -> None:
    store, cache = tmp_path / "store", tmp_path / "cache"
    options = ["--store", str(store), "--checkpoint-seconds", "0", "--cache", str(cache)]
    environment = {**os.environ, "PREFECT_API_URL": prefect_server}
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        before = snapshots(store)
        process = subprocess.Popen(
            [sys.executable, "-m", "cascade.cli", "build", recipe_file, *options],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # A shell starts what runs in its background with Ctrl-C ignored, and children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        assert wait_until(partial(is_further_or_ended, store, before, process), rest=0.02)
        process.send_signal(number)
        output, _ = process.communicate(timeout=LONG)
        assert process.returncode == code, output
        assert "Traceback" not in output
        assert not list(store.glob("tiny/large/distilled/*"))
    assert "resumed after step" in output

    build_directly(recipe, store, cache, host=shared_host())
    assert not snapshots(store)
    assert digests(open_location(f"{store}/tiny")) == digests(open_location(f"{folder_store}/tiny"))


def aged(store: Path, days: float) -> None:
    """Make every file as old as that."""
    moment = time.time() - days * 24 * 3600
    for path in store.rglob("*"):
        os.utime(path, (moment, moment))


def test_a_build_is_recorded_with_everything_it_refers_to(folder_store: Path) -> None:
    (path,) = folder_store.glob("tiny/builds/*.json")
    record = json.loads(path.read_text())
    index = read_index(open_location(f"{folder_store}/tiny"))
    assert (path.stem, record["run"], record["recipe"]) == (index["run"], index["run"], index["recipe"])
    assert record["started"] <= record["finished"]
    referred = [f"{folder_store}/{artifact['place']}" for artifact in record["artifacts"]]
    assert referred == [artifact["uri"] for artifact in index["artifacts"]]
    assert [one["key"] for one in record["artifacts"]] == [one["key"] for one in index["artifacts"]]


def test_gc_removes_an_older_childs_artifacts_and_leaves_the_newest_family_whole(
    copied_store: Path, tiny_parent: Path, tiny_corpus: Path, recipe: Recipe, tmp_path: Path, command: Command
) -> None:
    """While the second build runs, too: here before each of its nodes, with nothing else to protect them."""
    before = {path.parent for path in copied_store.glob("tiny/small/*/*/manifest.json")}
    for path in (*copied_store.glob("tiny/builds/*.json"), copied_store / "tiny" / "family.json"):
        path.unlink()
    aged(copied_store, 40)
    tree = tiny_tree(tiny_parent, tiny_corpus)
    tree["stages"][1]["distill"]["tokens"] = 2048
    shorter, cache = Recipe.model_validate(tree), tmp_path / "cache"
    (cache / "0123456789ab").mkdir(parents=True)
    aged(cache, 31)

    def make(job: Job) -> Outcome:
        code, said = command("gc", str(copied_store), "--keep-days", "0", "--delete")
        assert code == 0, said
        return shared_host().run(job, SILENT)

    index = build(
        plan_family(shorter, cache),
        run_options(shorter, str(copied_store), Options(cache=str(cache))),
        make,
    )
    made = [artifact["node"] for artifact in index["artifacts"] if not artifact["reused"]]
    assert made == ["small/distilled", "small/evaluated"]
    # A build keeps the cache of its machine small by itself.
    assert not (cache / "0123456789ab").exists()

    gone = {path for path in before if not path.exists()}
    assert {path.parent.name for path in gone} == {"distilled", "evaluated"}
    assert len(gone) == 2
    aged(copied_store, 400)
    assert "0 things" in command("gc", str(copied_store), "--delete")[1]
    code, said = command("verify", str(copied_store))
    assert code == 0, said
    again = build_directly(shorter, copied_store, cache)
    assert all(artifact["reused"] for artifact in again["artifacts"])
