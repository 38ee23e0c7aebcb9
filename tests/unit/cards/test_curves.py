"""The course of a training from its steps, however many there are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from cascade.cards.curves import MOST, Thinned, course


def steps(count: int, **more: Any) -> Iterator[str]:
    for step in range(count):
        yield json.dumps({"step": step, "tokens": 64 * (step + 1), "loss": float(step), **more}) + "\n"


def test_few_steps_are_all_there() -> None:
    found = course("distilled", steps(3))
    assert found.loss == [(64, 0.0), (128, 1.0), (192, 2.0)]
    assert (found.kind, found.tokens, found.watched) == ("distilled", 192, [])


@pytest.mark.parametrize("count", [MOST, MOST + 1, 1234, 20_000])
def test_many_steps_become_means_of_neighbours(count: int) -> None:
    found = course("distilled", steps(count)).loss
    assert MOST / 2 <= len(found) <= MOST
    # Loss is the step's number, so a mean's place says its value.
    assert [x for x, _ in found] == pytest.approx([64 * (y + 1) for _, y in found])
    assert found[-1][1] == pytest.approx(count - 1, abs=count / MOST * 2)


def test_what_was_watched_is_a_line_of_its_own() -> None:
    lines = [*steps(2, watched_ce=None), *steps(1, watched_ce=2.5)]
    assert course("distilled", lines).watched == [(64, 2.5)]


def test_what_is_not_finite_is_left_out() -> None:
    line = Thinned()
    for x, y in ((1.0, float("nan")), (2.0, 1.0), (3.0, float("inf"))):
        line.add(x, y)
    assert line.points == [(2.0, 1.0)]


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"tokens": 1, "loss": null}', '"x"'])
def test_other_files_are_refused(text: str) -> None:
    with pytest.raises((LookupError, TypeError, ValueError)):
        course("distilled", [text])
