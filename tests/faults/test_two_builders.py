"""Two builds at once into one store: both end well, nothing is made twice, the result is that of one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from cascade.family.index import read_index, write_index
from cascade.storage import lease as leases
from cascade.storage.locations import Location, open_location
from cascade.storage.manifest import Draft
from cascade.storage.publishing import publish
from tests.faults.killing import leftovers, weights
from tests.tiny_family import tiny_tree, write_recipe

Process = subprocess.Popen[str]


def start(recipe: Path, store: str, cache: Path) -> Process:
    """The command, as a person starts it."""
    command = [sys.executable, "-m", "cascade.cli", "build", str(recipe), "--store", store]
    options = ["--direct", "--cache", str(cache), "--checkpoint-seconds", "0"]
    return subprocess.Popen(
        [*command, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def recipe_file(parent: Path, corpus: Path, folder: Path, tokens: int = 4096) -> Path:
    """A family of one child, which is taught for so many tokens."""
    tree = tiny_tree(parent, corpus)
    tree["stages"] = tree["stages"][:1]
    tree["stages"][0]["distill"]["tokens"] = tokens
    return write_recipe(folder / f"{tokens}.yaml", tree)


def ended(processes: list[Process]) -> list[str]:
    """What they said; all have to end well."""
    said = [process.communicate(timeout=600)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(said), said
    return said


def manifests(store: str) -> dict[str, Any]:
    """Place -> manifest, of all artifacts."""
    root = open_location(store)
    return {
        path: json.loads((root / path).read_bytes())
        for path in root.walk()
        if path.endswith("/manifest.json")
    }


def require_one_result(store: str, recipe: Path, folder: Path) -> None:
    """Two started together make what one makes alone, each node once."""
    said = ended([start(recipe, store, folder / name) for name in ("one", "two")])
    index = read_index(open_location(f"{store}/tiny"))
    made = manifests(store)
    assert len(made) == len(index["artifacts"]) == 8
    # Every node was published by one of the two, and the other used it.
    stored = sum(len(re.findall(r"stored [0-9.,]+ MB", output)) for output in said)
    assert stored == len(made)
    assert any("another builder works on this" in output for output in said)
    for name in ("one", "two"):
        assert leftovers(open_location(store), folder / name) == []

    alone = str(folder / "alone")
    ended([start(recipe, alone, folder / "three")])
    assert weights(store, index) == weights(alone, read_index(open_location(f"{alone}/tiny")))
    assert {path.rsplit("/", 2)[1] for path in made} == {path.rsplit("/", 2)[1] for path in manifests(alone)}


@pytest.mark.slow
def test_the_same_recipe_twice_at_once_into_s3(
    s3: str, tiny_parent: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    require_one_result(s3, recipe_file(tiny_parent, tiny_corpus, tmp_path), tmp_path)


@pytest.mark.slow
def test_two_recipes_of_a_family_at_once(
    s3: str, tiny_parent: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    recipes = [recipe_file(tiny_parent, tiny_corpus, tmp_path, tokens) for tokens in (4096, 8192)]
    said = ended([start(recipe, s3, tmp_path / recipe.stem) for recipe in recipes])
    index = read_index(open_location(f"{s3}/tiny"))
    assert index["complete"]
    assert index["stages"][0]["tokens_trained"] in (4096, 8192)
    # Whichever is shown, both are there.
    children = [re.findall(r"^large: (\S+)", output, re.M)[0] for output in said]
    assert len(set(children)) == 2
    for child in children:
        manifest = json.loads((open_location(child) / "manifest.json").read_bytes())
        assert manifest["kind"] == "distilled"


def index_of(run: str, stages: int) -> dict[str, Any]:
    """As much of an index as its writer looks at."""
    return {"family": "tiny", "run": run, "stages": [{"name": str(i)} for i in range(stages)]}


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    """An empty place of each kind."""
    return open_location(str(tmp_path) if request.param == "folder" else request.getfixturevalue("s3"))


def test_a_build_in_progress_hides_no_family_that_is_whole(store: Location) -> None:
    family = store / "tiny"
    write_index(index_of("a", 1), store, complete=False)
    # Neither is whole: the newest shows what there is.
    write_index(index_of("b", 2), store, complete=False)
    assert read_index(family)["run"] == "b"
    write_index(index_of("a", 3), store, complete=True)
    write_index(index_of("b", 3), store, complete=False)
    assert read_index(family)["run"] == "a"
    write_index(index_of("b", 4), store, complete=True)
    assert read_index(family)["run"] == "b"
    assert store.walk() == ["tiny/family.json"]


def test_cards_stand_beside_the_index_that_stands(store: Location) -> None:
    def written(run: str, complete: bool) -> bool:
        beside = {"card.md": run.encode(), "small/card.md": run.encode()}
        return write_index(index_of(run, 1), store, complete, beside)

    assert written("a", True)
    assert not written("b", False)
    for path in ("card.md", "small/card.md"):
        assert (store / "tiny" / path).read_bytes() == b"a"
    assert written("b", True)
    assert {(store / "tiny" / path).read_bytes() for path in ("card.md", "small/card.md")} == {b"b"}


def test_an_index_of_an_older_version_is_whole(store: Location) -> None:
    (store / "tiny/family.json").write_bytes(json.dumps(index_of("old", 1)).encode())
    write_index(index_of("new", 2), store, complete=False)
    assert read_index(store / "tiny")["run"] == "old"


def test_a_family_that_is_whole_stays_whole_whoever_writes_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look of one and its write, the other must not write."""
    monkeypatch.setattr(leases, "POLL_SECONDS", 0.001)
    store = open_location(str(tmp_path))
    for round_ in range(10):
        unfinished = [
            threading.Thread(target=write_index, args=(index_of(f"{round_}-{i}", 1), store, False))
            for i in range(3)
        ]
        finished = threading.Thread(target=write_index, args=(index_of(f"{round_}", 2), store, True))
        for thread in (*unfinished, finished):
            thread.start()
        for thread in (*unfinished, finished):
            thread.join()
        assert read_index(store / "tiny")["complete"]
        (tmp_path / "tiny/family.json").unlink()


def test_remains_of_a_dead_builder_cost_no_time(s3: str, tmp_path: Path) -> None:
    """Who holds the lease knows that nobody else is at it: other files there are replaced at once."""
    folder, place = tmp_path / "work", open_location(s3) / "artifact"
    folder.mkdir()
    (folder / "steps.jsonl").write_text("ours")
    (place / "steps.jsonl").write_bytes(b"theirs")
    (place / "half").write_bytes(b"theirs")
    draft = Draft(kind="distilled", key="0" * 64, family="tiny", stage="large", run="ours")
    with leases.Lease(open_location(s3) / "lease") as lease:
        publish(folder, place, draft, lease=lease)
    assert place.walk() == ["manifest.json", "steps.jsonl"]
    assert (place / "steps.jsonl").read_bytes() == b"ours"


def test_who_lost_the_lease_publishes_nothing(s3: str, tmp_path: Path) -> None:
    folder, root = tmp_path / "work", open_location(s3)
    folder.mkdir()
    (folder / "steps.jsonl").write_text("ours")
    draft = Draft(kind="distilled", key="0" * 64, family="tiny", stage="large", run="ours")
    with leases.Lease(root / "lease") as lease:
        (root / "lease/lease-0002").write_bytes(b"{}")
        with pytest.raises(leases.StorageFault, match="taken this work over"):
            publish(folder, root / "artifact", draft, lease=lease)
    assert "artifact/manifest.json" not in root.walk()
