"""What killed builds left in a store: removed by the next build of the family that comes to its end."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from cascade.errors import CascadeError
from cascade.family.job import Job
from cascade.storage.locations import Location

# Half-written files of a local store, see `staged_file`. Who writes one touches it all the time.
HALF_WRITTEN = re.compile(r"\..+\.[0-9a-f]{12}")
QUIET_SECONDS = 3600.0


def clear_leftovers(done: Iterable[Job], family: Location) -> None:
    """Remove unfinished work of nodes that are done, and files that nobody has written to for an hour.

    What cannot be removed is left to the next build: the family is there.
    """
    folders: dict[str, set[str]] = {}
    for job in done:
        parent = job.training.uri.rpartition("/")[0]
        if parent not in folders:
            folders[parent] = set(Location(parent).children())
        if job.training.name in folders[parent]:
            with suppress(CascadeError):
                job.training.delete_tree()
    if family.local_path is not None:
        clear_half_written(family.local_path)


def clear_half_written(folder: Path) -> None:
    """Of a local store; an object store never shows them."""
    for root, _, names in os.walk(folder):
        for path in (Path(root, name) for name in names if HALF_WRITTEN.fullmatch(name)):
            # One that is finished or removed meanwhile.
            with suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > QUIET_SECONDS:
                    path.unlink()
