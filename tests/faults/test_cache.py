"""The cache of a machine does not grow without bound: what is not used goes, what may be in use stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cascade.models.sources import resolve_parent
from cascade.storage import artifacts
from cascade.storage.artifacts import fetch, fetch_file, publish, require_manifest
from cascade.storage.cache import KEPT_DAYS, running_since, tidy, unused
from cascade.storage.locations import open_location
from cascade.storage.manifest import Draft
from cascade.storage.scratch import scratch_folder
from tests.e2e.conftest import Command

DAY = 24 * 3600.0
KEY = "ab" * 32
COPIES = [KEY[:12], f"signals-{KEY[:12]}", "parents/0123456789ab", "gguf/0123456789ab-5.23.0"]


def copy(cache: Path, name: str, days: float) -> Path:
    """A copy of 9 bytes that was used last so many days ago."""
    folder = cache / name
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "weights").write_bytes(b"123456789")
    age(folder, days)
    return folder


def age(folder: Path, days: float) -> None:
    """Make it look used so long ago."""
    os.utime(folder, (time.time() - days * DAY,) * 2)


def found(cache: Path, days: float = KEPT_DAYS) -> set[str]:
    """Names of the copies that would go."""
    return {copy.path.relative_to(cache).as_posix() for copy in unused(cache, days, time.time())}


def test_copies_that_nobody_has_used_go_and_others_stay(tmp_path: Path) -> None:
    for name in COPIES:
        copy(tmp_path, name, KEPT_DAYS + 1)
    copy(tmp_path, "cd" * 6, KEPT_DAYS - 1)
    assert found(tmp_path) == set(COPIES)
    assert {copy.bytes for copy in unused(tmp_path, KEPT_DAYS, time.time())} == {9}
    tidy(tmp_path)
    assert found(tmp_path, 0) == {"cd" * 6}
    assert {path.name for path in tmp_path.iterdir()} == {"cd" * 6, "parents", "gguf"}


def test_nothing_else_in_the_folder_is_touched(tmp_path: Path) -> None:
    """It may be a folder that holds other things, by somebody's choice or mistake."""
    for name in ("latency/0123456789ab", "training", "thesis", "Ab" * 6, ".ssh", "parents", "work/job-x"):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        age(tmp_path / name, 3000)
    (tmp_path / "0123456789ab.txt").write_text("a file")
    age(tmp_path / "0123456789ab.txt", 3000)
    assert found(tmp_path, 0) == set()


def test_halves_of_copies_that_killed_processes_left_go(tmp_path: Path) -> None:
    for name in (f".{KEY[:12]}.0123456789ab", "gguf/.x-5.23.0.0123456789ab"):
        copy(tmp_path, name, 2)
        copy(tmp_path, name.replace("0123456789ab", "fedcba987654"), 0.5)
    assert len(found(tmp_path, 0)) == 2


def test_what_was_used_in_the_last_day_stays_whatever_is_asked_for(tmp_path: Path) -> None:
    copy(tmp_path, KEY[:12], 0.9)
    assert found(tmp_path, 0) == set()


def test_what_a_running_node_may_use_stays_however_long_it_runs(tmp_path: Path) -> None:
    """It takes its inputs after it has made its scratch folder."""
    copy(tmp_path, KEY[:12], 49)
    copy(tmp_path, "cd" * 6, 51)
    scratch = tmp_path / "work" / "distilled-x"
    scratch.mkdir(parents=True)
    age(scratch, 50)
    assert found(tmp_path) == {"cd" * 6}


def test_a_node_that_ends_while_it_is_looked_at_is_no_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "work" / "distilled-x"
    scratch.mkdir(parents=True)
    listed = [scratch.with_name("ended"), scratch]
    monkeypatch.setattr("cascade.storage.cache.children", lambda folder: listed)
    assert running_since(tmp_path) == scratch.stat().st_mtime


# A process that dies in the middle of a download.
KILLED = """
import os, signal, sys
from pathlib import Path
from cascade.storage.artifacts import fetch, fetch_file, require_manifest
from cascade.storage.locations import open_location
from cascade.storage.s3 import S3Store

place, cache = open_location(sys.argv[1]), Path(sys.argv[2])

def die(store, path, target, size):
    target.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)

S3Store.download = die
{bring}
"""
BRINGING = {
    "artifact": "fetch(place / 'x', cache)",
    "shard": "fetch_file(place / 'x', require_manifest(place / 'x'), 'weights', cache / 'signals-0')",
    "parent": "from cascade.models import sources as s; s.resolve_parent(place.uri + '/parent', cache=cache)",
}


@pytest.mark.parametrize("copied", ["artifact", "shard", pytest.param("parent", marks=pytest.mark.slow)])
def test_halves_of_files_that_a_killed_process_was_bringing_go_at_once(
    copied: str, s3: str, tiny_parent: Path, tmp_path: Path
) -> None:
    """Folders of shards and parents are used for long, so nothing in them would ever be too old."""
    made, cache, place = tmp_path / "made", tmp_path / "cache", open_location(s3)
    made.mkdir()
    (made / "weights").write_text("weights")
    publish(made, place / "x", Draft(kind="pruned", key=KEY, family="tiny", stage="a"))
    for path in tiny_parent.iterdir():
        (place / "parent" / path.name).upload(path)
    script = KILLED.format(bring=BRINGING[copied])
    died = subprocess.run([sys.executable, "-c", script, s3, str(cache)], check=False)
    assert died.returncode == -signal.SIGKILL
    assert [path.read_bytes() for path in files(cache) if path.name != ".lock"] == [b"half"]
    with scratch_folder(cache, "next"):
        pass
    assert files(cache) == []


def files(folder: Path) -> list[Path]:
    """All in the folder, at any depth."""
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("whole", [True, False], ids=["artifact", "shard"])
def test_using_a_copy_keeps_it(whole: bool, s3: str, tmp_path: Path) -> None:
    work, cache = tmp_path / "work", tmp_path / "cache"
    work.mkdir()
    (work / "weights").write_text("weights")
    place = open_location(f"{s3}/x")
    manifest = publish(work, place, Draft(kind="pruned", key=KEY, family="tiny", stage="a"))

    def use() -> Path:
        if whole:
            return fetch(place, cache)
        return fetch_file(place, require_manifest(place), "weights", cache / f"signals-{KEY[:12]}").parent

    folder = use()
    age(folder, 40)
    artifacts._verified.clear()
    assert len(found(cache)) == 1
    assert use() == folder
    assert found(cache) == set()
    assert manifest.key == KEY


def test_using_a_parent_in_a_bucket_keeps_its_copy(s3: str, tiny_parent: Path, tmp_path: Path) -> None:
    for path in tiny_parent.iterdir():
        (open_location(s3) / path.name).upload(path)
    folder = resolve_parent(s3, cache=tmp_path).described_by
    age(folder, 40)
    assert len(found(tmp_path)) == 1
    assert resolve_parent(s3, cache=tmp_path).described_by == folder
    assert found(tmp_path) == set()


def test_a_copy_that_went_is_brought_again(s3: str, tmp_path: Path) -> None:
    work, cache = tmp_path / "work", tmp_path / "cache"
    work.mkdir()
    (work / "weights").write_text("weights")
    publish(work, open_location(f"{s3}/x"), Draft(kind="pruned", key=KEY, family="tiny", stage="a"))
    age(fetch(open_location(f"{s3}/x"), cache), 40)
    tidy(cache)
    assert (fetch(open_location(f"{s3}/x"), cache) / "weights").read_text() == "weights"


def test_the_command_lists_the_cache_and_with_delete_clears_it(command: Command, tmp_path: Path) -> None:
    store, cache = tmp_path / "store", tmp_path / "cache"
    store.mkdir()
    old = copy(cache, KEY[:12], 40)
    code, said = command("gc", str(store))
    assert code == 0, said
    assert "copy in the cache" in said
    assert str(old) in said.replace("\n", "")
    assert old.exists()
    assert command("gc", str(store), "--keep-days", "50", "--delete")[0] == 0
    assert old.exists()
    assert command("gc", str(store), "--delete")[0] == 0
    assert not old.exists()
