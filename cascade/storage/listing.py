"""What lies in a store: every file with its size and time, from one listing."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """One file. path: from the place that was listed. size: bytes. modified: seconds since 1970."""

    path: str
    size: int
    modified: float
