"""What killed builds left is removed once what it was for is there; what may be alive stays."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cascade.family.job import Job, RunOptions
from cascade.family.leftovers import QUIET_SECONDS, clear_leftovers
from cascade.kinds import Kind
from cascade.storage.local import hidden_sibling
from cascade.storage.locations import Location, open_location


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    """An empty place of each kind."""
    return open_location(str(tmp_path) if request.param == "folder" else request.getfixturevalue("s3"))


def job(store: Location, kind: Kind, stage: str, key: str) -> Job:
    options = RunOptions(store.uri, "cache", "run", "", 60.0, False)
    return Job(kind, "tiny", stage, key * 64, "place", {}, {}, {}, options)


def test_unfinished_work_of_what_is_done_is_removed(store: Location) -> None:
    done = [
        job(store, Kind.DISTILLED, "large", "a"),
        job(store, Kind.SIGNALS, "parent", "b"),
        job(store, Kind.EVALUATED, "large", "c"),
    ]
    assert done[1].training.uri == f"{store.uri}/shared/training/{'b' * 12}"
    other = job(store, Kind.DISTILLED, "large", "d")
    for left in (*done[:2], other):
        (left.training / "step-00000001/record.json").write_bytes(b"{}")
    clear_leftovers(done, store / "tiny")
    assert store.walk() == [f"tiny/large/training/{'d' * 12}/step-00000001/record.json"]


def test_half_written_files_are_removed_once_they_are_quiet(tmp_path: Path) -> None:
    folder = tmp_path / "tiny" / "large"
    folder.mkdir(parents=True)
    quiet, busy, lock = (
        hidden_sibling(folder / "weights"),
        hidden_sibling(folder / "weights"),
        folder / ".publishing.lock",
    )
    for path in (quiet, busy, lock):
        path.write_bytes(b"half")
    for path in (quiet, lock):
        os.utime(path, (0, path.stat().st_mtime - QUIET_SECONDS - 60))
    clear_leftovers([], open_location(str(tmp_path / "tiny")))
    assert sorted(folder.iterdir()) == sorted([busy, lock])


def test_a_file_that_another_build_finishes_meanwhile_is_no_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = (str(tmp_path), [], [hidden_sibling(tmp_path / "weights").name])
    monkeypatch.setattr("cascade.family.leftovers.os.walk", lambda folder: [listed])
    clear_leftovers([], open_location(str(tmp_path)))
