"""Errors of ours cross the border of a process, whole."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator

import pytest

from cascade.errors import ERROR_TYPES, CascadeError, from_record


def kinds(kind: type[CascadeError] = CascadeError) -> Iterator[type[CascadeError]]:
    """The class and all that come from it."""
    yield kind
    for inner in kind.__subclasses__():
        yield from kinds(inner)


WAYS: dict[str, Callable[[CascadeError], CascadeError]] = {
    "pickle": lambda error: pickle.loads(pickle.dumps(error)),
    "json": lambda error: from_record(json.loads(json.dumps(error.record()))),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", list(kinds()), ids=lambda kind: kind.__name__)
def test_an_error_arrives_as_it_was(kind: type[CascadeError], way: str) -> None:
    error = kind("it is wrong", value=7, where="there", remedy="mend it")
    arrived = WAYS[way](error)
    assert type(arrived) is kind
    assert str(arrived) == str(error) == "it is wrong\n  value: 7\n  where: there\n  way out: mend it"
    assert arrived.record() == error.record()


def test_every_kind_is_known_by_its_name() -> None:
    assert set(ERROR_TYPES.values()) == set(kinds())
