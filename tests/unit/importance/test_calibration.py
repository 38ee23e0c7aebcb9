"""The calibration pass as a whole: streaming, side effects, progress, and broken models."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from cascade.errors import InputError
from cascade.importance.calibration import calibrate
from cascade.importance.method import Aggregation, LayerScore
from cascade.models.decoder import decoder_of
from tests.architectures import tiny
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


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3", "gpt2", "opt", "mixtral"])
def test_every_statistic_is_there_and_finite(name: str) -> None:
    model = tiny(name)
    sizes = decoder_of(model).architecture
    groups, per_group = sizes.kv_groups, sizes.heads_per_group
    found = calibrate(model, tokens(), drops=(1, 3)).statistics
    widths = {"hidden": (64,), "kv_groups": (4, groups), "heads_per_group": (4, groups, per_group)}
    widths["ffn"] = (4, 4, 128) if name == "mixtral" else (4, 128)
    shapes: dict[str, tuple[int, ...]] = {
        f"{axis}.{aggregation}": shape for axis, shape in widths.items() for aggregation in Aggregation
    }
    shapes |= {"experts.probability": (4, 4)} if name == "mixtral" else {}
    for score in LayerScore:
        shapes |= {f"layers.{score}": (5, 5), f"layers.{score}.halves": (2, 5, 5)}
    assert {key: tuple(values.shape) for key, values in found.items()} == shapes
    places = torch.arange(5)
    length = places - places[:, None]
    for key, values in found.items():
        assert values.dtype == torch.float32
        assert values.is_contiguous()
        measured = torch.ones(values.shape, dtype=torch.bool)
        if key.startswith("layers."):
            dropped = LayerScore(key.split(".")[1]).drops
            measured = ((length == 1) | (length == 3) if dropped else length > 0).expand(values.shape)
        assert torch.equal(values.isfinite(), measured)
        if not key.startswith("layers.perplexity"):
            assert (values[measured] >= 0).all()
            assert values[measured].any()


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_batches_only_change_the_order_of_sums(name: str) -> None:
    model = tiny(name)
    whole, split = (calibrate(model, tokens(), batch=batch, drops=(1,)) for batch in (6, 1))
    uneven = calibrate(model, tokens(), batch=4, drops=(1,))
    assert whole.agreement == split.agreement == uneven.agreement
    for other in (split, uneven):
        for key, values in whole.statistics.items():
            torch.testing.assert_close(
                other.statistics[key], values, rtol=1e-4, atol=1e-6, equal_nan=True, msg=key
            )


def test_streams_that_a_layer_changes_in_place_are_remembered_as_they_were(model: PreTrainedModel) -> None:
    expected = calibrate(model, tokens()).statistics
    for layer in decoder_of(model).layers:
        layer.register_forward_hook(lambda module, inputs, output: inputs[0].copy_(output))
    found = calibrate(model, tokens()).statistics
    key = "layers.block_influence"
    torch.testing.assert_close(found[key], expected[key], equal_nan=True)


def test_a_unit_that_never_speaks_scores_lowest(model: PreTrainedModel) -> None:
    layers = model.get_decoder().layers
    with torch.no_grad():
        layers[1].mlp.up_proj.weight[5] = 0
        layers[2].self_attn.v_proj.weight[16:] = 0
        layers[3].self_attn.o_proj.weight.zero_()
        layers[3].mlp.down_proj.weight.zero_()
    found = calibrate(model, tokens(), drops=(1,)).statistics
    for aggregation in Aggregation:
        assert found[f"ffn.{aggregation}"][1].argmin() == 5
        assert found[f"kv_groups.{aggregation}"][2].argmin() == 1
    assert found["layers.block_influence"][3, 4].abs() < 1e-6
    assert found["layers.norm_ratio"][3, 4] == pytest.approx(1)
    assert found["layers.perplexity"][3, 4].abs() < 1e-6
    assert found["layers.logit_mse"][3, 4] < 1e-9
    assert found["layers.logit_mse"][0, 1] > 1e-3


def test_a_token_without_a_stream_counts_as_nothing(model: PreTrainedModel) -> None:
    """Its direction is undefined; it must not turn the mean of the others into NaN."""
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = 0
    rows = torch.full((1, 4), 3)
    rows[0, 0] = 7
    found = calibrate(model, rows).statistics
    assert found["layers.norm_ratio"][0, 1].isfinite()
    assert found["layers.block_influence"][0, 1].isfinite()


@pytest.mark.parametrize("broken", [False, True])
def test_the_model_is_left_as_it_was(model: PreTrainedModel, broken: bool) -> None:
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    forwards = {name: module.forward for name, module in model.named_modules()}
    random = torch.get_rng_state()
    if broken:
        handle = model.get_output_embeddings().register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="on purpose"):
            calibrate(model, tokens(), drops=(1,))
        handle.remove()
    else:
        calibrate(model, tokens(), drops=(1,))
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    assert all("forward" not in vars(module) for module in model.modules())
    assert all(module.forward == forwards[name] for name, module in model.named_modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def fail(*_: object) -> None:
    raise RuntimeError("on purpose")


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
    exact = calibrate(model, tokens(), drops=(1,)).statistics
    rounded = calibrate(model.bfloat16(), tokens(), drops=(1,)).statistics
    for key in exact:
        torch.testing.assert_close(rounded[key], exact[key], rtol=0.05, atol=0.02, equal_nan=True, msg=key)


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
