"""The expected cost of cuts against the measurement it comes from."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cascade.planning.axes import Axis
from cascade.planning.cost import PRICES, cost_of_cuts
from tests.unit.planning.shapes import LLAMA3_8B, SMOLLM2_135M

# (layers, FFN, KV groups) of SmolLM2-135M: rise of the cross-entropy, see cascade/planning/cost.py.
MEASURED = {
    (30, 1024, 3): 0.599,
    (30, 768, 3): 0.898,
    (30, 512, 3): 1.274,
    (30, 1536, 2): 0.293,
    (30, 1536, 1): 1.844,
    (28, 1536, 3): 0.264,
    (26, 1536, 3): 0.484,
    (23, 1536, 3): 0.925,
    (30, 1024, 2): 0.826,
    (30, 640, 2): 1.240,
    (27, 1024, 3): 0.958,
}


@pytest.mark.parametrize("sizes", MEASURED)
def test_prices_explain_what_was_measured(sizes: tuple[int, int, int]) -> None:
    layers, ffn, groups = sizes
    child = replace(SMOLLM2_135M, layers=layers, ffn=ffn, kv_groups=groups)
    assert cost_of_cuts(SMOLLM2_135M, child) == pytest.approx(MEASURED[sizes], rel=0.12)


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
