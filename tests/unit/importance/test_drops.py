"""Layers that are really dropped, by handing remembered streams to the layers behind them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from cascade.errors import InputError
from cascade.importance.calibration import calibrate
from cascade.models.decoder import decoder_of
from cascade.pruning.proof import passes_through
from tests.architectures import tiny
from tests.tiny import make_model


@pytest.fixture
def model() -> PreTrainedModel:
    return make_model("llama")


def tokens(rows: int = 6, length: int = 16) -> Tensor:
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(0))


def test_logits_of_few_rows_at_once_give_the_same_drops(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = calibrate(model, tokens(), drops=(2,)).statistics
    monkeypatch.setattr("cascade.importance.drops.MOST_LOGITS", 3 * 16 * 258)
    parts = calibrate(model, tokens(), drops=(2,)).statistics
    for key in ("layers.perplexity", "layers.logit_mse"):
        torch.testing.assert_close(parts[key], whole[key], rtol=1e-4, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3", "gpt2", "mixtral", "granite"])
def test_dropping_from_remembered_streams_is_dropping_from_the_model(name: str) -> None:
    """Against a second model whose layers return their input; soft caps and scales of logits included."""
    model, rows = tiny(name), tokens(3)
    found = calibrate(model, rows, drops=(1, 2)).statistics
    with torch.no_grad():
        whole = model(input_ids=rows, use_cache=False)
        for i, j in ((0, 1), (1, 3), (3, 4)):
            handles = [
                layer.register_forward_hook(passes_through, with_kwargs=True)
                for layer in decoder_of(model).layers[i:j]
            ]
            without = model(input_ids=rows, use_cache=False)
            for handle in handles:
                handle.remove()
            rise = cross_entropy(without.logits, rows) - cross_entropy(whole.logits, rows)
            square = (without.logits - whole.logits).square().mean()
            torch.testing.assert_close(found["layers.perplexity"][i, j], rise, rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(found["layers.logit_mse"][i, j], square, rtol=1e-4, atol=1e-6)


def cross_entropy(logits: Tensor, rows: Tensor) -> Tensor:
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())


def test_a_forward_of_a_layers_own_is_put_back(model: PreTrainedModel) -> None:
    """As accelerate sets one."""
    layer = decoder_of(model).layers[1]
    own = layer.forward
    vars(layer)["forward"] = own
    calibrate(model, tokens(), drops=(1,))
    assert vars(layer)["forward"] is own


@pytest.mark.parametrize("length", [0, 4, -1])
def test_blocks_that_cannot_be_dropped_are_refused(model: PreTrainedModel, length: int) -> None:
    with pytest.raises(InputError, match="block of layers to drop") as caught:
        calibrate(model, tokens(), drops=(1, length))
    assert caught.value.value == f"{length} of 4 layers"


def test_rows_of_one_token_have_no_cross_entropy(model: PreTrainedModel) -> None:
    with pytest.raises(InputError, match="no next token"):
        calibrate(model, tokens(6, 1), drops=(1,))
    assert calibrate(model, tokens(6, 1)).tokens == 6


def test_logits_that_are_not_finite_name_the_dropped_layers(model: PreTrainedModel) -> None:
    """Layer 2 overflows in its third call: after the pass itself and the whole model's logits."""
    factors = [torch.inf, 1.0, 1.0]
    third = decoder_of(model).layers[2]
    third.register_forward_pre_hook(lambda module, inputs: (inputs[0] * factors.pop(),) if factors else None)
    with pytest.raises(InputError, match="without some layers are not finite") as caught:
        calibrate(model, tokens(), batch=6, drops=(2,))
    assert "layers 0 to 1 of 4" in str(caught.value.value)


def test_layers_that_put_out_tuples_are_dropped_too(model: PreTrainedModel) -> None:
    """As those of some classes do; the next layer, or the final norm, takes the stream out of the tuple."""
    decoder = decoder_of(model)
    expected = calibrate(model, tokens(), drops=(1, 2)).statistics
    for layer in decoder.layers:
        vars(layer)["forward"] = with_weights(layer.forward)
    for reader in (*decoder.layers[1:], model.get_decoder().norm):
        reader.register_forward_pre_hook(only_the_stream)
    found = calibrate(model, tokens(), drops=(1, 2)).statistics
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], equal_nan=True)


def with_weights(forward: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, str]]:
    return lambda *inputs, **keywords: (forward(*inputs, **keywords), "weights")


def only_the_stream(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    stream, second = inputs[0]
    assert second in ("weights", None)
    return (stream, *inputs[1:])
