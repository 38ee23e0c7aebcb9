"""Hub data sets: pinned to a commit, and clear about what is out of reach. No test talks to the hub."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import datasets
import httpx2
import huggingface_hub.constants
import pytest
from huggingface_hub.errors import RepositoryNotFoundError

from cascade.data import tables
from cascade.data.sources import Source, documents, fingerprint
from cascade.errors import InputError


class Hub:
    """Stands in for the hub: a commit to be at, or an error to answer with, and the calls it saw."""

    def __init__(self) -> None:
        self.commit = "c0ffee"
        self.error: Exception | None = None
        self.calls: list[tuple[Any, ...]] = []

    def dataset_info(self, path: str) -> SimpleNamespace:
        """What `HfApi` says about a data set."""
        if self.error:
            raise self.error
        return SimpleNamespace(sha=self.commit)

    def load(self, path: str, config: str | None, split: str, revision: str) -> datasets.Dataset:
        """What `datasets` loads."""
        self.calls.append((path, config, split, revision))
        if split == "nowhere":
            raise ValueError('Unknown split "nowhere". Should be one of ["train"].')
        return datasets.Dataset.from_dict({"body": ["One.", "", "Two."]})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    stand_in = Hub()
    monkeypatch.setattr(tables, "HfApi", lambda: stand_in)
    monkeypatch.setattr(datasets, "load_dataset", stand_in.load)
    return stand_in


def test_a_data_set_is_read_at_one_commit(hub: Hub) -> None:
    source = Source("owner/books", field="body", split="test", config="en")
    assert list(documents(source)) == ["One.", "Two."]
    assert hub.calls == [("owner/books", "en", "test", "c0ffee")]


def test_the_fingerprint_changes_with_the_commit_and_with_what_is_taken(hub: Hub) -> None:
    prints = {fingerprint(Source("owner/books")), fingerprint(Source("owner/books", config="en"))}
    hub.commit = "decaf"
    prints |= {fingerprint(Source("owner/books")), fingerprint(Source("owner/books", split="test"))}
    assert len(prints) == 4


def test_an_unknown_split_says_what_there_is(hub: Hub) -> None:
    with pytest.raises(InputError, match="Should be one of") as caught:
        list(documents(Source("owner/books", split="nowhere")))
    assert "split nowhere" in caught.value.where


def test_a_data_set_that_does_not_exist_is_told_apart_from_a_hub_out_of_reach(hub: Hub) -> None:
    request = httpx2.Request("GET", "https://hub.invalid")
    hub.error = RepositoryNotFoundError("gone", response=httpx2.Response(404, request=request))
    with pytest.raises(InputError, match="neither such a file here nor") as caught:
        fingerprint(Source("books"))
    assert caught.value.value == "books"
    hub.error = httpx2.ConnectError("Name or service not known")
    with pytest.raises(InputError, match="cannot be reached: ConnectError\n"):
        fingerprint(Source("books"))


def test_a_failed_request_is_told_by_kind_and_status_without_its_address(hub: Hub) -> None:
    address = "https://hub.invalid/file?signature=SECRET"
    answer = httpx2.Response(403, request=httpx2.Request("GET", address))
    hub.error = httpx2.HTTPStatusError(f"403 for {address}", request=answer.request, response=answer)
    with pytest.raises(InputError, match="cannot be reached: HTTPStatusError 403\n") as caught:
        fingerprint(Source("books"))
    assert "SECRET" not in str(caught.value)
    for error in (hub.error, ValueError(f"bad url {address}"), ConnectionError(f"with url: {address}")):
        assert "SECRET" not in tables.refusal(error)


def test_offline_mode_is_a_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="cannot be reached") as caught:
        list(documents(Source("owner/books")))
    assert "HF_HUB_OFFLINE" in caught.value.remedy
