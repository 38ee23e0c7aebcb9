"""The plan meets its budget closely, with legal sizes, at the lowest cost there is."""

from __future__ import annotations

import itertools
from collections.abc import Collection
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade.architecture import Architecture
from cascade.errors import InputError
from cascade.planning.axes import DEFAULT_AXES, Axis, ffn_step
from cascade.planning.budget import memory_budget, parameter_budget, ratio_budget
from cascade.planning.cost import cost_of_cuts
from cascade.planning.plan import TOLERANCE, describe, distinct, plan_child, rank_children
from tests.unit.planning.shapes import LLAMA3_8B, QWEN2_5_500M, SMOLLM2_135M, TINY

REAL = [SMOLLM2_135M, QWEN2_5_500M, LLAMA3_8B]


def plan(
    original: Architecture,
    seed: Architecture,
    *,
    ratio: float | None = None,
    parameters: int | None = None,
    axes: Collection[Axis] = DEFAULT_AXES,
) -> Architecture:
    """Plan by one of the two parameter dials."""
    budget = ratio_budget(original, ratio) if ratio is not None else parameter_budget(parameters or 0)
    return plan_child(original, seed, budget, axes)


def legal_by_hand(seed: Architecture) -> list[Architecture]:
    """Every legal shape of a seed with hidden 64, FFN 128 and 2 groups of 2 heads, as plain loops."""
    return [
        replace(seed, layers=layers, kv_groups=groups, hidden=hidden, ffn=ffn)
        for layers, groups, hidden, ffn in itertools.product(
            range(1, seed.layers + 1), (1, 2), range(8, 65, 8), range(8, 129, 8)
        )
    ]


def full(shape: Architecture, limit: float) -> bool:
    """Whether one more step of the FFN would be too much."""
    return shape.ffn < 128 and replace(shape, ffn=shape.ffn + 8).non_embedding_parameters > limit


def closest(parent: Architecture, ratio: float) -> float:
    """The least share that a child may keep: one step of the FFN below the ratio, or the tolerance."""
    narrower = replace(parent, ffn=parent.ffn - ffn_step(parent.ffn))
    step = 1 - narrower.non_embedding_parameters / parent.non_embedding_parameters
    return ratio - max(TOLERANCE * ratio, step)


@pytest.mark.parametrize("ratio", [0.95, 0.8, 0.5, 0.2])
def test_plan_is_the_best_of_every_legal_shape(ratio: float) -> None:
    limit = ratio * TINY.non_embedding_parameters
    within = [shape for shape in legal_by_hand(TINY) if shape.non_embedding_parameters <= limit]
    enough = min(max(shape.non_embedding_parameters for shape in within), limit * (1 - TOLERANCE))
    close = [shape for shape in within if shape.non_embedding_parameters >= enough or full(shape, limit)]
    child = plan(TINY, TINY, ratio=ratio)
    assert child in close
    assert cost_of_cuts(TINY, child) == min(cost_of_cuts(TINY, shape) for shape in close)


@given(st.sampled_from(REAL), st.floats(0.1, 0.97))
@settings(max_examples=12, deadline=None)
def test_child_is_within_a_step_below_its_ratio(parent: Architecture, ratio: float) -> None:
    child = plan(parent, parent, ratio=ratio)
    share = child.non_embedding_parameters / parent.non_embedding_parameters
    assert closest(parent, ratio) <= share <= ratio


@given(st.floats(0.2, 0.97))
@settings(max_examples=12, deadline=None)
def test_child_is_within_the_tolerance_below_its_parameters(share: float) -> None:
    limit = int(share * QWEN2_5_500M.parameters)
    child = plan(QWEN2_5_500M, QWEN2_5_500M, parameters=limit)
    assert (1 - TOLERANCE) * limit <= child.parameters <= limit


def test_ratio_counts_against_the_original_through_a_cascade() -> None:
    seed = SMOLLM2_135M
    for ratio in (0.85, 0.7, 0.55, 0.4, 0.3, 0.2):
        child = plan(SMOLLM2_135M, seed, ratio=ratio)
        share = child.non_embedding_parameters / SMOLLM2_135M.non_embedding_parameters
        assert closest(SMOLLM2_135M, ratio) <= share <= ratio
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
    child = plan(parent, parent, ratio=0.94, axes=axes)
    sizes = {axis.value: axis.size(child) for axis in axes}
    assert child == replace(parent, **sizes) != parent
    assert child.ffn == parent.ffn or child.ffn % 64 == 0
    assert child.hidden % child.heads == 0, "stock Llama configs refuse anything else"
    assert child.hidden == parent.hidden or child.hidden % 8 == 0


def test_groups_that_the_hidden_size_cannot_follow_are_never_chosen() -> None:
    # 7 groups of 4 are 28 heads, which do not divide 4096.
    child = plan(LLAMA3_8B, LLAMA3_8B, ratio=0.97, axes=(Axis.KV_GROUPS,))
    assert child.kv_groups == 4


def test_parents_that_break_the_head_rule_may_cut_without_it() -> None:
    odd = replace(LLAMA3_8B, hidden=4112)
    assert plan(odd, odd, ratio=0.97, axes=(Axis.KV_GROUPS,)).kv_groups == 6


@pytest.mark.parametrize(("ffn", "step"), [(11008, 64), (1024, 64), (1023, 32), (128, 8), (16, 1), (3, 1)])
def test_small_models_get_small_steps(ffn: int, step: int) -> None:
    assert ffn_step(ffn) == step


@pytest.mark.parametrize(
    ("dials", "what"),
    [
        ({"parameters": 0}, "needs parameters"),
        ({"ratio": 1.0}, "share of the parent"),
        ({"ratio": 0.0}, "share of the parent"),
    ],
)
def test_exactly_one_dial_in_range(dials: dict[str, float], what: str) -> None:
    with pytest.raises(InputError, match=what) as caught:
        plan(TINY, TINY, **dials)
    assert caught.value.remedy


def follow(remedy: str) -> dict[str, float]:
    """The dial that an error's remedy names in backquotes."""
    name, value = remedy.split("`")[1].split(": ")
    return {name: float(value) if name == "ratio" else int(value)}


@pytest.mark.parametrize("dials", [{"ratio": 0.85}, {"ratio": 0.9}, {"parameters": SMOLLM2_135M.parameters}])
def test_a_child_that_is_not_smaller_than_its_seed_is_refused_with_the_largest_that_is(
    dials: dict[str, float],
) -> None:
    seed = plan(SMOLLM2_135M, SMOLLM2_135M, ratio=0.85)
    with pytest.raises(InputError, match="not be smaller") as caught:
        plan(SMOLLM2_135M, seed, **dials)
    child = plan(SMOLLM2_135M, seed, **follow(caught.value.remedy))
    assert 0.95 * seed.parameters < child.parameters < seed.parameters


def test_nothing_left_to_cut_is_refused_with_the_advice_to_allow_more() -> None:
    seed = replace(TINY, kv_groups=1)
    with pytest.raises(InputError, match="not be smaller") as caught:
        plan(TINY, seed, ratio=0.99, axes=(Axis.KV_GROUPS,))
    assert caught.value.remedy == "allow more axes"


@pytest.mark.parametrize(
    ("dials", "axes"),
    [({"ratio": 0.01}, (Axis.LAYERS,)), ({"ratio": 0.2}, (Axis.FFN,)), ({"parameters": 1000}, tuple(Axis))],
)
def test_a_budget_below_every_legal_shape_names_the_nearest(
    dials: dict[str, float], axes: tuple[Axis, ...]
) -> None:
    with pytest.raises(InputError, match="no legal architecture") as caught:
        plan(SMOLLM2_135M, SMOLLM2_135M, axes=axes, **dials)
    nearest = plan(SMOLLM2_135M, SMOLLM2_135M, axes=axes, **follow(caught.value.remedy))
    with pytest.raises(InputError):
        plan(SMOLLM2_135M, SMOLLM2_135M, axes=axes, parameters=nearest.parameters - 1)


def test_a_budget_below_the_embeddings_says_so() -> None:
    embeddings = SMOLLM2_135M.embedding_parameters
    with pytest.raises(InputError, match=f"embeddings alone are {embeddings:,}"):
        plan(SMOLLM2_135M, SMOLLM2_135M, parameters=embeddings - 1, axes=(Axis.LAYERS, Axis.FFN))


def test_the_ranking_falls_in_cost_and_holds_only_shapes_within_the_budget() -> None:
    budget = ratio_budget(SMOLLM2_135M, 0.7)
    ranked = rank_children(SMOLLM2_135M, SMOLLM2_135M, budget)
    costs = [cost_of_cuts(SMOLLM2_135M, shape) for shape in ranked]
    assert costs == sorted(costs)
    assert len(set(ranked)) == len(ranked) > 20
    assert all(shape.non_embedding_parameters <= budget.limit for shape in ranked)


def test_distinct_shapes_are_the_best_of_each_kind() -> None:
    ranked = rank_children(SMOLLM2_135M, SMOLLM2_135M, ratio_budget(SMOLLM2_135M, 0.7))
    few = distinct(ranked, SMOLLM2_135M, 6)
    assert len(few) == 6
    assert few[0] == ranked[0]
    for left, right in itertools.combinations(few, 2):
        same = (left.hidden, left.kv_groups) == (right.hidden, right.kv_groups)
        assert not same or abs(left.layers - right.layers) >= 2
    assert distinct(ranked[:1], SMOLLM2_135M, 3) == ranked[:1]


@pytest.mark.parametrize("axes", [(Axis.FFN, Axis.LAYERS), (Axis.KV_GROUPS, Axis.FFN)])
def test_memory_counts_weights_and_cache(axes: tuple[Axis, ...]) -> None:
    budget = memory_budget(200_000_000, context=8192, bytes_per_value=2)
    child = plan_child(SMOLLM2_135M, SMOLLM2_135M, budget, axes)
    cache = 2 * child.layers * child.kv_groups * 64 * 8192 * 2
    assert (1 - TOLERANCE) * 200_000_000 < 2 * child.parameters + cache <= 200_000_000


def test_a_longer_context_leaves_less_memory_for_weights() -> None:
    sizes = [
        plan_child(SMOLLM2_135M, SMOLLM2_135M, memory_budget(250_000_000, context, 2)).parameters
        for context in (1024, 16384)
    ]
    assert sizes[0] > sizes[1]


def test_a_memory_budget_that_nothing_meets_names_what_would_do() -> None:
    with pytest.raises(InputError, match="no legal architecture") as caught:
        plan_child(SMOLLM2_135M, SMOLLM2_135M, memory_budget(1000, 1024, 2), (Axis.FFN,))
    need = int(caught.value.remedy.split("`memory: ")[1].split("`")[0])
    assert plan_child(SMOLLM2_135M, SMOLLM2_135M, memory_budget(need, 1024, 2), (Axis.FFN,)).ffn == 64


def test_a_memory_budget_below_the_embeddings_says_so() -> None:
    embeddings = 2 * SMOLLM2_135M.embedding_parameters
    budget = memory_budget(embeddings - 1, 1024, 2)
    with pytest.raises(InputError, match=f"embeddings alone are {embeddings:,} bytes"):
        plan_child(SMOLLM2_135M, SMOLLM2_135M, budget, (Axis.LAYERS, Axis.FFN))


def test_a_rotation_counts_the_extra_head_of_a_tied_parent() -> None:
    budget = parameter_budget(100_000_000)
    child = plan_child(SMOLLM2_135M, SMOLLM2_135M, budget, (Axis.HIDDEN,), rotates=True)
    assert not child.tied
    assert child.hidden < 576
    assert child.parameters == child.non_embedding_parameters + 2 * 49152 * child.hidden
    assert child.parameters <= budget.limit
    uncut = plan_child(SMOLLM2_135M, SMOLLM2_135M, budget, (Axis.LAYERS, Axis.FFN), rotates=True)
    assert uncut.tied


def test_description_is_one_line_with_every_size_and_the_count() -> None:
    line = describe(SMOLLM2_135M)
    for part in ("30 layers", "hidden 576", "FFN 1536", "9 heads in 3 KV groups", "size 64", "134,515,008"):
        assert part in line
    assert "\n" not in line
