"""Documents out of tables and text files, read by `datasets`; its errors become ours."""

from __future__ import annotations

import glob
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import datasets
from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError, RepositoryNotFoundError

from cascade.data.faults import UNREADABLE, broken_files_named, has_rows, innermost
from cascade.data.files import failure, file_format, root
from cascade.errors import InputError

ROWS_AT_ONCE = 1000
# A larger text file is a collection: cut at blank lines into documents of about the second size.
LARGEST_TEXT_DOCUMENT = 100_000
TEXT_DOCUMENT = 8_000
# What the builders of `datasets` do not share with one another.
BUILDER_OPTIONS: dict[str, dict[str, object]] = {
    "json": {"parse_agent_traces": False},
    "parquet": {},
    "text": {"sample_by": "document"},
}


def file_documents(files: list[Path], field: str) -> Iterator[str]:
    """Documents of local files, format by format in the order of the files; blank ones included.

    `datasets` keeps an Arrow copy in a temporary folder while the documents are read. InputError names the
    first broken file and, in JSON, its line.
    """
    quiet()
    for kind in sorted({str(file_format(path.name)) for path in files}):
        chosen = [path for path in files if file_format(path.name) == kind]
        with tempfile.TemporaryDirectory(prefix="cascade-corpus-") as cache, broken_files_named(chosen):
            # `datasets` fails on a file without a single row.
            if filled := [path for path in chosen if has_rows(path)]:
                for text in texts(load_files(kind, filled, cache), field, where=str(filled[0])):
                    yield from split_text(text) if kind == "text" else (text,)


def load_files(kind: str, files: list[Path], cache: str) -> datasets.Dataset:
    """The table that `datasets` makes of files of one format."""
    names = [glob.escape(str(path.absolute())) for path in files]
    return datasets.load_dataset(
        kind, data_files=names, split="train", cache_dir=cache, **BUILDER_OPTIONS[kind]
    )


def hub_documents(path: str, config: str | None, split: str, field: str) -> Iterator[str]:
    """Documents of one split of a hub data set, at its current commit."""
    quiet()
    revision = hub_revision(path)
    try:
        dataset = datasets.load_dataset(path, config, split=split, revision=revision)
    except (*UNREADABLE, HTTPError) as error:
        raise InputError(
            f"the hub data set cannot be loaded: {refusal(error)}",
            value=path,
            where=f"corpus.sources, configuration {config or 'default'}, split {split}",
            remedy="check `config` and `split` on the data set's page",
        ) from error
    yield from texts(dataset, field, where=path)


def refusal(error: BaseException) -> str:
    """What `datasets` says of a configuration or split; of a failed request only its kind and status."""
    cause = root(error)
    is_text = isinstance(cause, ValueError) and not isinstance(cause, OSError) and "?" not in str(cause)
    return innermost(cause) if is_text else failure(cause)


def hub_revision(path: str) -> str:
    """The commit a hub data set is at now; InputError if there is none or the hub is out of reach."""
    try:
        return str(HfApi().dataset_info(path).sha)
    except RepositoryNotFoundError as error:
        raise InputError(
            "there is neither such a file here nor such a data set on the hub, or it is not public",
            value=path,
            where="corpus.sources",
            remedy="check the spelling; for a private or gated data set set HF_TOKEN",
        ) from error
    except (HTTPError, OSError) as error:
        raise InputError(
            f"there is no such file here, and the hub cannot be reached: {failure(error)}",
            value=path,
            where="corpus.sources",
            remedy="check the network and HF_HUB_OFFLINE, or name `embedded` or a local file",
        ) from error


def texts(dataset: datasets.Dataset, field: str, where: str) -> Iterator[str]:
    """One column of a table as text (null becomes ""); InputError if it is absent or not text."""
    if field not in dataset.features:
        raise InputError(
            "the corpus has no such field",
            value=field,
            where=where,
            remedy=f"set `field` to one of: {', '.join(dataset.features)}",
        )
    kind = getattr(dataset.features[field], "dtype", None)
    if kind not in ("string", "large_string"):
        raise InputError(
            "the field of the corpus is not text",
            value=f"{field} ({kind or type(dataset.features[field]).__name__})",
            where=where,
            remedy=f"set `field` to a column of strings; there are: {', '.join(dataset.features)}",
        )
    for batch in dataset.select_columns([field]).iter(ROWS_AT_ONCE):
        yield from (text or "" for text in batch[field])


def split_text(text: str) -> Iterator[str]:
    """A text file's documents: itself up to 100 kB, else parts that end at a blank line past 8 kB.

    Where no blank line follows within another 8 kB, a part ends with its line. Sizes count characters.
    Shorter parts (a line, a paragraph) would teach a language model no context, and one huge document
    would fall to the held-out or to the training side as a whole.
    """
    if len(text) <= LARGEST_TEXT_DOCUMENT:
        yield text
        return
    part: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        part.append(line)
        size += len(line)
        if size >= (TEXT_DOCUMENT if not line.strip() else 2 * TEXT_DOCUMENT):
            yield "".join(part)
            part, size = [], 0
    yield "".join(part)


def quiet() -> None:
    """No progress bars and no log lines of `datasets`: the caller reports, and every failure is raised."""
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
