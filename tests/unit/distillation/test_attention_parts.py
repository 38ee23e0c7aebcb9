"""Queries, keys and values of a layer: found in every class, split as the class itself splits them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cascade.distillation.attention_parts import attention_parts, chosen
from cascade.distillation.states import all_states
from cascade.errors import InputError
from cascade.models.decoder import decoder_of
from cascade.models.entries import Entries
from tests.architectures import ARCHITECTURES, tiny

IDS = torch.arange(10).view(2, 5)


def parts_of(model: PreTrainedModel, layer: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    parts = attention_parts(decoder_of(model), layer)
    _, seen = all_states(model, IDS, parts.modules)
    return parts.split(seen)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_they_are_found_in_every_class(name: str) -> None:
    model = tiny(name)
    groups = decoder_of(model).architecture.kv_groups
    found = parts_of(model)
    assert [one.shape for one in found] == [(2, 5, 64), (2, 5, 16 * groups), (2, 5, 16 * groups)]


def by_the_class(family: str, attention: nn.Module, state: Tensor) -> tuple[Tensor, ...]:
    """As the classes' own forward passes take them, written out."""
    if family == "phi3":
        return attention.qkv_proj(state).split((64, 32, 32), -1)  # type: ignore[operator]
    if family == "gpt2":
        return attention.c_attn(state).split(64, -1)  # type: ignore[operator]
    if family == "gpt_neox":
        joined = attention.query_key_value(state).view(2, 5, 4, 48)  # type: ignore[operator]
        return tuple(one.flatten(2) for one in joined.chunk(3, -1))
    return tuple(getattr(attention, f"{kind}_proj")(state) for kind in "qkv")


@pytest.mark.parametrize("family", ["llama", "opt", "phi3", "gpt2", "gpt_neox"])
def test_they_are_what_the_class_takes_for_them(family: str) -> None:
    model, read = tiny(family), dict[str, Tensor]()
    layer = decoder_of(model).layers[1]
    attention = next(
        module for path, module in layer.named_modules() if path in ("self_attn", "attn", "attention")
    )
    reader = decoder_of(model).anatomy.attention_reader.rpartition(".")[2]
    first = next(
        module for path, module in attention.named_modules() if hasattr(module, "weight") and path != reader
    )
    first.register_forward_hook(lambda _, inputs, __: read.update(state=inputs[0]))
    found = parts_of(model)
    for ours, theirs in zip(found, by_the_class(family, attention, read["state"]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize(
    "found",
    [
        {},
        {Entries.QUERIES: ["q"], Entries.KEYS: ["kv"]},
        {Entries.QUERIES: ["gate", "q"], Entries.KEYS: ["k", "v"]},
        {Entries.QUERIES: ["q"], Entries.QKV_BLOCKS: ["qkv"]},
        {Entries.QKV_BLOCKS: ["one", "two"]},
    ],
)
def test_what_is_not_clear_is_not_guessed(found: dict[Entries, list[str]]) -> None:
    assert chosen(found) == ([], None)


def test_a_class_in_which_they_are_not_found_is_refused() -> None:
    decoder = decoder_of(tiny("llama"))
    del decoder.layers[1].self_attn.v_proj
    with pytest.raises(InputError) as caught:
        attention_parts(decoder, 1)
    assert caught.value.value == "llama"
    assert "`hidden_states: cosine`" in caught.value.remedy


def test_a_layer_of_one_model_is_not_that_of_another() -> None:
    decoder = decoder_of(tiny("llama"))
    first, second = (attention_parts(decoder, layer) for layer in (0, 1))
    assert set(first.modules).isdisjoint(second.modules)
    assert replace(first, modules=()) == replace(second, modules=())
