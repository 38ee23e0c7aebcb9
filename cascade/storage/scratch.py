"""Scratch folders that do not outlive their process for long: a killed one's are removed by the next."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from cascade.storage.local import make_folder

FOLDER, LOCK, FILES = "work", ".lock", "files"


@contextmanager
def scratch_folder(cache: Path, prefix: str) -> Iterator[Path]:
    """An empty folder below `cache`, removed on leaving; those that dead processes left there go first.

    A lock that the kernel frees says who is alive, whatever container it runs in.
    """
    root = cache.absolute() / FOLDER
    make_folder(root)
    clear(root)
    held = None
    while held is None:
        folder = Path(tempfile.mkdtemp(prefix=f"{prefix}-", dir=root))
        held = _locked(folder / LOCK, create=True)
    with held:
        inner = folder / FILES
        inner.mkdir()
        try:
            yield inner
        finally:
            _remove(folder)


@contextmanager
def temporary_files_in(folder: Path) -> Iterator[None]:
    """Temporary files of this process, of whatever library, are made in the folder."""
    before, tempfile.tempdir = tempfile.tempdir, str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before


def clear(root: Path) -> None:
    """Remove the scratch folders that nobody holds."""
    for folder in root.iterdir():
        with suppress(OSError):
            held = _locked(folder / LOCK)
            if held is None:
                # Killed before it was locked or after all was removed, or just being made.
                os.rmdir(folder)
                continue
            with held:
                _remove(folder)


def _remove(folder: Path) -> None:
    """The lock goes last: what a process leaves that is killed meanwhile is removed by the next."""
    shutil.rmtree(folder / FILES, ignore_errors=True)
    # Another process may remove the folder once it has no lock.
    with suppress(FileNotFoundError):
        if not (folder / FILES).exists():
            os.unlink(folder / LOCK)
            os.rmdir(folder)


def _locked(path: Path, create: bool = False) -> IO[str] | None:
    """The open lock file; None when it is not there (any more). BlockingIOError when somebody holds it."""
    try:
        lock = path.open("w" if create else "r+")
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        there = path.exists() and os.path.samestat(os.fstat(lock.fileno()), path.stat())
    except OSError as error:
        # A file system without locks refuses `clear` as well: nothing is removed there.
        there = create and not isinstance(error, BlockingIOError)
        if not create:
            lock.close()
            raise
    if there:
        return lock
    lock.close()
    return None
