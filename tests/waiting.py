"""Waiting for processes and servers, for as long as a busy machine needs."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

# Seconds after which something that is waited for does not come any more.
LONG = 900.0


def alive(pid: int) -> bool:
    """Whether the process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition: Callable[[], bool], seconds: float = LONG, rest: float = 1.0) -> bool:
    """Whether a condition came within so many seconds.

    After a question it rests nine times as long as that took, at least 0.01 s and at most `rest` seconds: a
    question may take the processor from what is waited for. What lasts no longer than `rest` may be missed.
    """
    deadline = time.monotonic() + seconds
    while True:
        asked = time.monotonic()
        if condition():
            return True
        now = time.monotonic()
        if now > deadline:
            return False
        time.sleep(min(max(9 * (now - asked), 0.01), rest))
