"""What stays: the best-scored units, in the parent's order."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cascade.architecture import Sizes
from cascade.errors import InputError
from cascade.pruning.selection import select

SOURCE = Sizes(layers=3, hidden=4, ffn=4, kv_groups=2, heads_per_group=1, head_size=2)
SMALLER = replace(SOURCE, layers=2, hidden=3, ffn=2, kv_groups=1)


def scores() -> dict[str, Tensor]:
    return {
        "layers": torch.tensor([0.5, 0.1, 0.9]),
        "hidden": torch.tensor([1.0, 4.0, 2.0, 3.0]),
        "ffn": torch.tensor([[1.0, 2, 3, 4], [4, 3, 2, 1], [1, 4, 1, 4]]),
        "kv_groups": torch.tensor([[1.0, 2], [2, 1], [5, 1]]),
    }


def test_the_best_stay_in_the_parents_order_and_dropped_layers_have_no_entry() -> None:
    kept = select(scores(), SOURCE, SMALLER)
    assert kept.record() == {
        "layers": [0, 2],
        "hidden": [1, 2, 3],
        "ffn": [[2, 3], [1, 3]],
        "kv_groups": [[1], [0]],
        "heads_per_group": [[[0]], [[0]]],
        "experts": [[], []],
    }


def test_nothing_is_lost_when_nothing_is_cut() -> None:
    kept = select({}, SOURCE, SOURCE)
    assert kept.layers.tolist() == [0, 1, 2]
    assert kept.hidden.tolist() == [0, 1, 2, 3]
    assert kept.ffn.tolist() == [[0, 1, 2, 3]] * 3
    assert kept.kv_groups.tolist() == [[0, 1]] * 3


def test_of_equals_the_lower_index_stays() -> None:
    wide = replace(SOURCE, hidden=100)
    chosen = select({"hidden": torch.ones(100)}, wide, replace(wide, hidden=7)).hidden
    assert chosen.tolist() == list(range(7))
    source = replace(SOURCE, hidden=5)
    scores = {"hidden": torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0])}
    assert select(scores, source, replace(source, hidden=3)).hidden.tolist() == [0, 1, 3]


def test_every_expert_and_every_group_keeps_units_of_its_own() -> None:
    source = Sizes(layers=2, hidden=4, ffn=3, kv_groups=2, heads_per_group=3, head_size=2, experts=3)
    given = {
        "ffn": torch.tensor([[[1.0, 2, 3], [3, 2, 1], [1, 3, 2]]] * 2),
        "experts": torch.tensor([[1.0, 2, 3], [3, 1, 2]]),
        "kv_groups": torch.tensor([[1.0, 2], [2, 1]]),
        "heads_per_group": torch.tensor([[[1.0, 2, 3], [3, 2, 1]]] * 2),
    }
    kept = select(given, source, replace(source, ffn=1, experts=2, kv_groups=1, heads_per_group=2))
    assert kept.experts.tolist() == [[1, 2], [0, 2]]
    assert kept.ffn.tolist() == [[[0], [1]], [[2], [1]]]
    assert kept.heads_per_group.tolist() == [[[0, 1]], [[1, 2]]]


@pytest.mark.parametrize("axis", ["layers", "hidden", "ffn", "kv_groups"])
def test_scores_of_another_model_are_refused_by_axis(axis: str) -> None:
    for wrong in ({axis: torch.ones(7)}, {axis: torch.full_like(scores()[axis], torch.nan)}):
        with pytest.raises(InputError) as caught:
            select({**scores(), **wrong}, SOURCE, SMALLER)
        assert caught.value.where == f"importance scores, axis {axis}"
        assert "calibrate" in caught.value.remedy
    missing = {name: score for name, score in scores().items() if name != axis}
    with pytest.raises(InputError, match="are needed"):
        select(missing, SOURCE, SMALLER)
