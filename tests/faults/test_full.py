"""A full disk: the error says so in four parts, nothing half-written counts, and with space it goes on."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from cascade import cli
from cascade.errors import CascadeError
from cascade.storage.artifacts import fetch, fetch_file, problems, publish, require_manifest
from cascade.storage.checkpoints import TrainingCheckpoints
from cascade.storage.locations import Location, open_location
from cascade.storage.manifest import Draft
from tests.e2e.conftest import Command
from tests.faults.disks import KINDS, Disk
from tests.tiny_family import tiny_tree, write_recipe

SMALL, LARGE = 2**18, 2**20


@pytest.fixture(params=KINDS)
def disk(request: pytest.FixtureRequest, work: Path, tmp_path: Path) -> Iterator[Disk]:
    """A disk that takes 256 kB."""
    with KINDS[request.param](tmp_path / "disk", SMALL) as disk:
        yield disk


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A finished work folder of 1 MB."""
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "weights").write_bytes(os.urandom(LARGE))
    return folder


DRAFT = Draft(kind="pruned", key="ab" * 32, family="tiny", stage="a")


def stored_artifact(place: Location, work: Path, tmp_path: Path) -> None:
    publish(work, place, DRAFT)
    assert problems(place) == []


def stored_file(place: Location, work: Path, tmp_path: Path) -> None:
    (place / "x").upload(work / "weights")
    assert (place / "x").read_bytes() == (work / "weights").read_bytes()


def stored_bytes(place: Location, work: Path, tmp_path: Path) -> None:
    (place / "x").write_bytes((work / "weights").read_bytes(), create=True)
    assert (place / "x").size() == LARGE


def stored_checkpoint(place: Location, work: Path, tmp_path: Path) -> None:
    checkpoints, tensors = TrainingCheckpoints(place), {"weight": torch.arange(LARGE // 4)}
    checkpoints.save(2, tensors, {"of": "this run"})
    found = checkpoints.latest(tmp_path)
    assert found is not None
    assert found[0] == {"of": "this run"}
    assert torch.equal(found[1]["weight"], tensors["weight"])


def refusal(action: Callable[[], object]) -> CascadeError:
    """The error of a full disk, whole."""
    with pytest.raises(CascadeError) as caught:
        action()
    error = caught.value
    assert type(error) is CascadeError
    assert not error.retryable
    assert error.value
    assert error.where
    assert "cascade gc" in error.remedy
    return error


@pytest.mark.parametrize("store", [stored_artifact, stored_file, stored_bytes, stored_checkpoint])
def test_what_does_not_fit_is_not_there_and_fits_later(
    store: Callable[[Location, Path, Path], None], disk: Disk, work: Path, tmp_path: Path
) -> None:
    disk.takes_all()
    (disk.folder / "work").mkdir()
    disk.takes(SMALL)
    place = open_location(str(disk.folder / "store/tiny/a/kind/key"))
    error = refusal(lambda: store(place, work, tmp_path))
    assert disk.words in error.what
    # Not even hidden: a disk that stays full because of what did not fit would never be free again.
    assert [entry.path for entry in place.listing() if entry.size > 1000] == []
    assert place.walk() == []
    disk.takes_all()
    store(place, work, tmp_path)


def test_an_older_checkpoint_stays_when_the_newer_one_does_not_fit(disk: Disk, tmp_path: Path) -> None:
    checkpoints = TrainingCheckpoints(open_location(str(disk.folder / "training")))
    checkpoints.save(1, {"weight": torch.zeros(8)}, {"state": "older"})
    refusal(lambda: checkpoints.save(2, {"weight": torch.zeros(LARGE)}, {"state": "newer"}))
    found = checkpoints.latest(tmp_path)
    assert found is not None
    assert found[0] == {"state": "older"}


@pytest.mark.parametrize("whole", [True, False], ids=["artifact", "shard"])
def test_a_full_cache_is_named_and_holds_no_half_of_a_copy(
    whole: bool, disk: Disk, work: Path, s3: str, tmp_path: Path
) -> None:
    disk.takes_all()
    place = open_location(f"{s3}/tiny/a/kind/key")
    manifest, cache = publish(work, place, DRAFT), disk.folder / "cache"
    disk.takes(SMALL)

    def bring() -> Path:
        if whole:
            return fetch(place, cache) / "weights"
        return fetch_file(place, require_manifest(place), "weights", cache)

    error = refusal(bring)
    assert disk.words in error.what
    assert str(disk.folder) in str(error)
    assert [path for path in disk.folder.rglob("*") if path.is_file() and path.stat().st_size > 1000] == []
    disk.takes_all()
    assert bring().read_bytes() == (work / "weights").read_bytes()
    assert manifest.bytes == LARGE + 2


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_outside_of_every_store_is_no_traceback(
    code: int, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(name: str) -> None:
        raise OSError(code, os.strerror(code), "/tmp/job.json")

    monkeypatch.setattr(cli, "load_recipe", full)
    exit_code, said = command("plan", "quickstart")
    assert exit_code == 1
    assert said.startswith("error: ")
    assert "/tmp/job.json" in said
    assert "way out: make room" in said


def test_another_fault_of_the_system_stays_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is ours to mend."""

    def fails(name: str) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(cli, "load_recipe", fails)
    monkeypatch.setattr(sys, "argv", ["cascade", "plan", "quickstart"])
    with pytest.raises(OSError, match="Too many open files"):
        cli.main()


@pytest.mark.slow
def test_a_build_on_a_full_disk_goes_on_when_there_is_room(
    disk: Disk, tiny_parent: Path, tiny_corpus: Path, tmp_path: Path, command: Command
) -> None:
    """Store and scratch files; full again and again, at other moments, and in the end like one with room."""
    tree = tiny_tree(tiny_parent, tiny_corpus)
    tree["stages"] = tree["stages"][:1]
    tree["stages"][0]["distill"]["tokens"] = 4096
    disk.takes_all()
    recipe, cache = str(write_recipe(tmp_path / "recipe.yaml", tree)), str(disk.folder / "cache")
    failures, room = 0, 300_000
    while True:
        disk.takes(room)
        store = disk.folder / "store"
        code, said = command("build", recipe, "--direct", "--store", str(store), "--cache", cache)
        if code == 0:
            break
        failures += 1
        assert code == 1, said
        assert disk.words in said
        assert "way out: make room" in said or "way out: free space" in said
        assert "Traceback" not in said
        room *= 2
    assert failures >= 2
    disk.takes_all()
    assert command("verify", str(store))[0] == 0
    clean = tmp_path / "clean"
    assert command("build", recipe, "--direct", "--store", str(clean))[0] == 0
    (weights,) = clean.glob("tiny/large/distilled/*/model.safetensors")
    assert (store / weights.relative_to(clean)).read_bytes() == weights.read_bytes()
