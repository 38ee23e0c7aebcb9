"""Proof that a model computes what pruning assumes, on a miniature of its own class.

Scaled embeddings or logits (Gemma, Granite), post-norms (OLMo 2), parallel attention (Cohere), gains
of 1 + weight and the like have the same parts as a Llama, but cutting them by a Llama's rules is
silently wrong. The miniature also proves that the class can be resized through its config, which is
how a child is built.

Legend: B batch, T tokens, D hidden, H query heads, G KV groups, h head size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN

if TYPE_CHECKING:
    from cascade.models.decoder import Decoder, DecoderLayer

LAYERS, GROUPS, QUERIES_PER_GROUP, FFN, VOCABULARY, TOKENS = 2, 2, 2, 24, 32, 6
FIELDS = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "rms_norm_eps",
    "hidden_act",
)
# What a class raises when it is built or run with sizes that it does not take from its config.
BUILD_ERRORS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
    StrictDataclassError,
)
Calls = dict[nn.Module, tuple[Tensor, Tensor]]


def head_size(config: PreTrainedConfig) -> int:
    """h: stated, or D / H where the config does not state it."""
    stated = getattr(config, "head_dim", None)
    return int(stated or config.hidden_size // config.num_attention_heads)


def difference(decoder: Decoder, find_parts: Callable[[PreTrainedModel], Decoder]) -> str:
    """What the decoder's class does differently from a pre-norm Llama, or "" if nothing."""
    config = decoder.model.config
    absent = [field for field in FIELDS if getattr(config, field, None) is None]
    if absent:
        return f"no {', '.join(absent)} in its config"
    if config.hidden_act not in ACT2FN:
        return f"an unknown activation {config.hidden_act}"
    try:
        return _measured_difference(decoder.model, find_parts)
    except BUILD_ERRORS as error:
        return f"sizes that its config cannot set ({' '.join(str(error).split())[:200]})"


def _measured_difference(model: PreTrainedModel, find_parts: Callable[[PreTrainedModel], Decoder]) -> str:
    """Build the miniature, run it, compare every step."""
    small = find_parts(_miniature(model))
    expected = (QUERIES_PER_GROUP * GROUPS * head_size(model.config), small.model.config.hidden_size)
    if tuple(small.layers[0].q.weight.shape) != expected:
        return "a head size that its config cannot set"
    tokens = torch.arange(TOKENS)[None]
    calls, logits = _record(small, tokens)
    checks = [_ends_difference(small, tokens, calls, logits)]
    checks += [_layer_difference(layer, calls, small.model.config) for layer in small.layers]
    checks += [_grouping_difference(small, tokens)]
    return next((check for check in checks if check), "")


def _miniature(model: PreTrainedModel) -> PreTrainedModel:
    """The same class on the CPU, two layers, random weights, no gain or bias at its constant."""
    config = copy.deepcopy(model.config)
    size, depth = head_size(config), config.num_hidden_layers
    for name, value in vars(config).items():
        if isinstance(value, list | tuple) and len(value) == depth:
            setattr(config, name, value[:LAYERS])
    config.num_hidden_layers, config.vocab_size, config.intermediate_size = LAYERS, VOCABULARY, FFN
    config.num_key_value_heads, config.num_attention_heads = GROUPS, GROUPS * QUERIES_PER_GROUP
    # Not H * h, so that a class that ignores head_dim is noticed.
    config.head_dim, config.hidden_size = size, 2 * size + 8
    config.pad_token_id = None
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        small = type(model)._from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
        for parameter in small.parameters():
            nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.2)
    return small


def _record(decoder: Decoder, tokens: Tensor) -> tuple[Calls, Tensor]:
    """One forward pass [1, T]: each part's first input and output, and the logits."""
    calls: Calls = {}

    def keep(
        module: nn.Module, inputs: tuple[Tensor, ...], keywords: dict[str, Tensor], output: Tensor
    ) -> None:
        first = inputs[0] if inputs else next(iter(keywords.values()))
        calls[module] = (first, output[0] if isinstance(output, tuple) else output)

    handles = [module.register_forward_hook(keep, with_kwargs=True) for module in decoder.model.modules()]
    try:
        with torch.no_grad():
            logits = decoder.model(input_ids=tokens, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    return calls, logits


def _ends_difference(decoder: Decoder, tokens: Tensor, calls: Calls, logits: Tensor) -> str:
    """Before the first and after the last layer."""
    embedded = nn.functional.embedding(tokens, decoder.embeddings.weight)
    if not _same(calls[decoder.layers[0].module][0], embedded):
        return "scaled or shifted embeddings"
    last, norm = calls[decoder.layers[-1].module][1], calls[decoder.final_norm]
    if not (_same(norm[0], last) and _is_rms_norm(decoder.final_norm, norm, decoder.model.config)):
        return "a final norm that is not a plain RMSNorm"
    if not _same(logits, norm[1] @ decoder.head.weight.T):
        return "scaled or shifted logits"
    return ""


def _layer_difference(layer: DecoderLayer, calls: Calls, config: PreTrainedConfig) -> str:
    """x -> x + o(attention(norm(x))) -> y + down(act(gate(norm(y))) * up(norm(y)))."""
    start, end = calls[layer.module]
    middle = start + calls[layer.o][1]
    if not (_same(calls[layer.input_norm][0], start) and _same(calls[layer.ffn_norm][0], middle)):
        return "post-norms, parallel attention or a scaled residual"
    if not _same(end, middle + calls[layer.down][1]):
        return "post-norms, parallel attention or a scaled residual"
    for norm, readers in (
        (layer.input_norm, (layer.q, layer.k, layer.v)),
        (layer.ffn_norm, (layer.gate, layer.up)),
    ):
        if not _is_rms_norm(norm, calls[norm], config):
            return "a norm that is not a plain RMSNorm"
        if not all(_same(calls[reader][0], calls[norm][1]) for reader in readers):
            return "projections that do not read the norm's output"
    product = ACT2FN[config.hidden_act](calls[layer.gate][1]) * calls[layer.up][1]
    return "" if _same(calls[layer.down][0], product) else "an FFN that is not down(act(gate) * up)"


def _grouping_difference(decoder: Decoder, tokens: Tensor) -> str:
    """KV group g must serve query heads g*q .. (g+1)*q - 1: without its values only they are silent."""
    layer = decoder.layers[0]
    size = layer.k.out_features // GROUPS
    with torch.no_grad():
        for parameter in layer.v.parameters():
            parameter[:size] = 0
    attended = _record(decoder, tokens)[0][layer.o][0]
    silent = (attended == 0).all(dim=1)[0]
    expected = torch.arange(len(silent)) < QUERIES_PER_GROUP * size
    return "" if torch.equal(silent, expected) else "query heads that are not grouped in order"


def _is_rms_norm(norm: nn.Module, call: tuple[Tensor, Tensor], config: PreTrainedConfig) -> bool:
    """weight * x / sqrt(mean(x^2) + eps) (Zhang and Sennrich, 1910.07467, equation 4)."""
    given, result = call
    scale = torch.rsqrt(given.square().mean(-1, keepdim=True) + config.rms_norm_eps)
    return _same(result, given * scale * norm.get_parameter("weight"))


def _same(left: Tensor, right: Tensor) -> bool:
    return left.shape == right.shape and torch.allclose(left, right, rtol=1e-4, atol=1e-5)
