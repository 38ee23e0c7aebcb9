"""Shards of signals as local files: as they lie in a folder, or brought from a store ahead of need."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from cascade.storage.artifacts import fetch_file
from cascade.storage.locations import Location
from cascade.storage.manifest import Manifest

AHEAD = 2
"""Shards that are brought before they are asked for, where not all are kept: one that is being brought, and
one that is there."""


class Shards(Protocol):
    """The files of a signals artifact. waited: seconds spent in `path` until files were there."""

    @property
    def waited(self) -> float: ...

    def path(self, name: str) -> Path:
        """A local file with the content of one of them."""


class Folder:
    """Files that nobody has to bring or check."""

    waited = 0.0

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str) -> Path:
        """See `Shards.path`."""
        return self.folder / name


class ReadAhead:
    """Brings the files of an artifact in a thread of its own, in the order in which they will be needed.

    order: the files that will be asked for, first to last. keep: all that was brought stays in `folder`, also
    for others, and when the order's end is reached what is missing of its beginning is brought; else only the
    last file that was asked for stays, with the one before it and `AHEAD` after it. Every file is hashed
    against the manifest before it is handed out. In a local store files are hashed where they lie.
    `path` raises as `fetch_file`. Call `close` before the folder is removed.
    """

    def __init__(
        self, location: Location, manifest: Manifest, folder: Path, order: Sequence[str], *, keep: bool
    ) -> None:
        self._bring: Callable[[str], Path] = lambda name: fetch_file(location, manifest, name, folder)
        self._order, self._keep = list(order), keep
        self._owns = location.local_path is None and not keep
        self._places = {name: place for place, name in enumerate(self._order)}
        self._here: dict[str, Path | None] = {}
        self._place, self._closed, self.waited = 0, False, 0.0
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="read-ahead", daemon=True)
        self._thread.start()

    def path(self, name: str) -> Path:
        """See `Shards.path`."""
        began = time.monotonic()
        with self._changed:
            if name in self._places and not self._closed:
                self._place = self._places[name]
                self._changed.notify_all()
                self._changed.wait_for(lambda: name in self._here or self._closed)
            path = self._here.get(name)
        if path is None:
            # Not in the order, or it failed in the thread: then it fails here, or this second try succeeds.
            path = self._bring(name)
            with self._changed:
                self._here[name] = path
        self.waited += time.monotonic() - began
        return path

    def close(self) -> None:
        """End the thread, after the file that it is bringing."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while (name := self._await_next()) is not None:
            path: Path | None = None
            # An error is raised where somebody asks for this file.
            with suppress(Exception):
                path = self._bring(name)
            with self._changed:
                self._here[name] = path
                self._changed.notify_all()
            self._drop_passed()

    def _await_next(self) -> str | None:
        """The next file to bring; None when it is time to end."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._next() is not None)
            return None if self._closed else self._next()

    def _next(self) -> str | None:
        here = range(self._place, len(self._order))
        wanted = [*here, *range(self._place)] if self._keep else here[: AHEAD + 1]
        return next((self._order[place] for place in wanted if self._order[place] not in self._here), None)

    def _drop_passed(self) -> None:
        """Remove what lies outside of the window, where it is ours to remove."""
        if not self._owns:
            return
        with self._changed:
            first, last = self._place - 1, self._place + AHEAD
            passed = [name for name, place in self._places.items() if not first <= place <= last]
            doomed = [path for name in passed if (path := self._here.pop(name, None)) is not None]
        for path in doomed:
            path.unlink(missing_ok=True)
