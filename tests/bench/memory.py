"""Resident memory of this process, as Linux counts it."""

from __future__ import annotations

from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident() -> int:
    """Bytes now."""
    return field("VmRSS")


def peak() -> int:
    """Most bytes since `reset_peak`."""
    return field("VmHWM")


def reset_peak() -> None:
    """What was before is forgotten: the peak is what is resident now."""
    CLEAR.write_text("5")


def field(name: str) -> int:
    """Bytes."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024
