"""Disks that are full: a small file system where we may mount one, and a limit of the process everywhere."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import pytest


class Disk(Protocol):
    """A folder that takes only so many bytes. words: what the error says."""

    folder: Path
    words: str

    def takes(self, size: int) -> None:
        """From now on so many bytes: in all on a disk, in one file under a limit."""

    def takes_all(self) -> None:
        """From now on whatever a test writes."""


class SmallDisk:
    """A tmpfs of its own."""

    words = "the disk is full"

    def __init__(self, folder: Path, size: int) -> None:
        self.folder = folder
        self._mount(f"size={size}")

    def takes(self, size: int) -> None:
        """See `Disk.takes`."""
        self._mount(f"remount,size={size}")

    def takes_all(self) -> None:
        """See `Disk.takes_all`."""
        self.takes(2**30)

    def _mount(self, options: str) -> None:
        self.folder.mkdir(exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", options, "cascade-tests", str(self.folder)]
        subprocess.run(command, check=True, capture_output=True)

    def __enter__(self) -> SmallDisk:
        return self

    def __exit__(self, *exception: object) -> None:
        subprocess.run(["umount", "--lazy", str(self.folder)], check=True)


class LimitedFiles:
    """No process from here on may make a file larger than this (`ulimit -f`)."""

    words = "larger than the disk, or the limit of this user"

    def __init__(self, folder: Path, size: int) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.takes(size)

    def takes(self, size: int) -> None:
        """See `Disk.takes`."""
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

    def takes_all(self) -> None:
        """See `Disk.takes_all`."""
        self.takes(resource.RLIM_INFINITY)


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Disk]:
    """A mounted disk; skips the test where nothing may be mounted."""
    try:
        disk = SmallDisk(folder, size)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip(
            f"user {os.getuid()} may not mount a disk; the same is tested under a limit of the process"
        )
    with disk:
        yield disk


@contextmanager
def limited_files(folder: Path, size: int) -> Iterator[Disk]:
    """A folder of this process, which may write only small files until the block ends."""
    # Python ignores the signal; somebody may have installed a handler.
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    disk = LimitedFiles(folder, size)
    try:
        yield disk
    finally:
        disk.takes_all()
        signal.signal(signal.SIGXFSZ, before)


KINDS = {"disk": small_disk, "limit": limited_files}
