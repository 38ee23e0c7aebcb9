"""Successive halving: who is run, who goes on, and how ties end."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from cascade.errors import CascadeError, InputError, StorageFault
from cascade.family.graph import Node
from cascade.family.race import race
from cascade.kinds import Kind

Curves = list[list[float]]
BAD = float("nan")
FAILED = CascadeError("the loss of step 3 is not finite", where="here", remedy="none")


def stage_of(curves: Curves) -> Any:
    """A stage whose candidate i has the cross-entropy curves[i][leg] after a leg."""

    def node(kind: Kind, index: int, leg: int = 0) -> Node:
        return Node(kind, "stage", "family", {"index": index, "leg": leg})

    candidates = [
        SimpleNamespace(
            pruned=node(Kind.PRUNED, index), legs=[node(Kind.RACED, index, leg) for leg in range(len(curve))]
        )
        for index, curve in enumerate(curves)
    ]
    return SimpleNamespace(candidates=candidates)


def run(curves: Curves, failure: CascadeError = FAILED) -> tuple[int, list[tuple[str, int, int]]]:
    """The winner, and the nodes that were made."""
    made: list[tuple[str, int, int]] = []

    def make(node: Node) -> Any:
        index, leg = node.section["index"], node.section["leg"]
        made.append((node.kind.value, index, leg))
        if node.kind is Kind.RACED and math.isnan(curves[index][leg]):
            raise failure
        ends = {"ce": curves[index][leg]} if node.kind is Kind.RACED else {}
        return SimpleNamespace(facts={"end": ends})

    return race(stage_of(curves), make), made


def test_the_better_half_goes_on_and_the_others_never_run_again() -> None:
    winner, made = run([[4.0, 3.0], [3.0, 2.9], [5.0, 0.0], [3.5, 2.0]])
    assert winner == 3
    assert [(index, leg) for kind, index, leg in made if kind == "raced"] == [
        (0, 0),
        (1, 0),
        (2, 0),
        (3, 0),
        (1, 1),
        (3, 1),
    ]


def test_every_cut_comes_before_its_training() -> None:
    _, made = run([[1.0], [2.0]])
    assert made == [("pruned", 0, 0), ("raced", 0, 0), ("pruned", 1, 0), ("raced", 1, 0)]


@pytest.mark.parametrize("count", [2, 3, 5, 8])
def test_an_odd_half_is_rounded_up_and_one_remains(count: int) -> None:
    legs = (count - 1).bit_length()
    winner, made = run([[float(index)] * legs for index in reversed(range(count))])
    assert winner == count - 1
    last = [index for kind, index, leg in made if kind == "raced" and leg == legs - 1]
    assert len(last) == 2


def test_of_equals_the_one_that_the_planner_ranks_higher_goes_on() -> None:
    assert run([[2.0, 2.0], [2.0, 2.0], [2.0, 2.0]])[0] == 0


def test_a_candidate_whose_training_fails_comes_last() -> None:
    winner, made = run([[BAD, BAD], [3.0, BAD], [5.0, 5.0], [6.0, 6.0]])
    assert winner == 2
    assert ("raced", 0, 1) not in made


@pytest.mark.parametrize(
    "failure",
    [FAILED, StorageFault("x", where="here", remedy="none"), InputError("x", where="here", remedy="none")],
)
def test_what_is_no_fault_of_one_candidate_ends_the_race(failure: CascadeError) -> None:
    curves = [[BAD], [BAD]] if failure is FAILED else [[1.0], [BAD]]
    with pytest.raises(type(failure)):
        run(curves, failure)
