"""Reports of nodes, as tests look at them."""

from __future__ import annotations

from typing import Any


class Recorder:
    """A report that remembers."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.figures: list[dict[str, Any]] = []

    def log(self, message: str) -> None:
        self.lines.append(message)

    def progress(self, done: int, total: int, unit: str, **figures: float) -> None:
        self.figures.append({"done": done, "total": total, "unit": unit, **figures})
