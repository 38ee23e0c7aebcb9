"""A decoder's parts and sizes are found by structure, counted twice, and refused when they do not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from cascade.architecture import Architecture, Sizes
from cascade.errors import InputError
from cascade.models import anatomy as anatomies
from cascade.models.anatomy import Anatomy, anatomy_of
from cascade.models.decoder import architecture_of, decoder_of
from cascade.models.entries import OTHER_ORDER, SUMS, Entries, length
from cascade.models.norms import NormKind
from cascade.pruning import proof
from tests.architectures import ARCHITECTURES, BOUND, EXPERTS, UNGROUPED, tiny
from tests.tiny import make_model

HIDDEN, FFN, QUERIES, KEYS, FIXED = (
    Entries.HIDDEN,
    Entries.FFN,
    Entries.QUERIES,
    Entries.KEYS,
    Entries.FIXED,
)
LLAMA_BY_HAND = {
    "self_attn.q_proj.weight": (QUERIES, HIDDEN),
    "self_attn.q_proj.bias": (QUERIES,),
    "self_attn.k_proj.weight": (KEYS, HIDDEN),
    "self_attn.k_proj.bias": (KEYS,),
    "self_attn.v_proj.weight": (KEYS, HIDDEN),
    "self_attn.v_proj.bias": (KEYS,),
    "self_attn.o_proj.weight": (HIDDEN, QUERIES),
    "self_attn.o_proj.bias": (HIDDEN,),
    "mlp.gate_proj.weight": (FFN, HIDDEN),
    "mlp.gate_proj.bias": (FFN,),
    "mlp.up_proj.weight": (FFN, HIDDEN),
    "mlp.up_proj.bias": (FFN,),
    "mlp.down_proj.weight": (HIDDEN, FFN),
    "mlp.down_proj.bias": (HIDDEN,),
    "input_layernorm.weight": (HIDDEN,),
    "post_attention_layernorm.weight": (HIDDEN,),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_shape_from_the_config_is_the_modules_own(name: str) -> None:
    model = tiny(name)
    architecture = architecture_of(model.config)
    assert architecture == decoder_of(model).architecture
    assert architecture.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert (architecture.layers, architecture.hidden, architecture.ffn) == (4, 64, 128)
    assert (architecture.kv_groups, architecture.head_size) == (4 if name in UNGROUPED else 2, 16)
    assert architecture.heads == 4
    assert architecture.experts == (4 if name in EXPERTS else 0)
    assert architecture.counts.bound == (name in BOUND)
    assert architecture.vocabulary == 258
    assert Architecture.from_record(architecture.record()) == architecture


def anatomy(name: str, **overrides: Any) -> Anatomy:
    model = tiny(name, **overrides)
    found = anatomy_of(type(model), model.config)
    assert isinstance(found, Anatomy), found
    return found


def test_every_dimension_of_a_llama_with_every_bias() -> None:
    found = anatomy("llama", attention_bias=True, mlp_bias=True, tie_word_embeddings=False)
    assert found.layer == LLAMA_BY_HAND
    assert found.outer == {
        "model.embed_tokens.weight": (FIXED, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (FIXED, HIDDEN),
    }
    assert (found.ffn_reader, found.attention_reader) == ("mlp.down_proj", "self_attn.o_proj")


def test_fused_and_stacked_parameters() -> None:
    assert anatomy("phi3").layer["self_attn.qkv_proj.weight"] == (Entries.QKV_BLOCKS, HIDDEN)
    assert anatomy("phi3").layer["mlp.gate_up_proj.weight"] == (Entries.FFN_HALVES, HIDDEN)
    assert anatomy("gpt2").layer["attn.c_attn.weight"] == (HIDDEN, Entries.QKV_BLOCKS)
    assert anatomy("gpt2").layer["attn.c_proj.weight"] == (QUERIES, HIDDEN)
    assert anatomy("opt").layer["self_attn.out_proj.weight"] == (HIDDEN, QUERIES)
    assert anatomy("qwen3").layer["self_attn.q_norm.weight"] == (FIXED,)
    assert anatomy("olmo2").layer["self_attn.q_norm.weight"] == (QUERIES,)
    assert anatomy("gpt_oss").layer["self_attn.sinks"] == (Entries.HEADS,)
    assert anatomy("mixtral").layer["mlp.experts.down_proj"] == (Entries.EXPERTS, HIDDEN, FFN)
    assert anatomy("mixtral").router == "mlp.gate"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("llama", NormKind.RMS),
        ("gemma", NormKind.RMS_PLUS_ONE),
        ("cohere", NormKind.LAYER),
        ("opt", NormKind.LAYER),
    ],
)
def test_norms_are_recognised_by_what_they_compute(name: str, kind: NormKind) -> None:
    assert set(anatomy(name).layer_norms.values()) == {kind}


def test_parts_are_the_models_own_modules_in_order() -> None:
    model = tiny("llama")
    decoder, layers = decoder_of(model), model.model.layers
    assert decoder.embeddings is model.get_input_embeddings()
    assert decoder.layers == tuple(layers)
    assert decoder.ffn_readers == [layer.mlp.down_proj for layer in layers]
    assert decoder.attention_readers == [layer.self_attn.o_proj for layer in layers]
    norms = [n for layer in layers for n in (layer.input_layernorm, layer.post_attention_layernorm)]
    assert decoder.hidden_norms == [(norm, NormKind.RMS) for norm in [*norms, model.model.norm]]


def test_parts_of_another_family_have_other_names() -> None:
    model = tiny("gpt2")
    decoder, layers = decoder_of(model), model.transformer.h
    assert decoder.ffn_readers == [layer.mlp.c_proj for layer in layers]
    assert decoder.attention_readers == [layer.attn.c_proj for layer in layers]
    norms = [norm for layer in layers for norm in (layer.ln_1, layer.ln_2)]
    assert decoder.hidden_norms == [(norm, NormKind.LAYER) for norm in [*norms, model.transformer.ln_f]]


def test_finding_the_parts_changes_neither_weights_nor_random_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anatomies, "_known", {})
    monkeypatch.setattr(proof, "_known", {})
    model = make_model()
    weights, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    proof.proof_of(decoder_of(model))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert all(not module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("head_size", [8, 16, 64, 96, 128])
def test_every_kind_of_dimension_has_two_lengths_of_its_own(head_size: int) -> None:
    first, second = (Sizes(layers=2, head_size=head_size, **sizes) for sizes in anatomies.SIZES)
    lengths: dict[tuple[int, int], Entries] = {}
    for entries in SUMS:
        pair = (length(entries, first), length(entries, second))
        assert pair[0] != pair[1]
        known = lengths.setdefault(pair, entries)
        assert known is entries or OTHER_ORDER.get(known) is entries


def test_flops_leave_out_the_biases_of_experts() -> None:
    counts = architecture_of(tiny("gpt_oss").config).counts
    matrices = {term.factors: term.count for term in counts.layer if term.matrix}
    assert matrices == {
        ("experts", "ffn", "hidden"): 3,
        ("experts", "hidden"): 1,
        ("hidden", "keys"): 2,
        ("hidden", "queries"): 2,
    }


def test_flops_count_active_experts_only() -> None:
    dense = architecture_of(tiny("mixtral", num_experts_per_tok=4).config)
    sparse = architecture_of(tiny("mixtral", num_experts_per_tok=1).config)
    experts = dense.layers * 3 * 64 * 128 * 2
    assert dense.forward_flops(0) - sparse.forward_flops(0) == 3 * experts


REFUSED = [
    ("mamba", "no attention heads"),
    ("t5", "no causal language model"),
    ("diffllama", "its config cannot set"),
    ("deepseek_v3", "not understood"),
    ("nemotron", "transformers can build .*NoneType"),
    ("minimax_m2", "a stored buffer"),
]


@pytest.mark.parametrize(("family", "reason"), REFUSED)
def test_what_is_not_understood_is_refused_with_the_reason(family: str, reason: str) -> None:
    ids = {"vocab_size": 258, "bos_token_id": None, "eos_token_id": 256, "pad_token_id": 257}
    with pytest.raises(InputError, match=reason) as caught:
        architecture_of(AutoConfig.for_model(family, **ids))
    assert caught.value.value == family
    assert caught.value.remedy


def test_a_size_that_the_config_does_not_explain_is_refused() -> None:
    model = make_model()
    model.model.layers[1].mlp.up_proj = nn.Linear(64, 96, bias=False)
    with pytest.raises(InputError, match=r"layer 1 .* not explain \(mlp.up_proj.weight: 96\)"):
        decoder_of(model)


def test_parameters_that_the_class_does_not_have_are_refused() -> None:
    model = make_model()
    model.model.layers[0].self_attn.extra = nn.Parameter(torch.zeros(3))
    with pytest.raises(InputError, match=r"in layer 0 that others of its class lack"):
        decoder_of(model)
    model = make_model()
    model.model.positions = nn.Embedding(8, 64)
    with pytest.raises(InputError, match=r"outside its layers .*model\.positions\.weight"):
        decoder_of(model)
