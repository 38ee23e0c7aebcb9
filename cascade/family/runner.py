"""Run one node in a process of its own, or find that it is done."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from cascade.errors import CascadeError, Interrupted, MachineFault, from_record
from cascade.family.job import KILL_SECONDS, Job
from cascade.report import Report
from cascade.storage.artifacts import read_manifest
from cascade.storage.manifest import Manifest
from cascade.storage.scratch import scratch_folder

# Lines of a node's own output that are shown when it dies without a word.
LAST_WORDS = 20


@dataclass(frozen=True)
class Outcome:
    """A finished node: its manifest, and whether it had been there before."""

    manifest: Manifest
    reused: bool


class NodeHost:
    """Runs one job after another, each in a process that `cascade.node` forks for it.

    Starting a process costs seconds, most of them imports; the one that forks has done them. Use it as a
    context manager: on leaving, nothing of it is left running.
    """

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> NodeHost:
        return self

    def __exit__(self, *exception: object) -> None:
        self._close()

    def run(
        self, job: Job, report: Report, slot: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> Outcome:
        """Make the job's artifact unless its manifest exists. slot: what is held while it is made.

        Raises the node's own error, Interrupted when it was asked to stop, MachineFault when it was killed.
        """
        manifest = read_manifest(job.location)
        if manifest:
            return Outcome(manifest, reused=True)
        done = False
        try:
            with scratch_folder(Path(job.options.cache), "job") as folder:
                path = folder / "job.json"
                path.write_text(job.dump(), encoding="utf-8")
                with slot():
                    self._make(job, self._send(path), report)
            done = True
        finally:
            if not done:
                self._close()
        manifest = made_by(job)
        # Another build may have made it while this one waited.
        return Outcome(manifest, reused=manifest.run != job.options.run)

    def _send(self, path: Path) -> subprocess.Popen[str]:
        """Hand the job to the process that waits, or to a new one."""
        if self._process is None or self._process.poll() is not None:
            self._close()
            command = [sys.executable, "-m", "cascade.node", "--serve", str(os.getpid())]
            self._process = self._stack.enter_context(node_process(command))
        # One that has just died is found out by whoever listens.
        with suppress(BrokenPipeError):
            _pipe(self._process.stdin).write(f"{path}\n")
            _pipe(self._process.stdin).flush()
        return self._process

    def _make(self, job: Job, process: subprocess.Popen[str], report: Report) -> None:
        with no_stop_lost(process):
            code, error, words = _listen(process, report)
        if error:
            raise error
        if code is None:
            code = process.wait()
        if code != 0:
            raise _failure(job, code, words)

    def _close(self) -> None:
        self._process = None
        self._stack.close()


def run_node(job: Job, report: Report) -> Outcome:
    """Run a single job; see `NodeHost.run`."""
    with NodeHost() as host:
        return host.run(job, report)


def made_by(job: Job) -> Manifest:
    """The manifest of a job that has ended well; raises CascadeError when there is none."""
    manifest = read_manifest(job.location)
    if manifest is None:
        raise CascadeError(
            "the node ended well but published nothing",
            value=job.name,
            where=job.uri,
            remedy="run the same command again; if it stays so, somebody else removes what is stored",
        )
    return manifest


def _failure(job: Job, code: int, words: list[str]) -> CascadeError:
    """Why a process ended with this code, when it could not say so itself."""
    if code == Interrupted.exit_code:
        remedy = "run the same command to go on"
        return Interrupted("the node was asked to stop", where=job.name, remedy=remedy)
    detail = "\n".join(f"    {line}" for line in words)
    if code < 0:
        return MachineFault(
            f"the node was killed by {signal.Signals(-code).name}",
            where=job.name,
            remedy="run the same command to go on; SIGKILL often means that memory ran out"
            + f"\n{detail}".rstrip(),
        )
    return CascadeError(
        f"the node failed with exit code {code}:\n{detail}",
        where=job.name,
        remedy="the lines above say what failed; mended, the same command goes on from what is stored",
    )


@contextmanager
def node_process(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A process in a session of its own; however the block ends, nothing of it is left running.

    Standard error goes into the same pipe: an inherited one would keep a killed orchestrator's
    streams open, and Prefect would take the flow for running.
    """
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    # A child that the node left behind would hold the pipe, and we would listen to it for ever.
    sweeper = threading.Thread(target=_sweep, args=[process], daemon=True)
    sweeper.start()
    try:
        yield process
    finally:
        _end(process)
        sweeper.join()


def _sweep(process: subprocess.Popen[str]) -> None:
    """When the node has ended, however it did, SIGKILL what is left of its process group."""
    process.wait()
    _signal_group(process, signal.SIGKILL)


def _end(process: subprocess.Popen[str]) -> None:
    """SIGTERM, time to save a snapshot, SIGKILL: to the whole process group."""
    try:
        if process.poll() is None:
            _signal_group(process, signal.SIGTERM)
            # Drains the pipe, so that a node that still reports cannot block on it.
            process.communicate(timeout=KILL_SECONDS)
    except subprocess.TimeoutExpired:
        pass
    finally:
        # A second Ctrl-C ends the waiting, not the killing.
        _signal_group(process, signal.SIGKILL)
        process.wait()
        _pipe(process.stdout).close()
        with suppress(BrokenPipeError):
            _pipe(process.stdin).close()


def _signal_group(process: subprocess.Popen[str], number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _pipe(stream: IO[str] | None) -> IO[str]:
    """One of the two pipes to the node."""
    if stream is None:
        raise ValueError("the process was started without pipes")
    return stream


@contextmanager
def no_stop_lost(process: subprocess.Popen[str]) -> Iterator[None]:
    """Raise after the block a request to stop that a finaliser swallowed; the process is stopped at once.

    SIGTERM and SIGINT raise wherever the main thread happens to be, and Python drops what is raised inside a
    finaliser ("Exception ignored in ..."): the build would go on. Handlers of our own would not do, because
    Prefect acknowledges a cancel only while its own is installed.
    """
    swallowed: list[BaseException] = []
    killer = threading.Timer(KILL_SECONDS, _signal_group, (process, signal.SIGKILL))
    killer.daemon = True
    before = sys.unraisablehook

    def on_unraisable(event: Any) -> None:
        error = event.exc_value
        if error is None or isinstance(error, Exception):
            before(event)
            return
        if not swallowed:
            killer.start()
        swallowed.append(error)
        _signal_group(process, signal.SIGTERM)

    sys.unraisablehook = on_unraisable
    try:
        yield
    finally:
        sys.unraisablehook = before
        killer.cancel()
    if swallowed:
        raise swallowed[0]


def _listen(
    process: subprocess.Popen[str], report: Report
) -> tuple[int | None, CascadeError | None, list[str]]:
    """Forward events until the job's process has ended, or until the pipe closes.

    Returns the job's exit code, None if nobody was left to say it; the node's error; its last plain lines.
    """
    error: CascadeError | None = None
    words: deque[str] = deque(maxlen=LAST_WORDS)
    for line in _pipe(process.stdout):
        event = _event(line)
        if not line.strip():
            continue
        if event is None:
            words.append(line.rstrip())
        elif event["event"] == "error":
            error = from_record(event["error"])
        elif event["event"] == "exit":
            return event["code"], error, list(words)
        else:
            HANDLERS[event["event"]](report, event)
    return None, error, list(words)


def _event(line: str) -> dict[str, Any] | None:
    """The event in a line, or None for a line that some library printed."""
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and event.get("event") in (*HANDLERS, "error", "exit") else None


def _forward_log(report: Report, event: dict[str, Any]) -> None:
    report.log(event["message"])


def _forward_progress(report: Report, event: dict[str, Any]) -> None:
    report.progress(event["done"], event["total"], event["unit"], **event["figures"])


def _forward_done(report: Report, event: dict[str, Any]) -> None:
    report.log(f"made in {event['seconds']:.1f} s; stored {event['bytes'] / 1e6:,.1f} MB")


HANDLERS: dict[str, Callable[[Report, dict[str, Any]], None]] = {
    "log": _forward_log,
    "progress": _forward_progress,
    "done": _forward_done,
}
