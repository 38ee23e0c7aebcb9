"""The expected cost of cuts against the measurement it comes from."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cascade.planning.axes import Axis
from cascade.planning.cost import FITTED, PLAIN, cost_of_cuts
from tests.unit.planning.shapes import LLAMA3_8B, SMOLLM2_135M

# (layers, FFN, KV groups) of SmolLM2-135M: rise of the cross-entropy right after pruning, measured as said
# in cascade/planning/cost.py; by the share of the non-embedding parameters that stays, to 3 %.
SAME_SIZE = {
    0.75: {
        (30, 1024, 3): 0.342,
        (30, 1152, 2): 0.438,
        (28, 1152, 3): 0.552,
        (26, 1280, 3): 0.695,
        (23, 1536, 3): 1.055,
    },
    0.50: {
        (30, 512, 3): 1.083,
        (30, 640, 2): 0.987,
        (27, 768, 2): 1.127,
        (27, 640, 3): 1.237,
        (25, 768, 3): 1.192,
        (25, 896, 2): 1.159,
        (23, 896, 3): 1.406,
    },
}


@pytest.mark.parametrize("ratio", SAME_SIZE)
def test_the_cheapest_shape_measured_within_a_tenth_of_a_nat_of_the_best(ratio: float) -> None:
    rises = SAME_SIZE[ratio]
    cost = {
        sizes: cost_of_cuts(
            SMOLLM2_135M, replace(SMOLLM2_135M, layers=sizes[0], ffn=sizes[1], kv_groups=sizes[2])
        )
        for sizes in rises
    }
    chosen = min(cost, key=lambda sizes: cost[sizes])
    assert rises[chosen] <= min(rises.values()) + 0.1
    for sizes, rise in rises.items():
        assert cost[sizes] == pytest.approx(rise, rel=0.3)


def test_nothing_cut_costs_nothing_and_every_cut_costs_something() -> None:
    assert cost_of_cuts(LLAMA3_8B, LLAMA3_8B) == 0
    assert set(FITTED) == set(PLAIN) == set(Axis)
    for axis in Axis:
        costs = [
            cost_of_cuts(LLAMA3_8B, replace(LLAMA3_8B, **{axis.value: size}))
            for size in range(axis.size(LLAMA3_8B), 0, -1)
        ]
        assert costs == sorted(costs)
        assert len(set(costs)) == len(costs)


def test_hidden_is_the_dearest_axis_per_parameter_and_ffn_the_cheapest() -> None:
    """A tenth of the non-embedding parameters from each axis alone."""
    cuts = {
        Axis.FFN: replace(SMOLLM2_135M, ffn=1331),
        Axis.LAYERS: replace(SMOLLM2_135M, layers=27),
        Axis.HIDDEN: replace(SMOLLM2_135M, hidden=518),
    }
    cost = {axis: cost_of_cuts(SMOLLM2_135M, child) for axis, child in cuts.items()}
    for child in cuts.values():
        assert child.non_embedding_parameters == pytest.approx(
            0.9 * SMOLLM2_135M.non_embedding_parameters, rel=0.01
        )
    assert cost[Axis.FFN] < cost[Axis.LAYERS] < cost[Axis.HIDDEN]
