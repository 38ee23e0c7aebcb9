"""Tiny random decoders of every architecture that the README lists, and how far each is cut in tests."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from tests.tiny import make_model

# Classes that take the head size from D / H, and those of them whose heads share no keys.
BOUND = ("stablelm", "gpt2", "gpt_neox", "opt")
UNGROUPED = ("gpt2", "gpt_neox", "opt")
EXPERTS = ("mixtral", "qwen3_moe", "gpt_oss")
NO_GROUPS = {"num_key_value_heads": None, "head_dim": None}
# Refused for a rotation: a norm's gain that no matrix takes up, or a norm that subtracts a mean.
POST_NORMS = ("gemma2", "gemma3_text", "olmo2")
LAYER_NORMS = ("cohere", "starcoder2", "stablelm", "gpt2", "gpt_neox", "opt")
UNTURNED = POST_NORMS + LAYER_NORMS
# Plain, scaled embeddings and two windows, fused, LayerNorm with bound heads, experts: in every test run.
CORE = ("llama", "gemma2", "phi3", "gpt2", "gpt_oss")
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
    "qwen3": {"attention_bias": True},
    "gemma": {},
    "gemma2": {"sliding_window": 4, "query_pre_attn_scalar": 16},
    "gemma3_text": {"sliding_window": 4, "query_pre_attn_scalar": 16},
    "phi3": {},
    "olmo2": {},
    "smollm3": {"no_rope_layers": [1, 0, 1, 0]},
    "granite": {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    "cohere": {"logit_scale": 0.5},
    "starcoder2": {"tie_word_embeddings": False},
    "stablelm": {"use_qkv_bias": True, "head_dim": None},
    "gpt2": {"intermediate_size": None, "n_inner": 128, **NO_GROUPS},
    "gpt_neox": {"tie_word_embeddings": False, **NO_GROUPS},
    "opt": {"intermediate_size": None, "ffn_dim": 128, "word_embed_proj_dim": 64, **NO_GROUPS},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4},
}


def tiny(name: str, **overrides: Any) -> PreTrainedModel:
    """Four layers, D 64, F 128, four heads of size 16 in two KV groups (or in four), four experts."""
    return make_model(name, **{**ARCHITECTURES[name], **overrides})


def cuts(name: str) -> dict[str, dict[str, int]]:
    """Sizes after a cut, for each axis that the architecture has, and for all of them at once."""
    heads = {"kv_groups": 2 if name in UNGROUPED else 1}
    found = {"layers": {"layers": 2}, "ffn": {"ffn": 72}}
    if name in BOUND:
        # D = G * q * h, so hidden channels and heads go together.
        found["hidden and kv_groups"] = {"hidden": 32, **heads}
    else:
        found["hidden"], found["kv_groups"] = {"hidden": 40}, heads
    if name not in UNGROUPED:
        found["heads_per_group"] = {"heads_per_group": 1} | ({"hidden": 32} if name in BOUND else {})
    if name in EXPERTS:
        found["experts"] = {"experts": 3}
    everything = {axis: size for cut in found.values() for axis, size in cut.items()}
    if name == "stablelm":
        everything["hidden"] = 16
    return {**found, "all": everything}
