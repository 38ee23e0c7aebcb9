"""Whole builds over a store that fails: they end at the bits of a build without faults, or go on later."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

import pytest

from cascade.family.build import run_options
from cascade.family.index import read_index, write_index
from cascade.family.job import job_of
from cascade.family.plan import plan_family
from cascade.family.runner import NodeHost
from cascade.recipe import Options, Recipe
from cascade.storage import patience
from cascade.storage.locations import Location, open_location
from tests.building import build_directly, digests
from tests.e2e.conftest import Command
from tests.faults.proxy import After, Fault, FaultyProxy, First, Request, Storm
from tests.reports import Recorder
from tests.s3_server import S3Server
from tests.tiny_family import tiny_tree, write_recipe
from tests.waiting import wait_until


def tree_of(parent: object, corpus: Path) -> dict[str, Any]:
    """One stage of the tiny family, trained for 16 steps."""
    tree = tiny_tree(Path("unused"), corpus)
    stage = tree["stages"][1] | {"name": "large"}
    return {**tree, "parent": str(parent), "stages": [stage]}


@pytest.fixture(scope="module")
def clean(tiny_parent: Path, tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a build without faults ends with."""
    folder = tmp_path_factory.mktemp("clean")
    recipe = Recipe.model_validate(tree_of(tiny_parent, tiny_corpus))
    build_directly(recipe, folder / "store", folder / "cache")
    return digests(open_location(str(folder / "store" / "tiny")))


@pytest.fixture
def recipe(tiny_parent: Path, tiny_corpus: Path) -> Recipe:
    return Recipe.model_validate(tree_of(tiny_parent, tiny_corpus))


def test_a_node_waits_for_its_store_and_says_so(
    proxy: FaultyProxy, place: Location, recipe: Recipe, tmp_path: Path
) -> None:
    run = run_options(recipe, place.uri, Options(cache=str(tmp_path)))
    report, node = Recorder(), plan_family(recipe, tmp_path).corpus
    stored = threading.Event()

    def fails_once_it_stores(request: Request) -> Fault:
        if request.method == "PUT" and "/shared/corpus/" in request.target and not stored.is_set():
            stored.set()
            return Fault.UNAVAILABLE
        return Fault.NONE

    proxy.plan = fails_once_it_stores
    with NodeHost() as host:
        assert not host.run(job_of(node, run), report).reused
    (line,) = [line for line in report.lines if "again in" in line]
    assert line.startswith(f"{proxy.endpoint}: put_object {place.uri}/shared/corpus/")
    assert "failed: OSError (SlowDown)" in line


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_build_through_a_storm_and_an_outage_ends_at_the_same_bits(
    proxy: FaultyProxy,
    place: Location,
    recipe: Recipe,
    clean: dict[str, str],
    tmp_path: Path,
    command: Command,
    seed: int,
) -> None:
    """Every fourth request meets a fault; while the corpus is stored, with a dozen requests still to come,
    nobody listens, for ten minutes scaled to 5 s."""
    report, storm, stored = Recorder(), Storm(seed, share=0.25), threading.Event()

    def watched(request: Request) -> Fault:
        if request.method == "PUT" and "/shared/corpus/" in request.target:
            stored.set()
        return storm(request)

    def goes_out() -> None:
        stored.wait()
        proxy.outage(5.0).join()

    proxy.plan = watched
    outage = threading.Thread(target=goes_out, daemon=True)
    outage.start()
    build_directly(recipe, place.uri, tmp_path / "cache", report, checkpoint_seconds=0.0)
    assert stored.is_set()
    outage.join()
    proxy.plan = lambda request: Fault.NONE
    assert digests(place / "tiny") == clean
    assert {fault for _, fault in proxy.seen} == set(Fault)
    assert any("answers again" in line for line in report.lines)
    code, said = command("verify", place.uri)
    assert code == 0, said


@pytest.mark.slow
@pytest.mark.parametrize("good", [60, 150])
def test_a_build_whose_store_stays_away_fails_clearly_and_goes_on_later(
    proxy: FaultyProxy,
    place: Location,
    clean: dict[str, str],
    tiny_parent: Path,
    tiny_corpus: Path,
    tmp_path: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    good: int,
) -> None:
    monkeypatch.setenv(patience.SETTING, "2")
    recipe = str(write_recipe(tmp_path / "recipe.yaml", tree_of(tiny_parent, tiny_corpus)))
    build = ["build", recipe, "--store", place.uri, "--direct", "--checkpoint-seconds", "0"]
    proxy.plan = After(good, Fault.UNAVAILABLE)
    code, said = command(*build)
    assert code == 1
    assert "error: the store failed, for 2 s\n  value: OSError (SlowDown)\n  where: " in said
    assert "\n  way out: check that the store is up" in said
    assert "Traceback" not in said

    proxy.plan = lambda request: Fault.NONE
    done = {path.rpartition("/")[0] for path in place.walk() if path.endswith("/manifest.json")}
    assert done
    code, said = command(*build)
    assert code == 0, said
    index = read_index(place / "tiny")
    assert {made["uri"] for made in index["artifacts"] if made["reused"]} == {
        f"{place}/{path}" for path in done
    }
    assert digests(place / "tiny") == clean


@pytest.mark.slow
def test_the_flow_waits_where_prefect_does_not_retry(
    proxy: FaultyProxy,
    place: Location,
    s3_server: S3Server,
    prefect_server: str,
    tiny_parent: Path,
    tiny_corpus: Path,
    clean: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Planning reads the parent, and the index is written, outside of every task."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import LogFilter, LogFilterLevel

    from flows.family import build_family

    # Every wait is told, also of requests that follow each other within a second.
    monkeypatch.setattr("cascade.storage.patience.QUIET_SECONDS", 0.0)
    parent = place / "parent"
    for path in tiny_parent.iterdir():
        (parent / path.name).upload(path)
    recipe = Recipe.model_validate(tree_of(parent.uri, tiny_corpus))
    store = place / "store"
    proxy.plan = First(Fault.UNAVAILABLE)
    build_family(recipe, store.uri, Options(cache=str(tmp_path / "cache")))
    assert digests(store / "tiny") == clean
    failed = [request.target for request, fault in proxy.seen if fault is Fault.UNAVAILABLE]
    assert any(target.endswith("/parent/config.json") for target in failed)
    assert any(target.endswith("/tiny/family.json") for target in failed)
    warnings = LogFilter(level=LogFilterLevel(ge_=logging.WARNING))
    with get_client(sync_client=True) as client:
        for name in ("parent/config.json", "store/tiny/family.json"):
            line = f"{place}/{name} failed: OSError (SlowDown); again in "
            assert wait_until(
                lambda line=line: any(line in log.message for log in client.read_logs(warnings))
            )


def test_planning_and_the_index_wait_for_the_store(
    proxy: FaultyProxy, place: Location, tiny_parent: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    """The two of them without an orchestrator around them."""
    parent = place / "parent"
    for path in tiny_parent.iterdir():
        (parent / path.name).upload(path)
    proxy.plan = First(Fault.RESET)
    outage = proxy.outage(0.5)
    plan_family(Recipe.model_validate(tree_of(parent.uri, tiny_corpus)), tmp_path)
    write_index({"family": "tiny"}, place, complete=True)
    outage.join()
    assert read_index(place / "tiny") == {"family": "tiny", "complete": True}
    assert Fault.RESET in [fault for request, fault in proxy.seen if request.target.endswith("family.json")]
