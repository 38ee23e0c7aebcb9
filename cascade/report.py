"""How long work tells what it is doing, without knowing who listens."""

from __future__ import annotations

from typing import Protocol


class Report(Protocol):
    """Receives log lines and progress; the receiver throttles, the caller does not."""

    def log(self, message: str) -> None:
        """One line for a person."""

    def progress(self, done: int, total: int, unit: str, **figures: float) -> None:
        """`done` of `total` `unit`s are finished; `figures` are the newest measurements, such as loss."""


class Silent:
    """A report nobody reads."""

    def log(self, message: str) -> None:
        """Drop the line."""

    def progress(self, done: int, total: int, unit: str, **figures: float) -> None:
        """Drop the figures."""


SILENT: Report = Silent()
