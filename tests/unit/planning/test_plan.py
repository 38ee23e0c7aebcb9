"""The plan meets its budget closely, with legal sizes, at the lowest cost there is."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade.architecture import Architecture
from cascade.errors import InputError
from cascade.planning.axes import DEFAULT_AXES, Axis, ffn_step
from cascade.planning.cost import cost_of_cuts
from cascade.planning.plan import TOLERANCE, describe, plan_child
from tests.unit.planning.shapes import LLAMA3_8B, QWEN2_5_500M, SMOLLM2_135M, TINY

REAL = [SMOLLM2_135M, QWEN2_5_500M, LLAMA3_8B]


def legal_by_hand(seed: Architecture) -> list[Architecture]:
    """Every legal shape of a seed with hidden 64, FFN 128 and 2 groups of 2 heads, as plain loops."""
    return [
        replace(seed, layers=layers, kv_groups=groups, hidden=hidden, ffn=ffn)
        for layers, groups, hidden, ffn in itertools.product(
            range(1, seed.layers + 1), (1, 2), range(8, 65, 8), range(8, 129, 8)
        )
    ]


@pytest.mark.parametrize("ratio", [0.95, 0.8, 0.5, 0.2])
def test_plan_is_the_best_of_every_legal_shape(ratio: float) -> None:
    limit = ratio * TINY.non_embedding_parameters
    within = [shape for shape in legal_by_hand(TINY) if shape.non_embedding_parameters <= limit]
    enough = min(max(shape.non_embedding_parameters for shape in within), limit * (1 - TOLERANCE))
    close = [shape for shape in within if shape.non_embedding_parameters >= enough]
    child = plan_child(TINY, TINY, ratio=ratio)
    assert child in close
    assert cost_of_cuts(TINY, child) == min(cost_of_cuts(TINY, shape) for shape in close)


@given(st.sampled_from(REAL), st.floats(0.1, 0.97))
@settings(max_examples=12, deadline=None)
def test_child_is_within_two_percent_below_its_ratio(parent: Architecture, ratio: float) -> None:
    child = plan_child(parent, parent, ratio=ratio)
    share = child.non_embedding_parameters / parent.non_embedding_parameters
    assert ratio - TOLERANCE * ratio <= share <= ratio


@given(st.floats(0.2, 0.97))
@settings(max_examples=12, deadline=None)
def test_child_is_within_two_percent_below_its_parameters(share: float) -> None:
    limit = int(share * QWEN2_5_500M.parameters)
    child = plan_child(QWEN2_5_500M, QWEN2_5_500M, parameters=limit)
    assert (1 - TOLERANCE) * limit <= child.parameters <= limit


def test_ratio_counts_against_the_original_through_a_cascade() -> None:
    seed = SMOLLM2_135M
    for ratio in (0.85, 0.7, 0.55, 0.4, 0.3, 0.2):
        child = plan_child(SMOLLM2_135M, seed, ratio=ratio)
        share = child.non_embedding_parameters / SMOLLM2_135M.non_embedding_parameters
        assert 0.98 * ratio <= share <= ratio
        assert all(axis.size(child) <= axis.size(seed) for axis in Axis)
        assert child.ffn % 64 == 0
        seed = child


@pytest.mark.parametrize("parent", REAL)
@pytest.mark.parametrize(
    "axes", [(axis,) for axis in DEFAULT_AXES] + [(Axis.HIDDEN, Axis.KV_GROUPS), tuple(Axis)]
)
def test_only_the_allowed_axes_are_cut_to_friendly_sizes(
    parent: Architecture, axes: tuple[Axis, ...]
) -> None:
    child = plan_child(parent, parent, ratio=0.94, axes=axes)
    sizes = {axis.value: axis.size(child) for axis in axes}
    assert child == replace(parent, **sizes) != parent
    assert child.ffn == parent.ffn or child.ffn % 64 == 0
    assert child.hidden % child.heads == 0, "stock Llama configs refuse anything else"
    assert child.hidden == parent.hidden or child.hidden % 8 == 0


def test_groups_that_the_hidden_size_cannot_follow_are_never_chosen() -> None:
    # 7 groups of 4 are 28 heads, which do not divide 4096.
    child = plan_child(LLAMA3_8B, LLAMA3_8B, ratio=0.97, axes=(Axis.KV_GROUPS,))
    assert child.kv_groups == 4


def test_parents_that_break_the_head_rule_may_cut_without_it() -> None:
    odd = replace(LLAMA3_8B, hidden=4112)
    assert plan_child(odd, odd, ratio=0.97, axes=(Axis.KV_GROUPS,)).kv_groups == 6


@pytest.mark.parametrize(("ffn", "step"), [(11008, 64), (1024, 64), (1023, 32), (128, 8), (16, 1), (3, 1)])
def test_small_models_get_small_steps(ffn: int, step: int) -> None:
    assert ffn_step(ffn) == step


@pytest.mark.parametrize(
    ("dials", "what"),
    [
        ({}, "no size is set"),
        ({"parameters": 1000, "ratio": 0.5}, "two dials"),
        ({"parameters": 0}, "needs parameters"),
        ({"ratio": 1.0}, "share of the parent"),
        ({"ratio": 0.0}, "share of the parent"),
    ],
)
def test_exactly_one_dial_in_range(dials: dict[str, float], what: str) -> None:
    with pytest.raises(InputError, match=what) as caught:
        plan_child(TINY, TINY, **dials)  # type: ignore[arg-type]
    assert caught.value.remedy


def follow(remedy: str) -> dict[str, float]:
    """The dial that an error's remedy names in backquotes."""
    name, value = remedy.split("`")[1].split(": ")
    return {name: float(value) if name == "ratio" else int(value)}


@pytest.mark.parametrize("dials", [{"ratio": 0.85}, {"ratio": 0.9}, {"parameters": SMOLLM2_135M.parameters}])
def test_a_child_that_is_not_smaller_than_its_seed_is_refused_with_the_largest_that_is(
    dials: dict[str, float],
) -> None:
    seed = plan_child(SMOLLM2_135M, SMOLLM2_135M, ratio=0.85)
    with pytest.raises(InputError, match="not be smaller") as caught:
        plan_child(SMOLLM2_135M, seed, **dials)  # type: ignore[arg-type]
    child = plan_child(SMOLLM2_135M, seed, **follow(caught.value.remedy))  # type: ignore[arg-type]
    assert 0.95 * seed.parameters < child.parameters < seed.parameters


def test_nothing_left_to_cut_is_refused_with_the_advice_to_allow_more() -> None:
    seed = replace(TINY, kv_groups=1)
    with pytest.raises(InputError, match="not be smaller") as caught:
        plan_child(TINY, seed, ratio=0.99, axes=(Axis.KV_GROUPS,))
    assert caught.value.remedy == "allow more axes"


@pytest.mark.parametrize(
    ("dials", "axes"),
    [({"ratio": 0.01}, (Axis.LAYERS,)), ({"ratio": 0.2}, (Axis.FFN,)), ({"parameters": 1000}, tuple(Axis))],
)
def test_a_budget_below_every_legal_shape_names_the_nearest(
    dials: dict[str, float], axes: tuple[Axis, ...]
) -> None:
    with pytest.raises(InputError, match="no legal architecture") as caught:
        plan_child(SMOLLM2_135M, SMOLLM2_135M, axes=axes, **dials)  # type: ignore[arg-type]
    nearest = plan_child(SMOLLM2_135M, SMOLLM2_135M, axes=axes, **follow(caught.value.remedy))  # type: ignore[arg-type]
    with pytest.raises(InputError):
        plan_child(SMOLLM2_135M, SMOLLM2_135M, axes=axes, parameters=nearest.parameters - 1)


def test_a_budget_below_the_embeddings_says_so() -> None:
    embeddings = SMOLLM2_135M.embedding_parameters
    with pytest.raises(InputError, match=f"embeddings alone are {embeddings:,}"):
        plan_child(SMOLLM2_135M, SMOLLM2_135M, parameters=embeddings - 1, axes=(Axis.LAYERS, Axis.FFN))


def test_description_is_one_line_with_every_size_and_the_count() -> None:
    line = describe(SMOLLM2_135M)
    for part in ("30 layers", "hidden 576", "FFN 1536", "9 heads in 3 KV groups", "size 64", "134,515,008"):
        assert part in line
    assert "\n" not in line
