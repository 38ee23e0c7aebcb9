"""The expected cost of cuts against the measurement it comes from."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cascade.planning.axes import Axis
from cascade.planning.cost import PRICES, cost_of_cuts
from tests.unit.planning.shapes import LLAMA3_8B, SMOLLM2_135M

# (layers, FFN, KV groups) of SmolLM2-135M: cross-entropy right after pruning, see cascade/planning/cost.py.
SAME_SIZE = {
    0.85: {(30, 1228, 3): 3.466, (28, 1353, 3): 3.572, (26, 1496, 3): 3.747, (30, 1399, 2): 4.041},
    0.70: {
        (30, 921, 3): 3.947,
        (28, 1023, 3): 3.920,
        (26, 1142, 3): 4.020,
        (24, 1279, 3): 4.319,
        (21, 1536, 3): 4.468,
        (30, 1092, 2): 4.304,
    },
    0.55: {
        (30, 614, 3): 4.787,
        (28, 694, 3): 4.631,
        (26, 787, 3): 4.552,
        (24, 895, 3): 4.800,
        (21, 1097, 3): 4.745,
        (30, 784, 2): 4.653,
    },
}
PARENT_LOSS = 3.197


@pytest.mark.parametrize("ratio", SAME_SIZE)
def test_the_cheapest_shape_measured_within_a_tenth_of_a_nat_of_the_best(ratio: float) -> None:
    losses = SAME_SIZE[ratio]
    cost = {
        sizes: cost_of_cuts(
            SMOLLM2_135M, replace(SMOLLM2_135M, layers=sizes[0], ffn=sizes[1], kv_groups=sizes[2])
        )
        for sizes in losses
    }
    chosen = min(cost, key=lambda sizes: cost[sizes])
    assert losses[chosen] <= min(losses.values()) + 0.1
    for sizes, loss in losses.items():
        assert cost[sizes] == pytest.approx(loss - PARENT_LOSS, rel=0.3)


def test_nothing_cut_costs_nothing_and_every_cut_costs_something() -> None:
    assert cost_of_cuts(LLAMA3_8B, LLAMA3_8B) == 0
    assert set(PRICES) == set(Axis)
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
