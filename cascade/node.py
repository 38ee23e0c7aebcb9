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
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from cascade.collector import imports_that_stay
from cascade.errors import CascadeError, Interrupted, MachineFault

# What loads torch is imported once the node is tied to its parent.
if TYPE_CHECKING:
    from cascade.family.job import Job, JsonReport, StopSignal
    from cascade.storage.lease import Lease
    from cascade.storage.manifest import Manifest

SERVE = "--serve"
STOPS = (signal.SIGTERM, signal.SIGHUP)
WAKES = (*STOPS, signal.SIGCHLD)
PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int, number: signal.Signals) -> None:
    """Ask the kernel for a signal when the parent dies; ends the process if it is dead already."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        sys.exit(Interrupted.exit_code)


def run_job(job: Job, report: JsonReport, stop: StopSignal) -> None:
    """Do the work in a scratch folder and publish what it left there; of several builders one at a time."""
    from cascade.family.gpu import gpu_held
    from cascade.storage.artifacts import read_manifest
    from cascade.storage.lease import Lease
    from cascade.storage.patience import waits_told
    from cascade.storage.scratch import scratch_folder, temporary_files_in

    def give_up() -> None:
        report.log("another builder has taken this work over: it is left to that one")
        os._exit(Interrupted.exit_code)

    with (
        waits_told(report),
        scratch_folder(Path(job.options.cache), job.kind) as scratch,
        temporary_files_in(scratch),
        Lease(job.training, report, give_up) as lease,
    ):
        if not read_manifest(job.location):
            with gpu_held(job, report):
                manifest = make(job, scratch, report, stop, lease)
            report.send("done", bytes=manifest.bytes, seconds=manifest.seconds)
        lease.finish()


def make(job: Job, scratch: Path, report: JsonReport, stop: StopSignal, lease: Lease) -> Manifest:
    """Do the work and publish it; nobody else is at it."""
    from cascade.family.work import WORK
    from cascade.family.workplace import Workplace
    from cascade.storage.artifacts import publish

    start = time.monotonic()
    place = Workplace(job, scratch, report, stop)
    with place.leaving:
        result = WORK[job.kind](place)
    draft = place.draft(result, time.monotonic() - start)
    return publish(place.folder, job.location, draft, report=report, lease=lease)


def explained(error: Exception, job: Job) -> CascadeError | None:
    """The error in our terms: out of memory, or a full disk; None for what only a traceback explains."""
    import torch

    from cascade.storage.faults import DISK_FULL

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
    for what in (what for code, what in DISK_FULL.items() if os.strerror(code) in first_line):
        # A failed write does not say its file; scratch files lie in the cache.
        path = Path(getattr(error, "filename", None) or job.options.cache)
        return CascadeError(
            what,
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
        # Python takes seconds to end with torch in it, and whoever cancels a build waits for that.
        os._exit(exit_code(lambda: serve(int(sys.argv[2]))))
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
    with imports_that_stay():
        import cascade.family.work  # noqa: F401

    while not asked.to_stop and (path := sys.stdin.readline().strip()):
        # Until the job's end is told, signals are waited for: one that is handled just before a wait for the
        # child begins would not end that wait.
        signal.pthread_sigmask(signal.SIG_BLOCK, WAKES)
        job = os.fork()
        if job == 0:
            os._exit(child(path))
        code = asked.end_of(job)
        # What the child wrote last may lack the end of its line.
        print("\n" + json.dumps({"event": "exit", "code": code}), flush=True)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, WAKES)
    return Interrupted.exit_code if asked.to_stop else 0


class Asked:
    """Requests to stop reach the whole process group: the child saves and ends, then the server does.

    SIGHUP says that the orchestrator died, and reaches the server alone.
    """

    def __init__(self) -> None:
        self.to_stop = False
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(Interrupted.exit_code))
        signal.signal(signal.SIGHUP, lambda number, frame: os.killpg(0, signal.SIGTERM))
        # A signal that nobody handles may be dropped while it is blocked.
        signal.signal(signal.SIGCHLD, lambda number, frame: None)

    def end_of(self, job: int) -> int:
        """A child's exit code when it has ended; notes requests to stop meanwhile. WAKES are blocked."""
        while True:
            number = signal.sigwait(WAKES)
            if number == signal.SIGTERM:
                self.to_stop = True
            elif number == signal.SIGHUP:
                os.killpg(0, signal.SIGTERM)
            else:
                ended, status = os.waitpid(job, os.WNOHANG)
                if ended:
                    return os.waitstatus_to_exitcode(status)


def child(path: str) -> int:
    """A forked process's work; its exit code. It must not run what the server has open behind it."""
    for number in WAKES:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, WAKES)
    return exit_code(lambda: run_file(path))


def exit_code(work: Callable[[], int]) -> int:
    """Of work after which `os._exit` ends the process; what it has written is flushed."""
    code = 1
    try:
        code = work()
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
