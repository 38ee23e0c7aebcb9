"""The least-squares repair as a whole: what it touches, how it streams, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from cascade.architecture import Architecture
from cascade.errors import CascadeError, InputError
from cascade.models.decoder import Decoder, decoder_of
from cascade.pruning.compensation import least_squares
from cascade.pruning.selection import Kept, score_shapes, select
from cascade.pruning.surgery import cut
from tests.architectures import ARCHITECTURES, EXPERTS, cuts, tiny
from tests.tiny import make_model

EVERYTHING = {"layers": 3, "hidden": 40, "ffn": 72, "kv_groups": 1}


def plan(model: PreTrainedModel, **sizes: int) -> tuple[Decoder, Architecture, Kept]:
    """A cut to `sizes` by random scores."""
    decoder, draw = decoder_of(model), torch.Generator().manual_seed(5)
    changed: dict[str, Any] = dict(sizes)
    target = replace(decoder.architecture, **changed)
    shapes = score_shapes(decoder.architecture).items()
    scores = {axis.value: torch.rand(shape, generator=draw) for axis, shape in shapes}
    return decoder, target, select(scores, decoder.architecture, target)


def tokens(rows: int = 12, length: int = 16) -> Tensor:
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(0))


class Progress:
    """Remembers what was reported; stops the work after `last` reports."""

    def __init__(self, last: int = 10**6) -> None:
        self.seen: list[tuple[int, int]] = []
        self.last = last

    def log(self, message: str) -> None:
        raise AssertionError(message)

    def progress(self, done: int, total: int, unit: str, **figures: float) -> None:
        self.seen.append((done, total))
        if len(self.seen) == self.last:
            raise KeyboardInterrupt


def test_only_what_is_cut_is_replaced_and_only_in_kept_layers() -> None:
    model = make_model("llama")
    for sizes, readers in (
        ({"ffn": 72}, ["mlp.down_proj"]),
        ({"kv_groups": 1}, ["self_attn.o_proj"]),
        ({"heads_per_group": 1, "hidden": 40}, ["self_attn.o_proj"]),
        (EVERYTHING, ["mlp.down_proj", "self_attn.o_proj"]),
    ):
        decoder, _, kept = plan(model, layers=3, **{k: v for k, v in sizes.items() if k != "layers"})
        expected = {
            f"model.layers.{layer}.{reader}.weight" for layer in kept.layers.tolist() for reader in readers
        }
        assert set(least_squares(decoder, kept, tokens())) == expected


@pytest.mark.parametrize("sizes", [{}, {"layers": 2}, {"hidden": 40}])
def test_nothing_is_replaced_where_no_reader_loses_an_input(sizes: dict[str, int]) -> None:
    decoder, _, kept = plan(make_model("llama"), **sizes)
    progress = Progress()
    assert least_squares(decoder, kept, tokens(), report=progress) == {}
    assert progress.seen == []


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_gets_a_child_that_runs(name: str) -> None:
    decoder, target, kept = plan(tiny(name), **cuts(name)["all"])
    replaced = least_squares(decoder, kept, tokens())
    own = dict(decoder.model.named_parameters())
    for parameter, values in replaced.items():
        assert values.shape == own[parameter].shape
        assert not torch.equal(values, own[parameter])
    readers = decoder.attention_readers + ([] if name in EXPERTS else decoder.ffn_readers)
    cut_layers = [readers[place] for place in range(len(readers)) if place % 4 in kept.layers]
    expected = [p for reader in cut_layers for p in (reader.weight, getattr(reader, "bias", None))]
    assert {id(own[n]) for n in replaced} == {id(p) for p in expected if p is not None}
    child = cut(decoder, target, kept, replaced)
    assert decoder_of(child).architecture == target
    with torch.no_grad():
        assert child(input_ids=tokens()).logits.isfinite().all()


def test_the_repaired_child_is_a_stock_folder(tmp_path: Path) -> None:
    decoder, target, kept = plan(make_model("llama"), **EVERYTHING)
    child = cut(decoder, target, kept, least_squares(decoder, kept, tokens()))
    child.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        expected = child(input_ids=tokens()).logits
        assert torch.equal(loaded(input_ids=tokens()).logits, expected)
        plain = cut(decoder, target, kept)(input_ids=tokens()).logits
    assert (plain - expected).abs().max() > 0.01


def test_readers_that_do_not_fit_at_once_take_more_passes_to_the_same_result() -> None:
    decoder, _, kept = plan(make_model("llama"), ffn=72, kv_groups=1)
    once, many, pairs = Progress(), Progress(), Progress()
    whole = least_squares(decoder, kept, tokens(), batch=12, report=once)
    single = least_squares(decoder, kept, tokens(), batch=12, limit_bytes=1, report=many)
    # Products of a layer: attention 64 x 32, FFN 128 x 72, eight bytes each.
    layer = 8 * (64 * 32 + 128 * 72)
    two = least_squares(decoder, kept, tokens(), batch=12, limit_bytes=2 * layer, report=pairs)
    assert once.seen == [(192, 192)]
    assert many.seen == [(192 * part, 192 * 8) for part in range(1, 9)]
    assert pairs.seen == [(192, 384), (384, 384)]
    for found in (single, two):
        assert list(found) == list(whole)
        assert all(torch.equal(found[name], values) for name, values in whole.items())


def test_batches_only_change_the_order_of_sums() -> None:
    decoder, _, kept = plan(make_model("llama"), ffn=72, kv_groups=1)
    whole, split = (least_squares(decoder, kept, tokens(40), batch=size) for size in (40, 3))
    for name, values in whole.items():
        torch.testing.assert_close(split[name], values, rtol=1e-3, atol=1e-4)


def test_the_parent_is_left_as_it_was_and_shares_no_memory() -> None:
    model = make_model("llama").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    decoder, target, kept = plan(model, **EVERYTHING)
    replaced = least_squares(decoder, kept, tokens())
    child = cut(decoder, target, kept, replaced)
    untouched = {name: values.clone() for name, values in replaced.items()}
    with torch.no_grad():
        for parameter in child.parameters():
            parameter.fill_(7.0)
    assert all(torch.equal(values, untouched[name]) for name, values in replaced.items())
    with torch.no_grad():
        for values in replaced.values():
            values.fill_(7.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_hooks_are_gone_when_the_work_is_stopped() -> None:
    decoder, _, kept = plan(make_model("llama"), ffn=72)
    with pytest.raises(KeyboardInterrupt):
        least_squares(decoder, kept, tokens(), report=Progress(last=2))
    for module in decoder.model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_a_child_and_what_replaces_its_parameters_share_no_memory_where_nothing_is_cut() -> None:
    decoder, target, kept = plan(make_model("llama"), ffn=72)
    name = "model.layers.0.self_attn.o_proj.weight"
    values = decoder.model.get_parameter(name).detach() + 1
    child = cut(decoder, target, kept, {name: values})
    assert torch.equal(child.get_parameter(name), values)
    assert child.get_parameter(name).data_ptr() != values.data_ptr()


def test_a_layer_that_is_never_heard_keeps_its_weights() -> None:
    model = make_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.zero_()
    decoder, _, kept = plan(model, ffn=72)
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(least_squares(decoder, kept, tokens())[name], model.get_parameter(name))


def test_no_tokens_are_refused() -> None:
    decoder, _, kept = plan(make_model("llama"), ffn=72)
    with pytest.raises(InputError, match="no tokens"):
        least_squares(decoder, kept, torch.zeros(0, 16, dtype=torch.int32))


@pytest.mark.parametrize(
    ("parameter", "name"),
    [
        ("model.layers.2.mlp.up_proj.weight", "layer 2"),
        ("model.layers.3.mlp.down_proj.weight", "layer 3"),
        ("model.layers.0.self_attn.v_proj.weight", "layer 0"),
    ],
)
def test_activations_that_are_not_finite_name_the_layer(parameter: str, name: str) -> None:
    model = make_model("llama")
    with torch.no_grad():
        model.get_parameter(parameter)[:] = torch.nan
    decoder, _, kept = plan(model, ffn=72)
    with pytest.raises(InputError, match=f"^{name} .* not finite"):
        least_squares(decoder, kept, tokens())


def test_columns_that_too_few_tokens_leave_undetermined_need_damping() -> None:
    decoder, target, kept = plan(make_model("llama"), ffn=72)
    few = tokens(1, 6)
    with pytest.raises(InputError, match="determine each other") as caught:
        least_squares(decoder, kept, few, damping=0.0)
    assert caught.value.value == "model.layers.0.mlp.down_proj, damping 0.0"
    child = cut(decoder, target, kept, least_squares(decoder, kept, few))
    assert all(parameter.isfinite().all() for parameter in child.parameters())


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("model.layers.0.mlp.down_proj", torch.zeros(64, 128)),
        ("model.layers.0.mlp.down_proj.weight", torch.zeros(64, 72)),
        ("model.layers.0.mlp.down_proj.weight", torch.zeros(64, 128, dtype=torch.float64)),
    ],
)
def test_a_replacement_that_does_not_fit_is_refused(name: str, values: Tensor) -> None:
    decoder, target, kept = plan(make_model("llama"), ffn=72)
    with pytest.raises(CascadeError, match="does not fit") as caught:
        cut(decoder, target, kept, {name: values})
    assert caught.value.value.startswith(name)
