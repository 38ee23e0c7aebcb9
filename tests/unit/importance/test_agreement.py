"""Whether two halves of a calibration set choose the same units, and what is said when they do not."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from cascade.importance.agreement import ENOUGH, agreement, doubts
from cascade.importance.calibration import calibrate
from cascade.importance.method import Aggregation, Scoring
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
