"""A build that is killed, or has another beside it, ends at the bits of one that is left alone."""

from __future__ import annotations

import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cascade.recipe import Recipe
from cascade.storage.locations import open_location
from tests.faults.killing import (
    NO_SNAPSHOTS,
    Killed,
    Moment,
    Snapshots,
    leftovers,
    require_snapshots_in_time,
    scripted,
    weights,
)
from tests.tiny_family import tiny_tree

SEED = 5
# Of the first child's training: its tokens by those of a batch.
STEPS = 20480 // 256


def moments(draw: random.Random) -> list[Moment]:
    """Twenty, in the order of the graph: every kind of work is hit, at a point and after a time drawn."""

    def at(job: str, point: str, most: int = 1, seconds: float = 0.0) -> Moment:
        return Moment(job, point, draw.randint(1, most), round(draw.uniform(0, seconds), 3))

    return [
        at("parent/corpus", "begin", seconds=0.2),
        at("parent/parent", "manifest"),
        at("parent/signals", "shard", most=4),
        at("parent/signals", "progress", most=8),
        at("parent/evaluated", "progress"),
        at("large/importance", "progress"),
        at("large/importance", "manifest"),
        at("large/pruned", "begin", seconds=0.3),
        at("large/pruned", "draft"),
        Moment("large/distilled", "step", 20 + draw.randrange(20)),
        at("large/distilled", "snapshot", most=9, seconds=0.01),
        at("large/distilled", "tensors", most=5),
        at("large/distilled", "record", most=5),
        at("large/distilled", "draft"),
        at("large/distilled", "manifest"),
        at("large/distilled", "finish"),
        at("large/evaluated", "begin", seconds=0.3),
        at("small/importance", "finish"),
        Moment("small/distilled", "step", 2 + draw.randrange(14)),
        at("small/evaluated", "progress"),
    ]


def recipe_of(parent: Path, corpus: Path, stages: int) -> Recipe:
    """The tiny family with stored signals."""
    tree = tiny_tree(parent, corpus) | {"teacher": {"signals": "head_and_tail"}}
    tree["stages"] = tree["stages"][:stages]
    return Recipe.model_validate(tree)


def whole(recipe: Recipe, folder: Path) -> dict[str, str]:
    """The weights of a build that nobody kills."""
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        build = Killed(recipe, str(folder / "store"), folder, patch)
        index = build.run()
        assert index
        assert leftovers(open_location(build.store), build.cache) == []
        return weights(build.store, index)


@pytest.fixture(scope="module")
def short(tiny_parent: Path, tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A family of one child, and the child's weights."""
    recipe = recipe_of(tiny_parent, tiny_corpus, stages=1)
    return recipe, whole(recipe, tmp_path_factory.mktemp("short") / "whole")


def require_resumed(build: Killed, snapshots: Snapshots) -> None:
    """The last run went on after the newest stored step, or after one whose storing was not seen to end."""
    resumed = [line for line in build.report.lines if line.startswith("resumed after step")]
    assert snapshots.stored <= int(resumed[-1].split()[3]) <= snapshots.begun, (resumed, snapshots)


@pytest.mark.slow
def test_any_worker_goes_on_from_s3_alone(
    short: Any, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one has an empty cache; it is killed while it stores the child, and a third ends the work."""
    recipe, expected = short
    build = Killed(recipe, s3, tmp_path, monkeypatch)
    build.run(Moment("large/distilled", "tensors", 3))
    newest = require_snapshots_in_time(build.notes)
    assert newest.stored > 0
    assert leftovers(open_location(s3), build.cache)
    shutil.rmtree(build.cache)
    build.run(Moment("large/distilled", "manifest"))
    require_resumed(build, newest)
    index = build.run()
    assert index
    assert weights(s3, index) == expected
    assert leftovers(open_location(s3), build.cache) == []


@pytest.mark.slow
def test_two_builders_at_once_make_every_node_once(
    short: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, expected = short
    store = tmp_path / "store"
    builds = [Killed(recipe, str(store), tmp_path / name, monkeypatch) for name in ("one", "two")]
    notes = tmp_path / "notes"
    with scripted(monkeypatch, notes), ThreadPoolExecutor() as pool:
        indexes = list(pool.map(Killed.build, builds))
    for index in indexes:
        assert weights(str(store), index) == expected
    # What one made, the other found.
    made = [[artifact["reused"] for artifact in index["artifacts"]] for index in indexes]
    assert all(sorted(pair) == [False, True] for pair in zip(*made, strict=True))
    said = [line for build in builds for line in build.report.lines]
    assert any(line.startswith("another builder works on this: waiting") for line in said)
    assert notes.read_text().splitlines().count("step") == STEPS
    for build in builds:
        assert leftovers(open_location(build.store), build.cache) == []


@pytest.mark.slow
def test_twenty_kills_change_no_bit_of_a_family(
    tiny_parent: Path, tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(tiny_parent, tiny_corpus, stages=2)
    expected = whole(recipe, tmp_path / "whole")
    build = Killed(recipe, str(tmp_path / "store"), tmp_path, monkeypatch)
    newest = NO_SNAPSHOTS
    for moment in moments(random.Random(SEED)):
        build.run(moment)
        trained = f"job {moment.job}" in build.notes and moment.job.endswith("distilled")
        if trained and newest.stored:
            require_resumed(build, newest)
        newest = require_snapshots_in_time(build.notes, newest) if trained else NO_SNAPSHOTS
    index = build.run()
    assert index
    assert weights(build.store, index) == expected
    assert leftovers(open_location(build.store), build.cache) == []


@pytest.mark.slow
def test_a_request_to_stop_loses_no_step(short: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, expected = short
    build = Killed(recipe, str(tmp_path / "store"), tmp_path, monkeypatch)
    build.run(Moment("large/distilled", "step", 30, signal="SIGTERM"))
    # Asked when it took the rows of its 30th step, which it drops.
    assert build.notes[-1] == "stored 29"
    index = build.run()
    assert index
    assert build.notes.count("step") == STEPS - 29
    require_resumed(build, Snapshots(29, 29))
    assert weights(build.store, index) == expected


@pytest.mark.slow
def test_kills_while_uploading_to_s3_change_no_bit(
    short: Any, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, expected = short
    build = Killed(recipe, s3, tmp_path, monkeypatch)
    for moment in (
        Moment("parent/signals", "shard", 2),
        Moment("large/distilled", "snapshot", 2, 0.02),
        Moment("large/distilled", "record", 2),
        Moment("large/distilled", "upload", 2),
        Moment("large/distilled", "manifest"),
        Moment("large/evaluated", "manifest"),
    ):
        build.run(moment)
    index = build.run()
    assert index
    assert weights(s3, index) == expected
    assert leftovers(open_location(s3), build.cache) == []
