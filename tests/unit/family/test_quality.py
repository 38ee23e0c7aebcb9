"""The quality gate: which figures it judges, against what, and what counts as enough."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from cascade.family.pilot import pilot_recipe
from cascade.family.quality import FIGURES, shortfalls, verdict_line, verdicts
from cascade.quality import Gate
from cascade.recipe import Recipe
from tests.tiny_family import tiny_tree

PARENT = {"held_out_ce": 2.0, "tokens_per_second": 100.0, "parameters": 1000}


def row(name: str = "small", **figures: float) -> dict[str, Any]:
    """A stage's row in an index."""
    known = {"held_out_ce": 2.5, "kl_to_parent": 0.25, "top1_agreement": 0.75, "tokens_per_second": 150.0}
    return {"name": name, "parameters": 500, **known, **figures}


def index(*stages: dict[str, Any], **limits: float) -> dict[str, Any]:
    """A family whose stages all have these limits."""
    recipe = {"stages": [{"name": stage["name"], "gate": limits} for stage in stages]}
    return {"family": "tiny", "parent": PARENT, "recipe": recipe, "stages": list(stages)}


@pytest.mark.parametrize(
    ("figure", "value", "enough", "short"),
    [
        ("loss_above_parent", 0.5, 0.5, 0.49),
        ("loss_above_stable", 0.25, 0.25, 0.2),
        ("kl_to_parent", 0.25, 0.25, 0.24),
        ("top1_agreement", 0.75, 0.75, 0.76),
        ("parameters", 500, 500, 499),
        ("speed_of_parent", 1.5, 1.5, 1.6),
        ("speed_of_stable", 0.75, 0.75, 0.8),
    ],
)
def test_a_limit_is_kept_up_to_its_own_value(figure: str, value: float, enough: float, short: float) -> None:
    stable = index(row(held_out_ce=2.25, tokens_per_second=200.0))
    for limit, passed in ((enough, True), (short, False)):
        (found,) = verdicts(index(row(), **{figure: limit}), stable)
        assert (found["stage"], found["figure"], found["value"]) == ("small", figure, value)
        assert (found["limit"], found["passed"]) == (limit, passed)


def test_every_limit_of_a_recipe_is_judged() -> None:
    assert list(FIGURES) == list(Gate.model_fields)


def test_without_limits_there_is_nothing_to_fall_short_of() -> None:
    assert verdicts(index(row()), index(row())) == []
    older = index(row())
    older["recipe"]["stages"] = [{"name": "small"}]
    assert verdicts(older, None) == []


def test_what_is_compared_with_stable_counts_where_it_has_such_a_stage() -> None:
    limits = {"loss_above_stable": 0.0, "speed_of_stable": 1.0, "loss_above_parent": 1.0}
    family = index(row("small"), row("new"), **limits)
    assert [found["figure"] for found in verdicts(family, None)] == ["loss_above_parent"] * 2
    found = verdicts(family, index(row("small")))
    assert [(one["stage"], one["figure"]) for one in found] == [
        ("small", "loss_above_stable"),
        ("small", "speed_of_stable"),
        ("small", "loss_above_parent"),
        ("new", "loss_above_parent"),
    ]
    assert all(one["passed"] for one in found)


@pytest.mark.parametrize("figure", ["kl_to_parent", "top1_agreement"])
def test_no_number_keeps_no_limit(figure: str) -> None:
    (found,) = verdicts(index(row(**{figure: math.nan}), **{figure: 1.0}), None)
    assert not found["passed"]


def test_only_stages_that_are_built_are_judged_and_what_fell_short_is_told_by_stage() -> None:
    family = index(row("large"), row("small", kl_to_parent=0.75), kl_to_parent=0.5)
    family["recipe"]["stages"].append({"name": "smaller", "gate": {"kl_to_parent": 0.5}})
    rows = verdicts(family, None)
    assert [one["stage"] for one in rows] == ["large", "small"]
    failed = shortfalls(rows)
    assert list(failed) == ["small"]
    assert verdict_line(failed["small"][0]) == "small: kl_to_parent is 0.75, at most 0.5"


def test_a_pilot_on_a_small_budget_has_no_limits() -> None:
    tree = tiny_tree(Path("parent"), Path("corpus.jsonl"))
    tree["stages"][0]["gate"] = {"kl_to_parent": 0.1}
    recipe = Recipe.model_validate(tree)
    assert recipe.stages[0].gate == Gate(kl_to_parent=0.1)
    assert [stage.gate for stage in pilot_recipe(recipe, 1, 1000).stages] == [Gate(), Gate()]
