"""One address for a file or a folder, whether it lies on this machine or in an S3 bucket."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol
from urllib.parse import unquote, urlsplit

from cascade.errors import InputError
from cascade.storage.faults import full_disk, store_faults
from cascade.storage.listing import Entry
from cascade.storage.local import LocalStore
from cascade.storage.s3 import S3Store

S3_SCHEME = "s3://"
# Where an address is wrong; nobody has looked yet whether anything is there.
ADDRESS = "the address of a store, a file or a model"


class Store(Protocol):
    """What a kind of storage does with its own paths; it raises that storage's own errors."""

    def read(self, path: str) -> bytes:
        """The whole file."""

    def write(self, path: str, data: bytes, create: bool) -> None:
        """Put the whole file in one step; with `create`, FileExistsError if there is one."""

    def exists(self, path: str) -> bool:
        """Whether there is a file, or a folder with something in it."""

    def size(self, path: str) -> int:
        """Bytes of the file."""

    def age(self, path: str) -> float:
        """Seconds since the file was written."""

    def sha256(self, path: str) -> str:
        """Hex digest of the file, read as a stream."""

    def version(self, path: str) -> str:
        """A text that changes whenever the file is replaced."""

    def children(self, path: str) -> list[str]:
        """Names of the files and folders directly inside."""

    def walk(self, path: str) -> list[str]:
        """Relative paths of all files inside."""

    def listing(self, path: str) -> list[Entry]:
        """All files inside with their sizes and times."""

    def upload(self, source: Path, path: str, create: bool) -> None:
        """Copy a local file here in one step; with `create`, FileExistsError if there is one."""

    def download(self, path: str, target: Path, size: int | None) -> None:
        """Copy the file to a local path; size: as in `Location.download`."""

    def staged(self, path: str) -> AbstractContextManager[Path]:
        """A local path to write to; what is there on leaving becomes the file."""

    def move(self, path: str, target: str) -> None:
        """Give the file another name, which nobody else uses; on S3 by a copy."""

    def delete_tree(self, path: str) -> None:
        """Remove everything inside."""

    def provide(self, path: str) -> bool:
        """Make the bucket if there is none; whether it was made."""

    def check(self, path: str, create: bool, wait: bool) -> None:
        """Raise InputError if the store cannot be read or, with `create`, not be written."""


_LOCAL, _S3 = LocalStore(), S3Store()


@dataclass(frozen=True)
class Location:
    """A place in a store: an absolute local path or `s3://bucket/prefix` (build one with `open_location`).

    Every method raises StorageFault when the store fails as networks do (a retry may help),
    InputError when it refuses (bucket, credentials, permissions), FileNotFoundError when there is no
    such file. A name that begins with a dot is hidden: listings leave it out.
    """

    uri: str

    def __truediv__(self, name: str) -> Location:
        if not is_inside(name):
            raise InputError(
                "a name inside the store leads out of it",
                value=name,
                where=self.uri,
                remedy="write a relative path without empty parts, `.` and `..`",
            )
        return Location(f"{self.uri.rstrip('/')}/{name}")

    def __str__(self) -> str:
        return self.uri

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.uri.rstrip("/").rsplit("/", 1)[-1]

    @property
    def parent(self) -> Location | None:
        """The folder around it; None for a bucket, and for the root of this machine."""
        if self.uri.startswith(S3_SCHEME):
            around, _, _ = self._path.rstrip("/").rpartition("/")
            return Location(S3_SCHEME + around) if around else None
        path = Path(self.uri)
        return Location(str(path.parent)) if path.parent != path else None

    @property
    def local_path(self) -> Path | None:
        """The path on this machine, or None when the store is not on it."""
        return None if self.uri.startswith(S3_SCHEME) else Path(self.uri)

    @property
    def _store(self) -> Store:
        return _S3 if self.uri.startswith(S3_SCHEME) else _LOCAL

    @property
    def _path(self) -> str:
        return self.uri.removeprefix(S3_SCHEME)

    def read_bytes(self) -> bytes:
        """The whole file; for small ones."""
        with store_faults(self.uri):
            return self._store.read(self._path)

    def write_bytes(self, data: bytes, create: bool = False) -> None:
        """Write a whole file so that nobody ever sees half of it.

        create: write only if there is no such file yet, else FileExistsError, decided by the store.
        """
        with store_faults(self.uri):
            self._store.write(self._path, data, create)

    def exists(self) -> bool:
        """Whether there is a file here, or a folder with something in it."""
        with store_faults(self.uri):
            return self._store.exists(self._path)

    def size(self) -> int:
        """Bytes of the file."""
        with store_faults(self.uri):
            return self._store.size(self._path)

    def age(self) -> float:
        """Seconds since the file was written, by this machine's clock."""
        with store_faults(self.uri):
            return self._store.age(self._path)

    def sha256(self) -> str:
        """Hex digest of the file, read as a stream: memory does not grow with its size."""
        with store_faults(self.uri):
            return self._store.sha256(self._path)

    def version(self) -> str:
        """A text that changes whenever the file is replaced, found without reading it."""
        with store_faults(self.uri):
            return self._store.version(self._path)

    def children(self) -> list[str]:
        """Sorted names of the files and folders directly inside; [] when there is nothing here."""
        with store_faults(self.uri):
            return sorted(name for name in self._store.children(self._path) if not name.startswith("."))

    def walk(self) -> list[str]:
        """Sorted relative paths of all files inside, at any depth; [] when there is nothing here."""
        with store_faults(self.uri):
            return sorted(path for path in self._store.walk(self._path) if not is_hidden(path))

    def listing(self) -> list[Entry]:
        """All files inside, hidden ones too, sorted by path; [] when there is nothing here."""
        with store_faults(self.uri):
            return sorted(self._store.listing(self._path), key=lambda entry: entry.path)

    def upload(self, source: Path, create: bool = False) -> None:
        """Copy a local file of any size here, all or nothing. create: as in `write_bytes`."""
        with store_faults(self.uri):
            self._store.upload(source, self._path, create)

    def download(self, target: Path, size: int | None = None) -> None:
        """Copy the file, of any size, to `target`, which appears whole or not at all.

        size: bytes that it has; should it be larger, no more are fetched. None: as many as it has.
        """
        with store_faults(self.uri), full_disk(str(target)), _LOCAL.staged(str(target)) as path:
            self._store.download(self._path, path, size)

    @contextmanager
    def staged(self) -> Iterator[Path]:
        """A local path to write a file of any size to; on leaving it becomes the file, all or nothing.

        In a local store nothing is copied. When the block raises, there is no file.
        """
        with store_faults(self.uri), self._store.staged(self._path) as path:
            yield path

    def move(self, target: Location) -> None:
        """Give the file another name in the same store, which nobody else uses. At any moment it has one."""
        with store_faults(self.uri):
            self._store.move(self._path, target._path)

    def delete_tree(self) -> None:
        """Remove everything here, or the one file. For checkpoints and unfinished artifacts only."""
        with store_faults(self.uri):
            self._store.delete_tree(self._path)


def open_location(uri: str) -> Location:
    """The location that a user wrote: a folder (`~` and relative ones too), `file://...` or `s3://bucket/...`.

    Touches no network and no disk. InputError for any other scheme, or an s3 address without a bucket or
    with credentials in it, which are not repeated.
    """
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", uri)
    if not uri.strip():
        raise InputError("the location is empty", where=ADDRESS, remedy="give a folder or s3://bucket/prefix")
    if scheme is None:
        return Location(_absolute(Path(uri).expanduser()))
    if scheme[1].lower() == "file":
        return Location(_absolute(Path(unquote(urlsplit(uri).path))))
    if scheme[1].lower() != "s3":
        raise InputError(
            "this kind of location is not supported",
            value=scheme[0],
            where=ADDRESS,
            remedy="give a folder or s3://bucket/prefix; other services are reached by AWS_ENDPOINT_URL",
        )
    path = uri[len(S3_SCHEME) :].rstrip("/")
    bucket = path.partition("/")[0]
    # No bucket's name holds a colon; the ARN of an access point does.
    if "@" in bucket or (":" in bucket and not bucket.startswith("arn:")):
        raise InputError(
            "the address of the store holds credentials or a port",
            value=f"{S3_SCHEME}{path.rpartition('@')[2] if '@' in path else '...'}",
            where=ADDRESS,
            remedy="write s3://bucket/prefix; keys and the endpoint come from the AWS_* variables",
        )
    if "?" in path:
        raise InputError(
            "the address of the store holds a query, which may be a secret",
            value=f"{S3_SCHEME}{path.partition('?')[0]}",
            where=ADDRESS,
            remedy="write s3://bucket/prefix; keys and the endpoint come from the AWS_* variables",
        )
    if not is_inside(path):
        raise InputError(
            "this is not the address of a bucket", value=uri, where=ADDRESS, remedy="write s3://bucket/prefix"
        )
    return Location(S3_SCHEME + path)


def _absolute(path: Path) -> str:
    """From the root, without `..`: one place has one name."""
    return os.path.abspath(path)


def check_store(location: Location, create: bool = True, wait: bool = False) -> None:
    """Find out in seconds, before any work, whether the store can be used; leaves nothing behind.

    create: the store has to accept new files (a folder that does not exist yet will do); otherwise it
    only has to be there and readable. InputError that says the way out: endpoint does not answer or is
    not S3, bucket missing, credentials missing or wrong, not writable, no conditional writes. StorageFault
    when it is S3, and failing. wait: nobody sits there who could correct an address; wait for a store that
    does not answer as any request does, and raise StorageFault in the end.
    """
    with store_faults(location.uri):
        location._store.check(location._path, create, wait)


def provide_store(location: Location) -> bool:
    """Make the bucket if there is none, then `check_store`, with its errors; whether the bucket was made."""
    with store_faults(location.uri):
        made = location._store.provide(location._path)
    check_store(location)
    return made


def is_inside(path: str) -> bool:
    """Whether a relative path stays inside the folder it is joined to, and has no empty part."""
    return all(part not in ("", ".", "..") for part in path.split("/")) and "\0" not in path


def is_hidden(path: str) -> bool:
    """Whether any part of a relative path begins with a dot."""
    return any(part.startswith(".") for part in PurePosixPath(path).parts)
