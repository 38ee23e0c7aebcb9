"""The cache folder of a machine: copies of what lies in stores, brought again when they are missed."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cascade.storage.faults import store_faults
from cascade.storage.local import hidden_sibling
from cascade.storage.scratch import FOLDER as WORK_FOLDER

DAY = 24 * 3600.0
# A copy that nobody has used for so long goes when the next build starts on this machine.
KEPT_DAYS = 30.0
# Folders of copies, below the cache or one of its folders; hidden ones are remains of a process that was
# killed while it made or removed a copy.
COPY = re.compile(r"(?:(?:signals-)?[0-9a-f]{12}|(?:parents|gguf)/[^/.][^/]*)$")
REMAINS = re.compile(r"(?:(?:parents|gguf)/)?\.[^/]+\.[0-9a-f]{12}$")


@dataclass(frozen=True)
class Copy:
    """A folder in the cache. used: seconds since 1970, when it was used last."""

    path: Path
    bytes: int
    used: float


def touch(folder: Path) -> None:
    """Note that a copy is used now; the cache of another user cannot be written to, and stays as it is."""
    with suppress(OSError):
        os.utime(folder)


def unused(cache: Path, days: float, now: float) -> list[Copy]:
    """Copies that nobody has used for so many days (one or more), nor since the oldest running node began."""
    began = running_since(cache)
    before = min(now - max(days, 1.0) * DAY, now if began is None else began)
    found = []
    for path in (*children(cache), *children(cache / "parents"), *children(cache / "gguf")):
        name = path.relative_to(cache).as_posix()
        with suppress(FileNotFoundError):
            used = path.stat().st_mtime
            if (COPY.match(name) or REMAINS.match(name)) and used < before:
                found.append(Copy(path, size(path), used))
    return sorted(found, key=lambda copy: copy.path)


def tidy(cache: Path, days: float = KEPT_DAYS) -> None:
    """Remove what nobody has used for so many days."""
    for copy in unused(cache, days, time.time()):
        discard(copy.path)


def discard(folder: Path) -> None:
    """Remove a copy; readers that hold its files open keep them."""
    with store_faults(str(folder)), suppress(FileNotFoundError):
        doomed = hidden_sibling(folder)
        os.rename(folder, doomed)
        shutil.rmtree(doomed)


def running_since(cache: Path) -> float | None:
    """When the oldest of those that work in this cache began; None when there is none."""
    began = []
    for folder in children(cache / WORK_FOLDER):
        # One that is left meanwhile.
        with suppress(FileNotFoundError):
            began.append(folder.stat().st_mtime)
    return min(began, default=None)


def children(folder: Path) -> list[Path]:
    """Folders inside; none when there is no such folder."""
    return [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []


def size(folder: Path) -> int:
    """Bytes of all files inside."""
    return sum(path.lstat().st_size for path in walk(folder))


def walk(folder: Path) -> Iterator[Path]:
    """All files inside."""
    return (path for path in folder.rglob("*") if path.is_file())
