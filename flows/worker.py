"""`python -m flows.worker POOL [OPTION...]`: a Prefect worker of a container, whose runs end well with it.

After SIGTERM Prefect's own worker either waits for its runs, for as long as they need, or kills them: in a
container that is stopped, a trainer is not told to save a snapshot before the container ends. Here the runs
are told: they end within 30 s, as after a cancel, with their state on the server, and the next run goes on
from the snapshot.

It is meant for a container, whose first process ends with it, and with that one all others. Killed anywhere
else, it leaves Prefect's worker and its runs behind.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from types import FrameType

from cascade.stack.processes import process_table, send

# A pool that is missing is a bootstrap that has not run: the worker would make one without limits.
OPTIONS = (
    *("--type", "process", "--install-policy", "never"),
    *("--no-create-pool-if-not-found", "--with-healthcheck"),
)
# A trainer has 20 s to save, and its flow says so to the server; containers are killed after 60 s.
RUN_SECONDS = 45.0
WORKER_SECONDS = 5.0
POLL_SECONDS = 0.2


def main(pool: str, *options: str) -> int:
    """Serve the pool until the worker ends (its exit code), or until SIGTERM or SIGINT (0).

    options: more of `prefect worker start`'s.
    """
    prefect = [sys.executable, "-m", "prefect", "--no-prompt"]
    command = [*prefect, "worker", "start", "--pool", pool, *OPTIONS, *options]
    stopping = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopping
        stopping = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    # In a session of its own: what is typed at a terminal must not reach it past us.
    worker = subprocess.Popen(command, start_new_session=True)
    while worker.poll() is None:
        if stopping:
            end(worker)
            return 0
        time.sleep(POLL_SECONDS)
    return worker.returncode


def end(worker: subprocess.Popen[bytes]) -> None:
    """Ask the worker's runs to end, wait until they have, and end the worker."""
    # Halted, it neither kills a run nor starts one that nobody would ask to end.
    worker.send_signal(signal.SIGSTOP)
    send(children(worker.pid), signal.SIGTERM)
    deadline = time.monotonic() + RUN_SECONDS
    while children(worker.pid) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    worker.terminate()
    worker.send_signal(signal.SIGCONT)
    try:
        worker.wait(WORKER_SECONDS)
    except subprocess.TimeoutExpired:
        worker.kill()
        worker.wait()


def children(parent: int) -> list[int]:
    """Process ids of a process's children that have not ended."""
    return [one for one, entry in process_table().items() if entry.parent == parent and not entry.ended]


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        print("usage: python -m flows.worker POOL [OPTION...]", file=sys.stderr)
        sys.exit(2)
    sys.exit(main(*sys.argv[1:]))
