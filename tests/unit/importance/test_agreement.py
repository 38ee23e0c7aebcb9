"""Whether two halves of a calibration set choose the same units, and what is said when they do not."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from cascade.importance.agreement import ENOUGH, agreement, chance_of_layers, doubts, layer_doubts
from cascade.importance.calibration import calibrate
from cascade.importance.method import Aggregation, LayerScore, Scoring
from cascade.planning.axes import Axis
from tests.tiny import make_model

WIDTHS = ("hidden", "ffn", "kv_groups", "heads_per_group")


def test_agreement_is_the_share_of_units_on_the_same_side() -> None:
    scores = torch.tensor([4.0, 3.0, 2.0, 1.0])
    assert agreement(scores, scores * 10 + 7) == 1
    assert agreement(scores, -scores) == 0
    assert agreement(scores, torch.tensor([4.0, 1.0, 2.0, 3.0])) == 0.5
    both = torch.stack([scores, scores])
    assert agreement(both, torch.stack([scores, -scores])) == 0.5


def test_agreement_of_unrelated_scores_is_chance() -> None:
    draw = torch.Generator().manual_seed(0)
    first, second = (torch.rand(400, 64, generator=draw) for _ in range(2))
    assert agreement(first, second) == pytest.approx(0.5, abs=0.02)
    odd = [values[:, :3] for values in (first, second)]
    assert agreement(*odd) == pytest.approx(5 / 9, abs=0.05)


@pytest.mark.parametrize("noise", [0.2, 0.64, 2.0])
def test_agreement_of_noisy_scores_follows_from_their_correlation(noise: float) -> None:
    """The formula that `ENOUGH` is justified with; noise 0.64 is where it lies."""
    draw = torch.Generator().manual_seed(0)
    truth = torch.randn(50, 2000, generator=draw)
    first, second = (truth + noise * torch.randn(truth.shape, generator=draw) for _ in range(2))
    correlation = 1 / (1 + noise**2)
    expected = 0.5 + math.asin(correlation) / math.pi
    assert agreement(first, second) == pytest.approx(expected, abs=0.01)
    if noise == 0.64:
        assert expected == pytest.approx(ENOUGH, abs=0.01)
        assert agreement((first + second) / 2, truth) == pytest.approx(0.86, abs=0.01)


def structured() -> PreTrainedModel:
    """Every axis has units that matter and units that hardly do."""
    model = make_model("llama")
    with torch.no_grad():
        for layer in model.get_decoder().layers:
            layer.mlp.up_proj.weight[::2] *= 0.1
            layer.self_attn.v_proj.weight[:16] *= 0.1
            layer.self_attn.q_proj.weight[::2] *= 4
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight[::2] *= 0.1
        model.get_decoder().norm.weight[::2] *= 0.1
    return model


def tokens(rows: int, length: int) -> Tensor:
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(0))


def test_a_model_with_structure_and_enough_tokens_is_not_doubted() -> None:
    found = calibrate(structured(), tokens(16, 64))
    axes = [Axis.HIDDEN, Axis.FFN, Axis.KV_GROUPS]
    for aggregation in Aggregation:
        scoring = Scoring(aggregation=aggregation)
        assert doubts(found.agreement, found.tokens, scoring, axes) == []
        assert found.agreement[f"ffn.{aggregation}"] > 0.95


def test_few_tokens_are_doubted_with_numbers() -> None:
    """Random weights have little to rank, and two tokens find none of it."""
    found = calibrate(make_model("llama"), tokens(2, 1))
    share = found.agreement["ffn.rms"]
    assert 0.4 < share < 0.75
    warnings = doubts(found.agreement, found.tokens, Scoring(), [Axis.FFN])
    assert warnings == [
        f"calibration on 2 tokens ranks ffn poorly: two halves of them agree on {share:.0%} of the units to "
        "keep (50% is chance); raise calibration_tokens"
    ]


def test_more_tokens_agree_more() -> None:
    model = make_model("llama")
    few, many = (calibrate(model, tokens(rows, 16)).agreement["ffn.rms"] for rows in (2, 64))
    assert many > few + 0.1


def test_only_the_scoring_and_the_axes_that_matter_are_doubted() -> None:
    shares = {f"{axis}.{aggregation}": 0.9 for axis in WIDTHS for aggregation in Aggregation}
    shares |= {"ffn.mean": 0.61, "hidden.mean": ENOUGH, "experts.probability": 0.7}
    by_mean = Scoring(aggregation=Aggregation.MEAN)
    assert doubts(shares, 512, Scoring(), [Axis(axis) for axis in WIDTHS]) == []
    assert [text.split(" ranks ")[1].split()[0] for text in doubts(shares, 512, by_mean)] == [
        "ffn",
        "experts",
    ]
    assert "61%" in doubts(shares, 512, by_mean)[0]
    assert doubts(shares, 512, by_mean, [Axis.HIDDEN, Axis.LAYERS]) == []


def test_one_row_has_no_halves_and_says_so() -> None:
    found = calibrate(make_model("llama"), tokens(1, 32))
    assert found.agreement == {}
    assert doubts(found.agreement, found.tokens, Scoring()) == [
        "calibration on 32 tokens is one row, so nothing tells how well it ranks; raise calibration_tokens"
    ]


def test_an_axis_of_one_unit_has_nothing_to_agree_on() -> None:
    found = calibrate(make_model("llama", num_key_value_heads=4), tokens(4, 16))
    assert "heads_per_group.rms" not in found.agreement
    assert "kv_groups.rms" in found.agreement


def test_methods_without_activations_are_not_doubted() -> None:
    assert doubts({}, 0, Scoring()) == []


def halved(*scores: list[float]) -> dict[str, Tensor]:
    """Two halves that give the layers these scores, and each pair of neighbours their sum."""
    matrices = []
    for half in torch.tensor(scores):
        matrix = torch.full((len(half) + 1,) * 2, torch.nan)
        matrix.diagonal(1).copy_(half)
        matrix.diagonal(2).copy_(half[:-1] + half[1:])
        matrices.append(matrix)
    return {"layers.norm_ratio.halves": torch.stack(matrices)}


def test_halves_that_would_drop_other_layers_are_doubted_with_numbers() -> None:
    scoring = Scoring(LayerScore.NORM_RATIO)
    found = halved([1, 2, 3, 4, 5, 6], [1, 3, 2, 4, 5, 6])
    assert layer_doubts(found, 512, scoring, 1) == layer_doubts(found, 512, scoring, 3) == []
    assert layer_doubts(found, 512, scoring, 2) == [
        "calibration on 512 tokens ranks layers poorly: two halves of them agree on 1 of the 2 layers to "
        "drop (0.7 is chance); raise calibration_tokens"
    ]
    assert layer_doubts(found, 512, scoring, 0) == layer_doubts(found, 512, Scoring(), 2) == []


def test_four_layers_of_which_three_are_agreed_on_are_enough() -> None:
    scoring = Scoring(LayerScore.NORM_RATIO)
    assert layer_doubts(halved([1, 2, 3, 4, 5, 6], [1, 2, 3, 5, 4, 6]), 9, scoring, 4) == []
    assert "2 of the 4" in layer_doubts(halved([1, 2, 3, 4, 5, 6], [1, 2, 5, 6, 3, 4]), 9, scoring, 4)[0]


def test_blocks_of_layers_are_compared_as_blocks() -> None:
    scoring = Scoring(LayerScore.NORM_RATIO, contiguous=True)
    found = halved([1, 2, 5, 0, 9, 9], [5, 9, 1, 0, 9, 9])
    assert "agree on 0 of the 2 layers to drop (0.7 is chance)" in layer_doubts(found, 9, scoring, 2)[0]
    assert layer_doubts(halved([1, 2, 5, 0, 9, 9], [1, 0, 5, 2, 9, 9]), 9, scoring, 2) == []


@pytest.mark.parametrize("contiguous", [False, True])
def test_chance_is_what_random_choices_have_in_common(contiguous: bool) -> None:
    every = list(itertools.combinations(range(6), 3))
    choices = [c for c in every if not contiguous or c[2] - c[0] == 2]
    shared = [len(set(a) & set(b)) for a in choices for b in choices]
    assert chance_of_layers(6, 3, contiguous) == pytest.approx(sum(shared) / len(shared))


@pytest.mark.parametrize("batch", [1, 3, 4])
def test_layers_are_scored_by_even_and_by_odd_rows(batch: int) -> None:
    model, rows = make_model("llama"), tokens(7, 16)
    found = calibrate(model, rows, batch=batch, drops=(1,)).statistics
    even, odd = (calibrate(model, rows[half::2], drops=(1,)).statistics for half in (0, 1))
    for kind in LayerScore:
        halves = found[f"layers.{kind}.halves"]
        for half, alone in zip(halves, (even, odd), strict=True):
            expected = alone[f"layers.{kind}"]
            torch.testing.assert_close(half, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert "layers.norm_ratio.halves" not in calibrate(model, rows[:1]).statistics


def test_where_nothing_was_measured_agreement_is_chance() -> None:
    scores = torch.rand(4, 5, generator=torch.Generator().manual_seed(0))
    reached = torch.tensor([True, False, True, False])
    assert agreement(scores, scores, reached) == pytest.approx((1 + 13 / 25) / 2)
    assert agreement(scores, scores, torch.ones(4, dtype=torch.bool)) == 1
