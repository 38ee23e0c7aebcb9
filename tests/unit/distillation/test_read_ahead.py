"""Shards are brought before they are asked for, checked, and dropped when they are behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from cascade.distillation.signals import ReadAhead, reading
from cascade.errors import IntegrityError, StorageFault
from cascade.storage.artifacts import fetch_file, publish, require_manifest
from cascade.storage.locations import Location, open_location
from cascade.storage.manifest import Draft

NAMES = [f"train-{number:05d}.safetensors" for number in range(6)]


def artifact(store: Location, folder: Path) -> Location:
    folder.mkdir()
    for name in NAMES:
        (folder / name).write_text(name)
    place = store / "artifact"
    publish(folder, place, Draft(kind="signals", key="a" * 64, family="f", stage="parent"))
    return place


@contextmanager
def reader(place: Location, folder: Path, *, keep: bool) -> Iterator[ReadAhead]:
    shards = ReadAhead(place, require_manifest(place), folder, NAMES, keep=keep)
    try:
        yield shards
    finally:
        shards.close()


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return condition()


def here(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("train-*"))


def test_what_comes_next_is_brought_and_what_is_behind_is_dropped(s3: str, tmp_path: Path) -> None:
    place, folder = artifact(open_location(s3), tmp_path / "made"), tmp_path / "cache"
    with reader(place, folder, keep=False) as shards:
        assert eventually(lambda: here(folder) == NAMES[:3])
        for number, name in enumerate(NAMES):
            assert shards.path(name).read_text() == name
            wanted = NAMES[max(0, number - 1) : number + 1 + reading.AHEAD]
            assert eventually(lambda: set(here(folder)) >= set(wanted))  # noqa: B023
            assert len(here(folder)) <= 2 + reading.AHEAD + 1
        assert eventually(lambda: NAMES[0] not in here(folder))
        # Going back is possible.
        assert shards.path(NAMES[0]).read_text() == NAMES[0]


def test_all_is_kept_where_it_may_be_asked_for_in_any_order(s3: str, tmp_path: Path) -> None:
    place, folder = artifact(open_location(s3), tmp_path / "made"), tmp_path / "cache"
    with reader(place, folder, keep=True) as shards:
        assert shards.path(NAMES[4]).read_text() == NAMES[4]
        # The rest of the order, then its beginning.
        assert eventually(lambda: here(folder) == NAMES)
    before = {name: (folder / name).stat().st_mtime_ns for name in NAMES}
    with reader(place, folder, keep=True) as shards:
        assert [shards.path(name).read_text() for name in NAMES] == NAMES
    assert {name: (folder / name).stat().st_mtime_ns for name in NAMES} == before


def test_files_of_a_local_store_are_neither_copied_nor_removed(tmp_path: Path) -> None:
    place = artifact(Location(str(tmp_path / "store")), tmp_path / "made")
    with reader(place, tmp_path / "cache", keep=False) as shards:
        for name in NAMES:
            assert shards.path(name) == place.local_path / name if place.local_path else None
    assert not (tmp_path / "cache").exists()
    assert here(tmp_path / "store" / "artifact") == NAMES


def test_a_damaged_shard_is_named_when_it_is_asked_for(s3: str, tmp_path: Path) -> None:
    place, folder = artifact(open_location(s3), tmp_path / "made"), tmp_path / "cache"
    (place / NAMES[1]).write_bytes(b"x" * len(NAMES[1]))
    with reader(place, folder, keep=True) as shards:
        assert shards.path(NAMES[0]).read_text() == NAMES[0]
        with pytest.raises(IntegrityError) as caught:
            shards.path(NAMES[1])
        assert NAMES[1] in caught.value.where
        assert shards.path(NAMES[2]).read_text() == NAMES[2]


def test_a_damaged_copy_is_brought_again(s3: str, tmp_path: Path) -> None:
    place, folder = artifact(open_location(s3), tmp_path / "made"), tmp_path / "cache"
    folder.mkdir()
    (folder / NAMES[0]).write_text("half")
    assert fetch_file(place, require_manifest(place), NAMES[0], folder).read_text() == NAMES[0]


def test_a_fault_in_the_background_is_tried_again_when_the_shard_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = artifact(Location(str(tmp_path / "store")), tmp_path / "made")
    failed = threading.Event()

    def flaky(*arguments: object) -> Path:
        if arguments[2] == NAMES[1] and not failed.is_set():
            failed.set()
            raise StorageFault("the network is down", where="here", remedy="none")
        return fetch_file(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(reading, "fetch_file", flaky)
    with reader(place, tmp_path / "cache", keep=True) as shards:
        assert failed.wait(60)
        assert shards.path(NAMES[1]).read_text() == NAMES[1]


def test_only_waiting_counts_as_waited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file takes ten seconds of this clock; the first is waited for, the others come meanwhile."""
    place = artifact(Location(str(tmp_path / "store")), tmp_path / "made")
    asked, now = threading.Event(), [0.0]

    def monotonic() -> float:
        found = now[0]
        asked.set()
        return found

    def slow(*arguments: object) -> Path:
        assert asked.wait(60)
        now[0] += 10
        return fetch_file(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(reading, "fetch_file", slow)
    monkeypatch.setattr(reading, "time", SimpleNamespace(monotonic=monotonic))
    with reader(place, tmp_path / "cache", keep=True) as shards:
        shards.path(NAMES[0])
        first = shards.waited
        assert first >= 10
        assert eventually(lambda: now[0] == 10 * len(NAMES))
        assert eventually(lambda: len(shards._here) == len(NAMES))
        for name in NAMES:
            shards.path(name)
        assert shards.waited == first
