"""Which of the measured statistics decide, and what happens when they were not measured."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cascade.errors import InputError
from cascade.importance.calibration import calibrate
from cascade.importance.method import Aggregation, LayerScore, Method, Scoring
from cascade.importance.scores import score
from cascade.importance.scoring import scores_of
from cascade.models.decoder import decoder_of
from cascade.planning.axes import Axis
from cascade.pruning.selection import score_shapes
from tests.architectures import tiny
from tests.tiny import make_model

LAYERS = 4


def tokens(rows: int = 4) -> Tensor:
    return torch.randint(0, 256, (rows, 16), generator=torch.Generator().manual_seed(0))


def statistics(**matrices: Tensor) -> dict[str, Tensor]:
    """Widths of two units, each statistic with numbers of its own, and the given layer matrices."""
    axes = ("hidden", "ffn", "kv_groups", "heads_per_group")
    names = [f"{axis}.{aggregation}" for axis in axes for aggregation in Aggregation]
    widths = {name: torch.tensor([place, -place]).float() for place, name in enumerate(names)}
    return widths | {f"layers.{name}": matrix for name, matrix in matrices.items()}


def matrix(single: list[float], pairs: list[float]) -> Tensor:
    """The scores of four layers and of the three blocks of two."""
    found = torch.full((5, 5), torch.nan)
    for length, values in ((1, single), (2, pairs)):
        found.diagonal(length).copy_(torch.tensor(values))
    return found


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("aggregation", Aggregation)
def test_scores_have_the_shapes_that_are_selected_from(name: str, aggregation: Aggregation) -> None:
    model = tiny(name)
    shapes = score_shapes(decoder_of(model).architecture)
    measured = calibrate(model, tokens()).statistics
    scores = scores_of(measured, Scoring(aggregation=aggregation), dropped=1)
    expected = {axis.value for axis in Axis if axis is not Axis.EXPERTS or name == "mixtral"}
    assert scores.keys() == expected
    assert all(tuple(values.shape) == shapes[Axis(axis)] for axis, values in scores.items())
    assert torch.equal(scores["ffn"], measured[f"ffn.{aggregation}"])


@pytest.mark.parametrize("layers", LayerScore)
def test_the_named_layer_score_decides(layers: LayerScore) -> None:
    given = {score.value: matrix([place + 1.0, 5, 6, 7], [1, 2, 3]) for place, score in enumerate(LayerScore)}
    found = scores_of(statistics(**given), Scoring(layers), dropped=2)
    assert torch.equal(found["layers"], given[layers.value].diagonal(1))


def test_a_contiguous_block_is_the_least_as_a_whole() -> None:
    """Layers 0 and 3 are the least one by one, layers 1 and 2 the least together."""
    given = statistics(perplexity=matrix([1, 2, 2, 1], [5, 3, 4]))
    scoring = Scoring(LayerScore.PERPLEXITY, contiguous=True)
    assert scores_of(given, scoring, dropped=2)["layers"].tolist() == [1, 0, 0, 1]
    assert scores_of(given, scoring, dropped=1)["layers"].tolist() == [0, 1, 1, 1]
    single = scores_of(given, Scoring(LayerScore.PERPLEXITY), dropped=2)["layers"]
    assert single.tolist() == [1, 2, 2, 1]


@pytest.mark.parametrize("layers", LayerScore)
@pytest.mark.parametrize("contiguous", [False, True])
def test_what_a_scoring_asks_for_is_enough_and_needed(layers: LayerScore, contiguous: bool) -> None:
    scoring, model = Scoring(layers, contiguous), make_model("llama")
    measured = calibrate(model, tokens(), drops=scoring.drops(2)).statistics
    scores = scores_of(measured, scoring, dropped=2)["layers"]
    assert tuple(scores.shape) == (LAYERS,)
    assert scores.isfinite().all()
    if scoring.drops(2):
        with pytest.raises(InputError, match=f"layers.{layers} was not measured"):
            scores_of(calibrate(model, tokens()).statistics, scoring, dropped=2)
        other = calibrate(model, tokens(), drops=(3,)).statistics
        with pytest.raises(InputError, match=f"layers.{layers} was not measured") as caught:
            scores_of(other, scoring, dropped=2)
        assert caught.value.value == f"dropping blocks of {2 if contiguous else 1}"


def test_a_redundant_block_is_found_by_every_score() -> None:
    """Layers 1 and 2 write nothing into the stream."""
    model = make_model("llama")
    with torch.no_grad():
        for layer in model.get_decoder().layers[1:3]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    measured = calibrate(model, tokens(), drops=(2,)).statistics
    for layers in set(LayerScore) - {LayerScore.NORM_RATIO}:
        found = scores_of(measured, Scoring(layers, contiguous=True), dropped=2)["layers"]
        if layers is not LayerScore.PERPLEXITY:
            assert found.tolist() == [1, 0, 0, 1]
    assert measured["layers.perplexity"][1, 3].abs() < 1e-6


def test_nothing_is_asked_of_layers_when_none_is_dropped() -> None:
    scoring = Scoring(LayerScore.PERPLEXITY, contiguous=True)
    assert scoring.drops(0) == ()
    assert scores_of(statistics(), scoring, dropped=0).keys() == {
        "hidden", "ffn", "kv_groups", "heads_per_group",
    }  # fmt: skip


@pytest.mark.parametrize("method", [Method.TAYLOR, Method.MAGNITUDE, Method.RANDOM])
def test_scores_of_other_methods_pass_through(method: Method) -> None:
    found = score(make_model("llama"), tokens(), method)
    assert found.tokens == 0
    scores = scores_of(found.statistics, Scoring(LayerScore.LOGIT_MSE, True, Aggregation.MEAN), dropped=2)
    assert scores == found.statistics


def test_score_hands_on_what_is_to_be_dropped() -> None:
    model = make_model("llama")
    found = score(model, tokens(), Method.ACTIVATION, drops=(1,))
    assert found.statistics.keys() == calibrate(model, tokens(), drops=(1,)).statistics.keys()
    assert found.tokens == 64
    assert found.agreement


@pytest.mark.parametrize("dropped", [-1, 4, 9])
def test_more_layers_than_there_are_cannot_be_dropped(dropped: int) -> None:
    given = statistics(block_influence=matrix([1, 2, 3, 4], [1, 2, 3]))
    with pytest.raises(InputError, match="cannot be dropped") as caught:
        scores_of(given, Scoring(), dropped)
    assert caught.value.value == f"{dropped} of 4"


def test_a_width_that_was_not_measured_is_named() -> None:
    given = statistics()
    del given["ffn.mean"]
    with pytest.raises(InputError, match=r"ffn\.mean was not measured") as caught:
        scores_of(given, Scoring(aggregation=Aggregation.MEAN), dropped=0)
    assert "ffn.rms" in str(caught.value.value)
    with pytest.raises(InputError, match=r"hidden\.rms was not measured") as caught:
        scores_of({}, Scoring(), dropped=0)
    assert caught.value.value == "nothing"
