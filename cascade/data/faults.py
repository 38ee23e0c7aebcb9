"""Which of the files of a corpus is broken, at which line, and why: `datasets` does not say."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

from datasets.exceptions import DatasetsError
from pyarrow.parquet import read_metadata

from cascade.data.files import file_format, root
from cascade.errors import InputError
from cascade.parsing import require_shallow

# Arrow's errors are ValueError and NotImplementedError; a cut .gz file is EOFError.
UNREADABLE = (DatasetsError, ValueError, NotImplementedError, OSError, EOFError, zlib.error)
PARQUET_MAGIC = b"PAR1"


@contextmanager
def broken_files_named(files: list[Path]) -> Iterator[None]:
    """Turn whatever fails while these files are read into an InputError that names the broken one."""
    try:
        yield
    except UNREADABLE as error:
        where, why = first_fault(files) or (", ".join(map(str, files[:3])), innermost(error))
        raise InputError(
            f"the corpus file cannot be read: {why}",
            value=where,
            where="corpus.sources",
            remedy="repair or remove it; all files of a source must hold the same columns",
        ) from error


def first_fault(files: list[Path]) -> tuple[str, str] | None:
    """Place (file, and line in JSON) and reason of the first fault; None if no file is at fault by itself."""
    for path in files:
        try:
            line = json_fault(path) if file_format(path.name) == "json" else None
            if line is not None:
                return f"{path}, line {line[0]}", line[1]
            parse(path)
        except UNREADABLE as error:
            return str(path), innermost(error)
    return None


def parse(path: Path) -> None:
    """Read a Parquet file's ends, or all of a text file; raises what is wrong with it."""
    with open_bytes(path) as stream:
        if file_format(path.name) == "parquet":
            ends = stream.read(4), stream.read()[-4:]
            if ends != (PARQUET_MAGIC, PARQUET_MAGIC):
                raise ValueError("it is cut off, or no Parquet file")
        elif file_format(path.name) == "text":
            for line in stream:
                line.decode()


def json_fault(path: Path) -> tuple[int, str] | None:
    """Line (from 1) and reason of the first fault of a JSON array or of JSON lines, or None."""
    with open_bytes(path) as stream:
        for number, text in values(stream):
            try:
                require_shallow(text)
                # A lone half of a surrogate pair has no encoding.
                json.dumps(json.loads(text, object_pairs_hook=unique), ensure_ascii=False).encode()
            except json.JSONDecodeError as error:
                return number + error.lineno - 1, error.msg
            except ValueError as error:
                return number, str(error)
    return None


def values(stream: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """The texts of a file's values and their first lines, counted from 1: of an array that is the whole file,
    otherwise every line that is not blank."""
    is_array = stream.read(1) == b"["
    stream.seek(0)
    if is_array:
        return iter([(1, stream.read())])
    return ((number, line) for number, line in enumerate(stream, 1) if line.strip())


def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """An object whose every key is there once; ValueError otherwise."""
    tree = dict(pairs)
    if len(tree) < len(pairs):
        raise ValueError("a key is there twice")
    return tree


def has_rows(path: Path) -> bool:
    """Whether there is something to read; raises what is wrong with a file that cannot be looked into."""
    kind = file_format(path.name)
    with open_bytes(path) as stream:
        if all(line.isspace() for line in stream):
            return False
    with open_bytes(path) as stream:
        if kind == "parquet":
            return bool(read_metadata(stream).num_rows)
        if kind == "json":
            # Arrow's reader would overrun the stack, which ends the process.
            for _, text in values(stream):
                require_shallow(text)
    return True


@contextmanager
def open_bytes(path: Path) -> Iterator[IO[bytes]]:
    """The file's bytes, unpacked if its name ends in .gz."""
    with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as stream:
        yield cast(IO[bytes], stream)


def innermost(error: BaseException) -> str:
    """The first line of the error that began a chain of errors."""
    error = root(error)
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
