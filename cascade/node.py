"""`python -m cascade.node JOB.json [PARENT]`: the one process that runs a node of the graph.

The command line, a Prefect task, torchrun and a Kubernetes job all start this. It writes JSON lines to
standard output and ends with 0 (published), 1 (failed), 2 (wrong input) or 75 (checkpointed, run me again).
PARENT is the process id of an orchestrator; the node does not outlive it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from cascade.errors import CascadeError, Interrupted, MachineFault

# What loads torch is imported once the node is tied to its parent.
if TYPE_CHECKING:
    from cascade.family.job import Job, JsonReport, StopSignal

PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Ask the kernel for SIGTERM when the parent dies; ends the process if it is dead already."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
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
    """Run the job named on the command line, and after light work those named on standard input."""
    if len(sys.argv) > 2:
        die_with_parent(int(sys.argv[2]))
    from cascade.family.job import LIGHT, JsonReport, StopSignal, load_job

    stop = StopSignal()
    stop.listen()
    # Libraries print to standard output; only the report may write to the pipe.
    report = JsonReport(os.fdopen(os.dup(1), "w", encoding="utf-8"))
    os.dup2(2, 1)
    path = sys.argv[1]
    while path:
        job = load_job(Path(path).read_text(encoding="utf-8"))
        code = run_explained(job, report, stop)
        if code != 0 or job.kind not in LIGHT:
            return code
        path = sys.stdin.readline().strip()
    return 0


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
