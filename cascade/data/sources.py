"""Where documents come from: the embedded text, files, URLs, buckets and hub data sets."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

from cascade.data import embedded
from cascade.data.files import FORMATS, file_format, is_file_path, local_files, public
from cascade.errors import InputError
from cascade.storage.local import file_sha256

EMBEDDED = "embedded"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class Source:
    """One source of documents, as the recipe names it.

    path: `embedded`; a file, glob or folder of .jsonl, .json, .parquet or .txt files (also with .gz); the
    http(s) or s3 address of one such file, or an s3 folder of them; or the id of a hub data set.
    field: the column that holds the text. split, config: for hub data sets only.
    """

    path: str
    field: str = "text"
    split: str = "train"
    config: str | None = None


def documents(source: Source) -> Iterator[str]:
    """The documents of a source that are not blank, in a fixed order.

    A row of a table is a document. A text file is one document, unless it is large: see `split_text`.
    InputError (raised as soon as it is known, at the latest with the last document): no such source, unknown
    format, no such field, not text, unreadable content (file and line), hub out of reach, no document.
    """
    check(source)
    count = 0
    for text in _raw_documents(source):
        if text.strip():
            count += 1
            yield text
    if count == 0:
        raise InputError(
            "the corpus source holds no text",
            value=public(source.path),
            where="corpus.sources",
            remedy="remove the source, or name one with at least one document that is not blank",
        )


def fingerprint(source: Source) -> str:
    """Hex sha256 of the source's content; where it lies does not matter.

    Embedded: see `embedded.fingerprint`. Files: formats and contents (remote files are read in full).
    A hub data set: its id, configuration, split and current commit. InputError as in `documents`.
    """
    check(source)
    if source.path == EMBEDDED:
        return embedded.fingerprint()
    if not is_file_path(source.path):
        # `datasets` takes seconds to import, which the embedded corpus does without.
        from cascade.data.tables import hub_revision

        parts = ["hub", source.path, str(source.config), source.split, hub_revision(source.path)]
        return _digest(parts)
    return _digest(sorted(_files(source)))


def contents(source: Source) -> frozenset[str]:
    """What identifies each file of a source, or the whole of one without files."""
    if source.path == EMBEDDED or not is_file_path(source.path):
        return frozenset({fingerprint(source)})
    check(source)
    return frozenset(_files(source))


def _files(source: Source) -> list[str]:
    """Format and content of each."""
    with local_files(source.path) as files:
        return [f"{file_format(path.name)} {file_sha256(path)}" for path in files]


def check(source: Source) -> None:
    """Refuse, without reading anything, a path of no known kind, or options that its kind does not have."""
    if source.path != public(source.path):
        raise InputError(
            "the address of the corpus source holds a user, a password or a query, which may be a secret",
            value=public(source.path),
            where="corpus.sources",
            remedy="recipes are stored with what they make: name a file you downloaded, or an s3:// address "
            "whose credentials come from the environment",
        )
    if source.path == EMBEDDED or is_file_path(source.path):
        stated = {"split": source.split != "train", "config": source.config is not None}
        for name in (name for name, is_stated in stated.items() if is_stated):
            raise InputError(
                f"only hub data sets have a `{name}`",
                value=getattr(source, name),
                where=f"corpus.sources, {public(source.path)}",
                remedy=f"remove `{name}`",
            )
    elif HUB_ID.fullmatch(source.path) is None:
        raise InputError(
            "the corpus source is neither a file nor the id of a hub data set",
            value=source.path,
            where="corpus.sources",
            remedy=f"name `{EMBEDDED}`, a hub data set, or a file that exists: {', '.join(FORMATS)}",
        )


def _raw_documents(source: Source) -> Iterator[str]:
    if source.path == EMBEDDED:
        yield from embedded.documents()
        return
    from cascade.data.tables import file_documents, hub_documents

    if not is_file_path(source.path):
        yield from hub_documents(source.path, source.config, source.split, source.field)
        return
    with local_files(source.path) as files:
        yield from file_documents(files, source.field)


def _digest(parts: list[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
