"""`python -m cascade.node JOB.json`: the one process that runs a node of the graph.

It writes JSON lines to standard output and ends with 0 (published), 1 (failed), 2 (wrong input) or 75
(checkpointed, run me again). torchrun and a Kubernetes job start it so. The command line and a Prefect task
run many nodes and start `python -m cascade.node --serve PARENT`: it imports once what takes seconds, and for
every job named on its standard input forks a process that does just the same, whose exit code it reports. So
a node's memory is free when the node has ended. PARENT is the process id of the orchestrator, which no part
of it outlives.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from cascade.errors import CascadeError, Interrupted, MachineFault

# What loads torch is imported once the node is tied to its parent.
if TYPE_CHECKING:
    from cascade.family.job import Job, JsonReport, StopSignal

SERVE = "--serve"
STOPS = (signal.SIGTERM, signal.SIGHUP)
PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int, number: signal.Signals) -> None:
    """Ask the kernel for a signal when the parent dies; ends the process if it is dead already."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        sys.exit(Interrupted.exit_code)


def run_job(job: Job, report: JsonReport, stop: StopSignal) -> None:
    """Do the work in a scratch folder and publish what it left there."""
    from cascade.family.work import WORK
    from cascade.family.workplace import Workplace
    from cascade.storage.artifacts import publish

    start = time.monotonic()
    Path(job.options.cache).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{job.kind}-", dir=job.options.cache) as scratch:
        place = Workplace(job, Path(scratch), report, stop)
        with place.leaving:
            result = WORK[job.kind](place)
        manifest = publish(
            place.folder, job.location, place.draft(result, time.monotonic() - start), report=report
        )
        result.after_publish()
    report.send("done", bytes=manifest.bytes, seconds=manifest.seconds)


def explained(error: Exception, job: Job) -> CascadeError | None:
    """The error in our terms: out of memory, or a full disk; None for what only a traceback explains."""
    import torch

    if isinstance(error, CascadeError):
        return error
    # Rust and C++ libraries wrap the kernel's error in types of their own and keep its words.
    first_line = (str(error).splitlines() or [""])[0]
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or os.strerror(errno.ENOMEM) in first_line:
        return MachineFault(
            "memory ran out",
            value=first_line or type(error).__name__,
            where=job.name,
            remedy="free memory, or take a machine or device with more; run the same command to go on",
        )
    if any(os.strerror(code) in first_line for code in (errno.ENOSPC, errno.EDQUOT)):
        # A failed write does not say its file; scratch files lie in the cache.
        path = Path(getattr(error, "filename", None) or job.options.cache)
        return CascadeError(
            "the disk is full",
            value=path,
            where=f"{job.name}, on the disk mounted at {mount_point(path)}",
            remedy="free space there, or give a folder on another disk; run the same command to go on",
        )
    return None


def mount_point(path: Path) -> Path:
    """The root of the file system that holds the path."""
    return next(folder for folder in (path, *path.absolute().parents) if os.path.ismount(folder))


def main() -> int:
    """Run the job named on the command line, or serve those named on standard input."""
    if sys.argv[1] == SERVE:
        return serve(int(sys.argv[2]))
    return run_file(sys.argv[1])


def run_file(path: str) -> int:
    """Run the job in a file; its exit code."""
    from cascade.family.job import JsonReport, StopSignal, load_job

    stop = StopSignal()
    stop.listen()
    # Libraries print to standard output; only the report may write to the pipe.
    report = JsonReport(os.fdopen(os.dup(1), "w", encoding="utf-8"))
    os.dup2(2, 1)
    return run_explained(load_job(Path(path).read_text(encoding="utf-8")), report, stop)


def serve(parent: int) -> int:
    """Fork a process for every job named on standard input; ends with it, or when asked to.

    The server itself computes nothing: the threads of a library that has would be missing in its children.
    """
    die_with_parent(parent, signal.SIGHUP)
    asked = Asked()
    import cascade.family.work  # noqa: F401

    while not asked.to_stop and (path := sys.stdin.readline().strip()):
        # A request to stop that comes between the fork and the next lines waits for them.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
        asked.child = os.fork()
        if asked.child == 0:
            os._exit(child(path))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
        code = os.waitstatus_to_exitcode(os.waitpid(asked.child, 0)[1])
        asked.child = None
        # What the child wrote last may lack the end of its line.
        print("\n" + json.dumps({"event": "exit", "code": code}), flush=True)
    return Interrupted.exit_code if asked.to_stop else 0


class Asked:
    """Requests to stop reach the whole process group: the child saves and ends, then the server does.

    SIGHUP says that the orchestrator died, and reaches the server alone.
    """

    def __init__(self) -> None:
        self.to_stop = False
        self.child: int | None = None
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGHUP, lambda number, frame: os.killpg(0, signal.SIGTERM))

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.to_stop = True
        if self.child is None:
            sys.exit(Interrupted.exit_code)


def child(path: str) -> int:
    """A forked process's work; its exit code. It must not run what the server has open behind it."""
    for number in STOPS:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
    code = 1
    try:
        code = run_file(path)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        # Nobody may be left to read it.
        with suppress(BrokenPipeError):
            stream.flush()
    return code


def run_explained(job: Job, report: JsonReport, stop: StopSignal) -> int:
    """Run one job; its exit code. An error of ours goes through the report, any other is a traceback."""
    try:
        run_job(job, report, stop)
    except Exception as raised:
        error = explained(raised, job)
        if error is None:
            raise
        report.send("error", error=error.record(), exit_code=error.exit_code)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
