"""From the path a person wrote to files on this machine."""

from __future__ import annotations

import glob
import shutil
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from urllib.error import HTTPError
from urllib.parse import unquote, urlsplit

from cascade.errors import InputError, StorageFault
from cascade.storage.locations import is_hidden, open_location

# The suffix decides which builder of `datasets` reads a file; each may be followed by .gz.
FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}
REMOTE = ("http://", "https://", "s3://")
TIMEOUT_SECONDS = 60


def file_format(name: str) -> str | None:
    """The format of a file by its name: json, parquet, text, or None when it is not known."""
    return FORMATS.get(PurePosixPath(name.lower().removesuffix(".gz")).suffix)


def is_file_path(path: str) -> bool:
    """Whether a source's path means files, not a hub data set: an address, a glob, or a file's name."""
    return bool(path) and (
        "://" in path
        or glob.has_magic(path)
        or path.startswith(("/", ".", "~"))
        or file_format(path) is not None
        or Path(path).exists()
    )


@contextmanager
def local_files(path: str) -> Iterator[list[Path]]:
    """The files behind a local path or an address, sorted by name; remote ones are removed on leaving.

    InputError: nothing there, a format that is not known, an address that does not answer.
    """
    if not path.startswith(REMOTE):
        yield find(path)
        return
    with tempfile.TemporaryDirectory(prefix="cascade-corpus-") as folder:
        yield (
            download_s3(path, Path(folder)) if path.startswith("s3://") else download_url(path, Path(folder))
        )


def find(path: str) -> list[Path]:
    """The files that a local path, folder or glob names, sorted; a folder to any depth, hidden ones not."""
    if "://" in path:
        # Refuses every scheme but file://.
        path = str(open_location(path).local_path)
    root = Path(path).expanduser()
    if root.is_file():
        return [known(root)]
    if root.is_dir():
        inside = (file for file in root.rglob("*") if not is_hidden(file.relative_to(root).as_posix()))
        found = [file for file in inside if file.is_file() and file_format(file.name)]
    else:
        found = [known(Path(name)) for name in glob.glob(str(root), recursive=True) if Path(name).is_file()]
    if not found:
        raise missing(path)
    return sorted(found)


def download_s3(uri: str, folder: Path) -> list[Path]:
    """Copy an object, or every file of a known format under a prefix, into `folder`."""
    location = open_location(uri)
    names = [name for name in location.walk() if file_format(name)]
    if not names and file_format(location.name):
        names = [""]
    targets = []
    for name in names:
        # Before a path is made of it: the name of an object may hold anything, and lead anywhere.
        source = location / name if name else location
        target = folder / (name or location.name)
        try:
            source.download(target)
        except FileNotFoundError:
            raise missing(uri) from None
        targets.append(target)
    if not targets:
        raise missing(uri)
    return sorted(targets)


def download_url(url: str, folder: Path) -> list[Path]:
    """Copy the file behind an http(s) address into `folder`."""
    target = known(folder / PurePosixPath(unquote(urlsplit(url).path)).name)
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as answer, target.open("wb") as stream:
            shutil.copyfileobj(answer, stream)
            size = answer.headers["Content-Length"]
    except (OSError, ValueError, HTTPException) as error:
        if isinstance(error, HTTPError):
            # It holds the answer, whose connection nobody else closes.
            error.close()
        raise InputError(
            f"the corpus file cannot be downloaded: {failure(error)}",
            value=public(url),
            where="corpus.sources",
            remedy="check the address and the network, or download the file and name it by its path",
        ) from error
    if size not in (None, str(target.stat().st_size)):
        # The standard library takes a connection that broke off for the end of the file.
        raise StorageFault(
            "the download of the corpus file broke off",
            value=public(url),
            where="corpus.sources",
            remedy="run it again",
        )
    return [target]


def public(path: str) -> str:
    """A path or address without what may be a secret: user, password and query."""
    scheme, separator, rest = path.partition("://")
    if not separator:
        return path
    if scheme.lower() in ("http", "https"):
        rest = rest.partition("?")[0]
    host, slash, inside = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{inside}"


def failure(error: BaseException) -> str:
    """Kind and HTTP status of the error that began a chain. Not its text: it may quote a signed URL."""
    error = root(error)
    status = getattr(error, "code", None) or getattr(getattr(error, "response", None), "status_code", None)
    return type(error).__name__ + (f" {status}" if status else "")


def root(error: BaseException) -> BaseException:
    """The error that began a chain of errors."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__ or error
    return error


def known(path: Path) -> Path:
    """The same path; InputError if its suffix is no format that is read."""
    if file_format(path.name) is None:
        raise InputError(
            "the format of the corpus file is not known",
            value=path.name,
            where="corpus.sources",
            remedy=f"give a file that ends in {', '.join(FORMATS)}, or one of them and .gz",
        )
    return path


def missing(path: str) -> InputError:
    """The error for a path with nothing to read behind it."""
    return InputError(
        "there is no corpus file here",
        value=path,
        where="corpus.sources",
        remedy=f"name a file that exists, or a folder or glob with files that end in {', '.join(FORMATS)}",
    )
