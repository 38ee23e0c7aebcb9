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


def wait_until(condition: Callable[[], bool], seconds: float = LONG) -> bool:
    """Whether a condition came within so many seconds.

    It is asked seldom when it takes long: often would take the processor from what is waited for.
    """
    began = time.monotonic()
    while not condition():
        waited = time.monotonic() - began
        if waited > seconds:
            return False
        time.sleep(min(max(waited / 20, 0.01), 0.5))
    return True
