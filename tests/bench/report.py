"""Tables as Markdown, and what belongs beside every figure: date, machine, versions and seeds."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch

PACKAGES = ("cascade", "torch", "transformers", "torch-pruning", "optipfair")


def report(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str]) -> str:
    """One benchmark: its title, where it was run, its table and its notes."""
    lines = [f"## {title}", "", *(f"- {line}" for line in (*provenance(), *notes)), "", *table(header, rows)]
    return "\n".join([*lines, ""])


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The first column is text, the others are figures."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (header, rule, *rows)]


def provenance() -> list[str]:
    """When and where."""
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return [
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC; {processor()}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f} at the end",
        f"Python {platform.python_version()}, {packages}",
    ]


def processor() -> str:
    """The processor's name, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def spread(values: Sequence[float], digits: int) -> str:
    """The median, and the smallest and largest where there are several."""
    middle = f"{median(values):.{digits}f}"
    if len(values) == 1:
        return middle
    return f"{middle} ({min(values):.{digits}f} to {max(values):.{digits}f})"
