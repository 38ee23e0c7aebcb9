"""One node a GPU: who comes second waits, says for whom, and goes on when the first has ended."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cascade import node
from cascade.errors import CascadeError
from cascade.family import gpu
from cascade.family.job import Job, RunOptions, StopSignal
from cascade.kinds import Kind
from cascade.report import SILENT
from tests.reports import Recorder
from tests.waiting import wait_until

HOLDER = """
import fcntl, sys
with open(sys.argv[1] + "/cascade-gpu-0.lock", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    print("small/distilled, process 7", file=lock, flush=True)
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(gpu, "LOCKS", tmp_path)
    return tmp_path


@pytest.fixture
def holder(locks: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that is on GPU 0."""
    command = [sys.executable, "-c", HOLDER, str(locks)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_link_in_place_of_the_lock_is_not_followed(locks: Path) -> None:
    other = locks / "other"
    other.write_text("precious")
    (locks / "cascade-gpu-0.lock").symlink_to(other)
    with pytest.raises(CascadeError, match="cannot be opened"), gpu.held("0", "large/pruned", SILENT):
        raise AssertionError
    assert other.read_text() == "precious"


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_the_second_waits_for_the_first_however_that_ends(
    holder: subprocess.Popen[str], end: signal.Signals
) -> None:
    report, entered = Recorder(), threading.Event()

    def second() -> None:
        with gpu.held("0", "large/pruned", report):
            entered.set()

    thread = threading.Thread(target=second)
    thread.start()
    assert wait_until(lambda: bool(report.lines))
    assert report.lines == ["GPU 0 is taken by small/distilled, process 7: waiting for it"]
    assert not entered.is_set()
    holder.send_signal(end)
    thread.join(120)
    assert entered.is_set()


def test_another_gpu_is_free(holder: subprocess.Popen[str]) -> None:
    report = Recorder()
    with gpu.held("1", "large/pruned", report):
        assert report.lines == []


def test_the_lock_says_who_holds_it(locks: Path) -> None:
    for name in ("large/distilled", "large/pruned"):
        with gpu.held("0", name, SILENT):
            assert (locks / "cascade-gpu-0.lock").read_text() == f"{name}, process {os.getpid()}\n"


def test_any_user_of_the_machine_may_take_the_lock(locks: Path) -> None:
    before = os.umask(0o077)
    try:
        with gpu.held("0", "large/pruned", SILENT):
            pass
    finally:
        os.umask(before)
    assert (locks / "cascade-gpu-0.lock").stat().st_mode & 0o777 == 0o666


def job(kind: Kind, folder: Path, device: str) -> Job:
    options = RunOptions(str(folder), str(folder), "run", device, 60.0, False)
    return Job(kind, "tiny", "small", "0" * 64, str(folder / "place"), {}, {}, {}, options)


@pytest.mark.parametrize(
    ("kind", "device", "needed"),
    [
        (Kind.DISTILLED, "cuda:0", True),
        (Kind.PRUNED, "cuda", True),
        (Kind.DISTILLED, "cpu", False),
        (Kind.CORPUS, "cuda:0", False),
    ],
)
def test_what_needs_a_gpu(kind: Kind, device: str, needed: bool, tmp_path: Path) -> None:
    assert gpu.needs_gpu(job(kind, tmp_path, device)) is needed


def test_a_node_holds_the_lock_while_it_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Made(Exception):
        """The work was reached."""

    def make(*arguments: Any) -> None:
        with (tmp_path / "cascade-gpu-7.lock").open() as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        raise Made

    monkeypatch.setattr(node, "make", make)
    monkeypatch.setattr(gpu, "gpu_name", lambda device: "7" if device == torch.device("cuda:3") else "?")
    with pytest.raises(Made):
        node.run_job(job(Kind.DISTILLED, tmp_path, "cuda:3"), Recorder(), StopSignal())  # type: ignore[arg-type]
