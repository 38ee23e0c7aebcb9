"""Storage in folders of this machine: every file appears whole, under its final name, or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cascade.errors import InputError
from cascade.storage.faults import refused
from cascade.storage.listing import Entry


class LocalStore:
    """Plain files. Writing makes the folders it needs."""

    def read(self, path: str) -> bytes:
        """The whole file."""
        return Path(path).read_bytes()

    def write(self, path: str, data: bytes, create: bool) -> None:
        """Write beside the final name, then move there."""
        with staged_file(Path(path), create) as temporary:
            temporary.write_bytes(data)

    def exists(self, path: str) -> bool:
        """Whether there is a file, or a folder with something in it (as S3 has it)."""
        return os.path.isfile(path) or bool(self.children(path))

    def size(self, path: str) -> int:
        """Bytes of the file."""
        return os.stat(path).st_size

    def age(self, path: str) -> float:
        """Seconds since the last modification."""
        return time.time() - os.stat(path).st_mtime

    def sha256(self, path: str) -> str:
        """Hex digest, read in blocks."""
        return file_sha256(Path(path))

    def version(self, path: str) -> str:
        """Modification time and size."""
        status = os.stat(path)
        return f"{status.st_mtime_ns} {status.st_size}"

    def children(self, path: str) -> list[str]:
        """Names directly inside; folders that hold nothing count, S3 has none."""
        # Another process may be removing it.
        with suppress(FileNotFoundError, NotADirectoryError):
            return os.listdir(path)
        return []

    def walk(self, path: str) -> list[str]:
        """Relative paths of the files inside, with forward slashes."""
        root = Path(path)
        return [
            (Path(folder) / name).relative_to(root).as_posix()
            for folder, _, names in os.walk(root)
            for name in names
        ]

    def listing(self, path: str) -> list[Entry]:
        """All files inside; one that disappears meanwhile is left out. Links to folders are not followed."""
        root, found = Path(path), []
        for folder, _, names in os.walk(root):
            for file in (Path(folder) / name for name in names):
                with suppress(FileNotFoundError):
                    status = file.lstat()
                    name = file.relative_to(root).as_posix()
                    found.append(Entry(name, status.st_size, status.st_mtime))
        return found

    def upload(self, source: Path, path: str, create: bool) -> None:
        """Copy beside the final name, then move there."""
        with staged_file(Path(path), create) as temporary:
            shutil.copyfile(source, temporary)

    def download(self, path: str, target: Path, size: int | None) -> None:
        """Copy the file; whatever its size, it lies on this machine already."""
        shutil.copyfile(path, target)

    @contextmanager
    def staged(self, path: str) -> Iterator[Path]:
        """A path beside the final name that is moved there on leaving."""
        with staged_file(Path(path), create=False) as temporary:
            yield temporary

    def move(self, path: str, target: str) -> None:
        """Rename the file, or the folder."""
        make_folder(Path(target).parent)
        os.rename(path, target)

    def delete_tree(self, path: str) -> None:
        """Remove the folder with all that is in it, or the file; nothing to do when it is absent."""
        if not os.path.isdir(path):
            Path(path).unlink(missing_ok=True)
            return
        # A file that another process removes first is no fault; what is left after that raises.
        shutil.rmtree(path, ignore_errors=True)
        with suppress(FileNotFoundError):
            shutil.rmtree(path)

    def provide(self, path: str) -> bool:
        """Folders are made when something is written into them."""
        return False

    def check(self, path: str, create: bool, wait: bool) -> None:
        """Try to write a file in the nearest folder that exists; make none."""
        folder = Path(path)
        try:
            if not create:
                os.listdir(folder)
                return
            while not folder.exists():
                folder = folder.parent
            with tempfile.TemporaryFile(dir=folder):
                pass
        except FileNotFoundError:
            raise InputError(
                "the folder does not exist", value=folder.name, where=path, remedy="check the path"
            ) from None
        except OSError as error:
            raise refused(error, path) or InputError(
                f"the folder cannot be used: {error.strerror}",
                value=path,
                where=str(folder),
                remedy="choose a folder on a disk that accepts new files",
            ) from error


def file_sha256(path: Path) -> str:
    """Hex digest of a local file's content, read as a stream."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def staged_file(path: Path, create: bool) -> Iterator[Path]:
    """A hidden path in the same folder; on leaving it is moved to `path`, on an error it is removed.

    create: FileExistsError when `path` exists. A hard link decides that: unlike a rename, it never
    replaces what is there.
    """
    make_folder(path.parent)
    temporary = hidden_sibling(path)
    try:
        yield temporary
        if create:
            os.link(temporary, path)
        else:
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Make the folder and those above it. NotADirectoryError if a file is in the way, FileNotFoundError if
    somebody removes the folder at this moment."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        if not os.path.lexists(folder):
            raise FileNotFoundError(errno.ENOENT, "removed meanwhile", str(folder)) from error
        raise NotADirectoryError(errno.ENOTDIR, "a file is in the way", str(folder)) from error


def hidden_sibling(path: Path) -> Path:
    """A name in the same folder that listings leave out and no other process chooses."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
