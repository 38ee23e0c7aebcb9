"""Parents on the Hugging Face hub: pinned to one commit, fetched file by file, named faults."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx

from cascade.errors import InputError, StorageFault
from cascade.models.folders import no_progress_bars

DESCRIPTION = ("*.json", "*.jinja", "*.model", "*.txt")
TOKEN = "set HF_TOKEN to a token that may read it"


def snapshot(repository: str, revision: str | None, *, weights: bool, code: bool) -> Path:
    """Fetch config and tokenizer, on request weights and code, into the hub's own cache.

    revision: branch, tag or commit; None is the main branch. The folder is named after the commit.
    Without a network the newest copy in the cache is used. Raises InputError when there is no such
    model, no access to it or no hub; StorageFault when the hub fails in the middle of the weights.
    """
    patterns = [*DESCRIPTION, *(["*.safetensors"] if weights else []), *(["*.py"] if code else [])]
    with _hub_faults(repository, revision, weights), no_progress_bars():
        return Path(
            snapshot_download(repository, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"])
        )


def file_names(repository: str, commit: str) -> list[str] | None:
    """Names of the files beside the config; None without a network."""
    try:
        names = HfApi().list_repo_files(repository, revision=commit)
    except (httpx.HTTPError, OSError):
        return None
    return sorted(name for name in names if "/" not in name)


@contextlib.contextmanager
def _hub_faults(repository: str, revision: str | None, weights: bool) -> Iterator[None]:
    """Turn the hub's errors into ours; none of them repeats a token."""
    try:
        yield
    except GatedRepoError as error:
        remedy = f"accept the model's terms on its page, then {TOKEN}"
        raise _refusal("access to this model is gated", repository, remedy) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        remedy = (
            f"check the spelling; if the model is private, {TOKEN}; a folder has to exist on this machine"
        )
        raise _refusal("the hub has no such model", repository, remedy) from error
    except RevisionNotFoundError as error:
        raise _refusal(f"the model has no revision {revision}", repository, "check the revision") from error
    except (LocalEntryNotFoundError, httpx.HTTPError, OSError) as error:
        what = f"the hub cannot be reached ({_reason(error)}), and its cache on this machine has no copy"
        remedy = "check the network (and HF_HUB_OFFLINE, HF_ENDPOINT), or give the model as a folder"
        if weights and not isinstance(error.__cause__, OfflineModeIsEnabled):
            raise StorageFault(what, value=repository, where="parent", remedy=remedy) from error
        raise _refusal(what, repository, remedy) from error


def _reason(error: BaseException) -> str:
    """The kind of the first error in the chain: its text may hold a URL with a signature."""
    return type(error.__cause__ or error).__name__


def _refusal(what: str, repository: str, remedy: str) -> InputError:
    return InputError(what, value=repository, where="parent", remedy=remedy)
