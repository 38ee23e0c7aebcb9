"""Processes that end with the one that started them, and are asked before they are killed."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from cascade.errors import CascadeError
from cascade.node import die_with_parent

PR_SET_CHILD_SUBREAPER = 36
POLL_SECONDS = 0.1
# The kernel may need a moment for a process that it has killed.
KILL_SECONDS = 5.0
# Of a log, when its process dies.
LAST_LINES = 30

# The kernel sends the signal when the thread that started the process ends, however it did.
BOUND = (
    "import ctypes, os, sys\n"
    "libc = ctypes.CDLL(None)\n"
    "if hasattr(libc, 'prctl'):\n"
    "    libc.prctl(1, int(sys.argv[2]))\n"
    "if os.getppid() != int(sys.argv[1]):\n"
    "    sys.exit(1)\n"
    "os.execv(sys.argv[3], sys.argv[3:])\n"
)


class Service:
    """A process in a session of its own that writes to a log; `with` ends it.

    command: its first word is a path. orphaned: what the kernel sends it when this process is killed.
    grace: seconds from SIGTERM to SIGKILL, which goes to its whole process group.
    """

    def __init__(
        self,
        name: str,
        command: list[str],
        environment: Mapping[str, str],
        log: Path,
        *,
        orphaned: signal.Signals = signal.SIGKILL,
        grace: float = 15.0,
    ) -> None:
        self.name, self.log, self.grace = name, log, grace
        if log.exists():
            # Why the last one ended may be asked after the next has begun.
            log.replace(log.with_suffix(".log.1"))
        with log.open("wb") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-c", BOUND, str(os.getpid()), str(int(orphaned)), *command],
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> Service:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def runs(self) -> bool:
        """Whether it has not ended."""
        return self.process.poll() is None

    @property
    def killed(self) -> bool:
        """Whether a signal has ended it, which leaves no time to end what it has started."""
        code = self.process.poll()
        return code is not None and code < 0

    def require_running(self) -> None:
        """Raise CascadeError, with the end of its log, if it has ended."""
        if not self.runs:
            raise self.failed(f"{self.name} has ended with exit code {self.process.returncode}")

    def failed(self, what: str) -> CascadeError:
        """An error with the end of the log."""
        lines = self.log.read_text(errors="replace").splitlines()[-LAST_LINES:]
        shown = "".join(f"\n    {line}" for line in lines)
        return CascadeError(f"{what}{shown}", where=str(self.log), remedy="the log says more")

    def wait_until(self, ready: Callable[[], bool], seconds: float) -> None:
        """Wait until it is ready; CascadeError if it ends before or takes longer."""
        deadline = time.monotonic() + seconds
        while not ready():
            self.require_running()
            if time.monotonic() > deadline:
                raise self.failed(f"{self.name} was not ready in {seconds:.0f} s")
            time.sleep(POLL_SECONDS)

    def stop(self) -> None:
        """SIGTERM, time to end, SIGKILL to what is left of its process group."""
        try:
            if self.runs:
                self.process.send_signal(signal.SIGTERM)
                self.process.wait(self.grace)
        except subprocess.TimeoutExpired:
            pass
        finally:
            # A second Ctrl-C ends the waiting, not the killing.
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def in_keeper() -> None:
    """Go on in a forked process, the keeper; the first one passes signals on and ends as the keeper ends.

    The keeper is asked to stop (SIGTERM) when the first process is killed, so even then it ends all that it
    started in good order. What its descendants leave behind becomes its own.
    """
    forwarded = (signal.SIGINT, signal.SIGTERM)
    sys.stdout.flush()
    signal.pthread_sigmask(signal.SIG_BLOCK, forwarded)
    parent, child = os.getpid(), os.fork()
    if child:
        for number in forwarded:
            signal.signal(number, lambda number, frame: os.kill(child, number))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, forwarded)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        sys.exit(code if code >= 0 else 128 - code)
    os.setsid()
    # A shell that starts us in the background has it ignored, and the first process passes it on regardless.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    die_with_parent(parent, signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, forwarded)


class Entry(NamedTuple):
    """A row of the kernel's table of processes. ended: whether only its parent has not heard of its end."""

    parent: int
    ended: bool


def process_table() -> dict[int, Entry]:
    """This machine's processes by their ids; none where there is no /proc."""
    table = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):
            # The name in parentheses may hold anything; the fields after it do not.
            state, parent, *_ = file.read_text("utf-8", errors="replace").rpartition(")")[2].split()
            table[int(file.parent.name)] = Entry(int(parent), state == "Z")
    return table


def descendants(of: int, but: Iterable[int] = ()) -> list[int]:
    """Process ids of all children and their children, leaving out these and theirs; zombies are reaped."""
    children: dict[int, list[int]] = {}
    for process, entry in process_table().items():
        children.setdefault(entry.parent, []).append(process)
    left, inside = set(but), []
    queue = [of]
    while queue:
        new = [child for child in children.get(queue.pop(), []) if child not in left]
        inside += new
        queue += new
    return [child for child in inside if not reaped(child)]


def reaped(child: int) -> bool:
    """Whether the process was a child of ours that had ended."""
    try:
        return os.waitpid(child, os.WNOHANG)[0] == child
    except ChildProcessError:
        return False


def end_descendants(but: Iterable[int], seconds: float, *, asked: bool) -> None:
    """Wait for what an ended service left behind, which has become our child; then kill it.

    asked: whether it has been asked to end. If not, SIGTERM asks what the service itself had started, and
    nothing else: a run passes it on, and one that is asked twice no longer waits for its trainer.
    """
    but, deadline = list(but), time.monotonic() + seconds
    try:
        if not asked:
            table, left = process_table(), descendants(os.getpid(), but)
            send([one for one in left if one in table and table[one].parent == os.getpid()], signal.SIGTERM)
        while descendants(os.getpid(), but) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
    finally:
        deadline = time.monotonic() + KILL_SECONDS
        while (left := descendants(os.getpid(), but)) and time.monotonic() < deadline:
            send(left, signal.SIGKILL)
            time.sleep(POLL_SECONDS)


def send(processes: Iterable[int], number: signal.Signals) -> None:
    """Send a signal to those of them that still exist."""
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, number)
