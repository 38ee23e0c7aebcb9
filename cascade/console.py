"""What a build shows in a terminal: a bar for long work, lines otherwise."""

from __future__ import annotations

import time
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

# Without a terminal, one progress line in this many seconds.
QUIET_SECONDS = 30.0


class ConsoleReport:
    """A bar with tokens/s, loss and time left on a terminal; a line now and then elsewhere."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.title = ""
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:,}/{task.total:,} {task.fields[unit]}"),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self.row: TaskID | None = None
        self.last_line = time.monotonic()

    def __enter__(self) -> ConsoleReport:
        if self.console.is_terminal:
            self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        # Stopping a bar that never started prints an empty line.
        if self.console.is_terminal:
            self.bar.stop()

    def start(self, title: str) -> ConsoleReport:
        """The next piece of work begins; returns this report."""
        self.title = title
        if self.row is not None:
            self.bar.remove_task(self.row)
            self.row = None
        return self

    def log(self, message: str) -> None:
        """One line."""
        line = f"{self.title}: {message}" if self.title else message
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def progress(self, done: int, total: int, unit: str, **figures: float) -> None:
        """Move the bar, or print a line when the last one is long ago."""
        text = figures_text(figures)
        if self.console.is_terminal:
            if self.row is None:
                self.row = self.bar.add_task(self.title, total=total, unit=unit, figures=text)
            self.bar.update(self.row, completed=done, total=total, unit=unit, figures=text)
        elif time.monotonic() - self.last_line >= QUIET_SECONDS:
            self.last_line = time.monotonic()
            self.log(f"{done:,}/{total:,} {unit} {text}".rstrip())


def figures_text(figures: dict[str, float]) -> str:
    """`loss 3.12, tokens/s 140`: few significant digits are enough to watch."""
    return ", ".join(
        f"{name.replace('_per_second', '/s')} {compact(value)}" for name, value in figures.items()
    )


def compact(value: float) -> str:
    """Four significant digits, and thousands in full."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:.4g}"


@dataclass
class Pace:
    """How fast work goes, since it was first seen: a training that goes on has not done all of it here."""

    first: int = 0
    since: float | None = None

    def left(self, done: int, total: int, now: float) -> float | None:
        """Seconds until all is done, at the pace so far; None while that is not known."""
        if self.since is None or done < self.first:
            self.first, self.since = done, now
        if done == self.first or now <= self.since:
            return None
        return (total - done) * (now - self.since) / (done - self.first)


def seconds_text(seconds: float) -> str:
    """`40 s`, `3 min`, `2 h 5 min`."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
