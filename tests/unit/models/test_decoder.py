"""The parts of a decoder are found by structure, counted twice, and refused by name when they do not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from cascade.errors import InputError
from cascade.models.decoder import architecture_of, decoder_of
from tests.tiny import SIZES, make_model

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_shape_from_the_config_is_the_modules_own(family: str, tied: bool) -> None:
    model = make_model(family, tie_word_embeddings=tied)
    architecture = architecture_of(model.config)
    assert architecture == decoder_of(model).architecture
    assert architecture.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert (architecture.layers, architecture.hidden, architecture.ffn) == (4, 64, 128)
    assert (architecture.kv_groups, architecture.heads_per_group, architecture.head_size) == (2, 2, 16)
    assert (architecture.vocabulary, architecture.tied) == (258, tied)
    assert architecture.qkv_bias == (family == "qwen2")
    assert architecture.qk_norm == (family == "qwen3")


def test_biases_are_counted() -> None:
    architecture = architecture_of(make_model(attention_bias=True, mlp_bias=True).config)
    assert architecture.qkv_bias
    assert architecture.output_bias
    assert architecture.ffn_bias


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_are_the_models_own_modules_in_order(family: str) -> None:
    model = make_model(family)
    decoder = decoder_of(model)
    assert decoder.tied
    assert decoder.embeddings is model.get_input_embeddings()
    assert decoder.stack is model.model.layers
    assert decoder.final_norm is model.model.norm
    for layer, module in zip(decoder.layers, model.model.layers, strict=True):
        assert (layer.module, layer.attention, layer.ffn) == (module, module.self_attn, module.mlp)
        assert (layer.q, layer.k, layer.v) == (
            module.self_attn.q_proj,
            module.self_attn.k_proj,
            module.self_attn.v_proj,
        )
        assert (layer.gate, layer.up, layer.down) == (
            module.mlp.gate_proj,
            module.mlp.up_proj,
            module.mlp.down_proj,
        )
        assert (layer.input_norm, layer.ffn_norm) == (module.input_layernorm, module.post_attention_layernorm)
        assert layer.o is module.self_attn.o_proj
        assert layer.q_norm is getattr(module.self_attn, "q_norm", None)
        assert layer.k_norm is getattr(module.self_attn, "k_norm", None)


def test_finding_the_parts_changes_neither_weights_nor_random_state() -> None:
    model = make_model()
    weights, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    decoder_of(model)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert all(not module._forward_hooks for module in model.modules())


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("phi3", SIZES, "fused qkv"),
    ("gpt2", {}, "fused qkv"),
    ("glm", SIZES, "fused gate and up"),
    ("mixtral", SIZES, "mixture of experts"),
    ("qwen3_moe", SIZES, "mixture of experts"),
    ("gemma2", SIZES, "post-norms"),
    ("exaone4", SIZES, "post-norms"),
    ("gemma", SIZES, "scaled or shifted embeddings"),
    ("granite", {**SIZES, "embedding_multiplier": 12.0}, "scaled or shifted embeddings"),
    ("granite", {**SIZES, "residual_multiplier": 0.2}, "scaled residual"),
    ("granite", {**SIZES, "logits_scaling": 8.0}, "scaled or shifted logits"),
    ("olmo2", SIZES, "reach across heads"),
    ("cohere", SIZES, "no RMSNorm before"),
    ("diffllama", SIZES, "not grouped in order"),
    ("helium", SIZES, "its config cannot set"),
    ("arcee", SIZES, "no gate_proj"),
    ("mamba", {}, "no attention heads"),
    ("t5", {}, "no causal language model"),
]


@pytest.mark.parametrize(("family", "sizes", "reason"), REFUSED)
def test_what_is_not_llama_like_is_refused_with_the_reason(
    family: str, sizes: dict[str, Any], reason: str
) -> None:
    ids = {"vocab_size": 258, "bos_token_id": None, "eos_token_id": 256, "pad_token_id": 257}
    with pytest.raises(InputError, match=reason) as caught:
        architecture_of(AutoConfig.for_model(family, **ids, **sizes))
    assert caught.value.value == family
    assert caught.value.remedy


def test_layers_of_different_sizes_are_refused() -> None:
    model = make_model()
    model.model.layers[1].mlp.up_proj = nn.Linear(64, 96, bias=False)
    with pytest.raises(InputError, match="different sizes"):
        decoder_of(model)


def test_parameters_that_the_shape_does_not_explain_are_refused() -> None:
    model = make_model()
    model.model.layers[0].self_attn.extra = nn.Parameter(torch.zeros(3))
    with pytest.raises(InputError, match="different sizes"):
        decoder_of(model)
    for layer in model.model.layers:
        layer.self_attn.extra = nn.Parameter(torch.zeros(3))
    with pytest.raises(InputError, match=r"\+12 parameters"):
        _ = decoder_of(model).architecture


def test_parameters_outside_the_layers_are_refused() -> None:
    model = make_model()
    model.model.positions = nn.Embedding(8, 64)
    with pytest.raises(InputError, match=r"outside its layers: model\.positions\.weight"):
        decoder_of(model)


def test_swapped_gate_and_up_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The miniature runs the class's own code, so parts that lie by name are found out."""
    model = make_model()
    ffn = type(model.model.layers[0].mlp)
    monkeypatch.setattr(
        ffn, "forward", lambda self, x: self.down_proj(self.gate_proj(x) * self.act_fn(self.up_proj(x)))
    )
    with pytest.raises(InputError, match=r"not down\(act\(gate\) \* up\)"):
        decoder_of(model)


def test_a_norm_that_adds_one_to_its_gain_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    norm = type(model.model.norm)
    plain = norm.forward
    monkeypatch.setattr(norm, "forward", lambda self, x: plain(self, x) * (1 + self.weight) / self.weight)
    with pytest.raises(InputError, match="not a plain RMSNorm"):
        decoder_of(model)
