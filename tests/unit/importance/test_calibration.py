"""The calibration pass as a whole: streaming, side effects, progress, and broken models."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from cascade.errors import InputError
from cascade.importance.calibration import calibrate
from tests.tiny import make_model


@pytest.fixture
def model() -> PreTrainedModel:
    return make_model("llama")


def tokens(rows: int = 6, length: int = 16) -> Tensor:
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(0))


class Progress:
    """Remembers what was reported."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int, str]] = []

    def log(self, message: str) -> None:
        raise AssertionError(message)

    def progress(self, done: int, total: int, unit: str, **figures: float) -> None:
        self.seen.append((done, total, unit))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_one_finite_score_for_every_unit(family: str) -> None:
    scores = calibrate(make_model(family), tokens())
    shapes = {
        "layers": (4,),
        "hidden": (64,),
        "ffn": (4, 128),
        "kv_groups": (4, 2),
        "heads_per_group": (4, 2, 2),
    }
    assert {axis: tuple(score.shape) for axis, score in scores.items()} == shapes
    for score in scores.values():
        assert score.dtype == torch.float32
        assert score.isfinite().all()
        assert (score > 0).all()


def test_batches_only_change_the_order_of_sums(model: PreTrainedModel) -> None:
    whole, split = calibrate(model, tokens(), batch=6), calibrate(model, tokens(), batch=1)
    for axis in whole:
        torch.testing.assert_close(whole[axis], split[axis], rtol=1e-5, atol=1e-7)


def test_a_unit_that_never_speaks_scores_lowest(model: PreTrainedModel) -> None:
    layers = model.get_decoder().layers
    with torch.no_grad():
        layers[1].mlp.up_proj.weight[5] = 0
        layers[2].self_attn.v_proj.weight[16:] = 0
        layers[3].self_attn.o_proj.weight.zero_()
        layers[3].mlp.down_proj.weight.zero_()
    scores = calibrate(model, tokens())
    assert scores["ffn"][1].argmin() == 5
    assert scores["kv_groups"][2].argmin() == 1
    assert scores["layers"].argmin() == 3
    assert scores["layers"][3].abs() < 1e-6


def test_the_model_is_left_as_it_was(model: PreTrainedModel) -> None:
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calibrate(model, tokens())
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_progress_counts_tokens(model: PreTrainedModel) -> None:
    progress = Progress()
    calibrate(model, tokens(6, 16), batch=4, report=progress)
    assert progress.seen == [(64, 96, "tokens"), (96, 96, "tokens")]


def test_the_head_is_never_run(model: PreTrainedModel) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("logits of the whole vocabulary were computed")

    model.get_output_embeddings().register_forward_pre_hook(refuse)
    calibrate(model, tokens())


def test_low_precision_models_are_scored_in_float32(model: PreTrainedModel) -> None:
    exact, rounded = calibrate(model, tokens()), calibrate(model.bfloat16(), tokens())
    for axis in exact:
        torch.testing.assert_close(rounded[axis], exact[axis], rtol=0.05, atol=0.01)


def test_no_tokens_are_refused(model: PreTrainedModel) -> None:
    with pytest.raises(InputError, match="no tokens"):
        calibrate(model, torch.zeros(0, 16, dtype=torch.int32))


@pytest.mark.parametrize(
    ("parameter", "name"),
    [
        ("model.layers.2.mlp.down_proj.weight", "layer 2"),
        ("model.layers.0.self_attn.o_proj.weight", "layer 0"),
        ("model.layers.3.mlp.up_proj.weight", "layer 3"),
        ("model.embed_tokens.weight", "the embeddings"),
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_name_the_layer(
    model: PreTrainedModel, parameter: str, name: str, value: float
) -> None:
    with torch.no_grad():
        model.get_parameter(parameter)[:] = value
    with pytest.raises(InputError, match=f"^{name} .* not finite") as caught:
        calibrate(model, tokens())
    assert caught.value.where == "calibration"
    assert all(not module._forward_hooks for module in model.modules())
