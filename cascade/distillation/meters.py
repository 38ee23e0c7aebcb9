"""What a step costs: its seconds and its memory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Runs from its creation on, but for pauses."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def seconds(self) -> float:
        """Run so far."""
        return time.monotonic() - self._start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The watch stands still inside."""
        begin = time.monotonic()
        yield
        self._start += time.monotonic() - begin
