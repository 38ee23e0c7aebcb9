"""What stays: the best-scored units, in the parent's order."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cascade.architecture import Architecture
from cascade.errors import InputError
from cascade.pruning.selection import best, select

SOURCE = Architecture(3, 4, 4, 2, 1, 2, 8, tied=True)


def scores() -> dict[str, Tensor]:
    return {
        "layers": torch.tensor([0.5, 0.1, 0.9]),
        "hidden": torch.tensor([1.0, 4.0, 2.0, 3.0]),
        "ffn": torch.tensor([[1.0, 2, 3, 4], [4, 3, 2, 1], [1, 4, 1, 4]]),
        "kv_groups": torch.tensor([[1.0, 2], [2, 1], [5, 1]]),
    }


def test_the_best_stay_in_the_parents_order_and_dropped_layers_have_no_entry() -> None:
    kept = select(scores(), SOURCE, replace(SOURCE, layers=2, hidden=3, ffn=2, kv_groups=1))
    assert kept.record() == {
        "layers": [0, 2],
        "hidden": [1, 2, 3],
        "ffn": [[2, 3], [1, 3]],
        "kv_groups": [[1], [0]],
    }


def test_nothing_is_lost_when_nothing_is_cut() -> None:
    kept = select(scores(), SOURCE, SOURCE)
    assert kept.layers == [0, 1, 2]
    assert kept.hidden == [0, 1, 2, 3]
    assert kept.ffn == [[0, 1, 2, 3]] * 3
    assert kept.kv_groups == [[0, 1]] * 3


def test_among_equals_the_lower_index_stays() -> None:
    assert best(torch.ones(100), 7) == list(range(7))
    assert best(torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0]), 3) == [0, 1, 3]


@pytest.mark.parametrize("axis", ["layers", "hidden", "ffn", "kv_groups"])
def test_scores_of_another_model_are_refused_by_axis(axis: str) -> None:
    for wrong in ({axis: torch.ones(7)}, {axis: torch.full_like(scores()[axis], torch.nan)}):
        with pytest.raises(InputError) as caught:
            select({**scores(), **wrong}, SOURCE, SOURCE)
        assert caught.value.where == f"importance scores, axis {axis}"
        assert "calibrate" in caught.value.remedy
    missing = {name: score for name, score in scores().items() if name != axis}
    with pytest.raises(InputError, match="are needed"):
        select(missing, SOURCE, SOURCE)
