"""A child is exactly its parent with the removed units masked: every axis, every supported family."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from cascade.models.decoder import decoder_of
from cascade.pruning.surgery import prune
from tests.numerics.masking import masked
from tests.tiny import make_model

# A large epsilon, so that folding it wrongly is far outside the tolerance.
EPSILON = 0.05
TOLERANCE = 1e-4
PARENTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-untied-biased": {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    "llama-one-query-per-group": {"num_key_value_heads": 4},
    "mistral": {"sliding_window": 8},
    "qwen2": {},
    "qwen2-sliding": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
    "qwen3": {},
    "qwen3-untied": {"tie_word_embeddings": False, "attention_bias": True},
    "smollm3": {"no_rope_layers": [1, 0, 1, 0]},
}
CUTS: dict[str, dict[str, int]] = {
    "layers": {"layers": 2},
    "hidden": {"hidden": 40},
    "ffn": {"ffn": 72},
    "kv_groups": {"kv_groups": 1},
    "all": {"layers": 3, "hidden": 40, "ffn": 72, "kv_groups": 1},
    "none": {},
}


def parent(name: str) -> PreTrainedModel:
    return make_model(name.partition("-")[0], **{"rms_norm_eps": EPSILON, **PARENTS[name]})


def random_scores(model: PreTrainedModel) -> dict[str, Tensor]:
    """Scores without order, so that what stays is scattered and differs from layer to layer."""
    shape, draw = decoder_of(model).architecture, torch.Generator().manual_seed(5)
    sizes = {
        "layers": (shape.layers,),
        "hidden": (shape.hidden,),
        "ffn": (shape.layers, shape.ffn),
        "kv_groups": (shape.layers, shape.kv_groups),
    }
    return {axis: torch.rand(size, generator=draw) for axis, size in sizes.items()}


def tokens() -> Tensor:
    return torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(2))


def reloaded(child: PreTrainedModel, folder: Path) -> PreTrainedModel:
    child.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize(
    ("name", "cut"),
    [(name, cut) for name in ("llama", "mistral", "qwen2", "qwen3") for cut in CUTS]
    + [(name, "all") for name in PARENTS if name not in ("llama", "mistral", "qwen2", "qwen3")],
)
def test_child_is_the_masked_parent_after_save_and_load(name: str, cut: str, tmp_path: Path) -> None:
    model = parent(name)
    target = replace(decoder_of(model).architecture, **CUTS[cut])
    child, kept = prune(model, target, random_scores(model))
    loaded = reloaded(child, tmp_path)
    with torch.no_grad(), masked(model, kept):
        expected = model(input_ids=tokens()).logits
    with torch.no_grad():
        found = loaded(input_ids=tokens()).logits
    assert expected.std() > 0.1
    assert (found - expected).abs().max() <= TOLERANCE
    assert sum(parameter.numel() for parameter in loaded.parameters()) == target.parameters
    assert decoder_of(loaded).architecture == target


@pytest.mark.parametrize("name", ["llama", "qwen2-sliding", "qwen3", "smollm3"])
def test_cached_generation_is_that_of_the_masked_parent(name: str) -> None:
    model = parent(name)
    target = replace(decoder_of(model).architecture, **CUTS["all"])
    child, kept = prune(model, target, random_scores(model))
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached = child.generate(tokens()[:, :6], use_cache=True, **options)
    assert torch.equal(cached, child.generate(tokens()[:, :6], use_cache=False, **options))
    with masked(model, kept):
        assert torch.equal(cached, model.generate(tokens()[:, :6], use_cache=True, **options))


def test_a_cut_of_a_cut_is_still_exact() -> None:
    """Stages cut what earlier stages cut: gains and epsilon are folded twice."""
    model = parent("qwen3")
    shape = decoder_of(model).architecture
    first, _ = prune(model, replace(shape, hidden=56, layers=3), random_scores(model))
    second, kept = prune(first, replace(shape, hidden=40, layers=2, ffn=64), random_scores(first))
    with torch.no_grad(), masked(first, kept):
        expected = first(input_ids=tokens()).logits
    with torch.no_grad():
        assert (second(input_ids=tokens()).logits - expected).abs().max() <= TOLERANCE


def test_the_reference_notices_one_wrong_channel() -> None:
    """The tolerance would prove nothing if a wrong index stayed below it."""
    model = parent("llama")
    target = replace(decoder_of(model).architecture, ffn=72)
    child, kept = prune(model, target, random_scores(model))
    missing = next(neuron for neuron in range(128) if neuron not in kept["ffn"][0])
    kept["ffn"][0][0] = missing
    with torch.no_grad(), masked(model, kept):
        expected = model(input_ids=tokens()).logits
    with torch.no_grad():
        assert (child(input_ids=tokens()).logits - expected).abs().max() > 10 * TOLERANCE
