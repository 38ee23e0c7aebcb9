"""A rotation leaves the logits alone, and the cut after it is the projection that the formula says.

The reference is a Llama written out in float64, without transformers and without cascade.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel

from cascade.models.decoder import decoder_of
from cascade.planning.shapes import untied
from cascade.pruning import rotation
from cascade.pruning.principal import principal_basis
from cascade.pruning.prune import prune
from cascade.pruning.rotation import random_basis, rotated, rotation_refusal
from tests.architectures import ARCHITECTURES, LAYER_NORMS, POST_NORMS
from tests.numerics.masking import masked
from tests.numerics.parents import parent, tokens
from tests.tiny import make_model

TOLERANCE = 1e-4
REFUSED = {
    **dict.fromkeys(POST_NORMS, "post_attention_layernorm goes into no matrix"),
    **dict.fromkeys(LAYER_NORMS, "is a LayerNorm"),
}
ROTATED = [name for name in ARCHITECTURES if name not in REFUSED]
L, D, H, G, HEAD, NARROW, EPS = 4, 64, 4, 2, 16, 40, 0.05
Weights = dict[str, Tensor]


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=tokens()).logits
    return found


def require_same(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_rotated_exactly_is_refused_with_the_reason(name: str) -> None:
    assert REFUSED[name] in rotation_refusal(decoder_of(parent(name)))


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("name", ROTATED)
def test_a_rotation_at_full_width_leaves_the_logits_alone(name: str, tie: bool, tmp_path: Path) -> None:
    model = parent(name, tie_word_embeddings=tie)
    decoder, expected = decoder_of(model), logits(model)
    assert decoder.architecture.tied is tie
    assert rotation_refusal(decoder) == ""
    other = rotated(decoder, random_basis(D))
    require_same(logits(other), expected)
    other.save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    require_same(logits(stock), expected)
    assert stock.config.tie_word_embeddings is False
    head, embeddings = stock.get_output_embeddings().weight, stock.get_input_embeddings().weight
    assert head.data_ptr() != embeddings.data_ptr()
    assert not torch.equal(head, embeddings)


@pytest.mark.parametrize("name", ROTATED)
def test_a_cut_of_a_rotated_model_is_that_model_masked(name: str) -> None:
    model = parent(name)
    basis, eigenvalues = principal_basis(model, tokens(), range(L))
    other = rotated(decoder_of(model), basis)
    target = replace(untied(decoder_of(model).architecture), hidden=NARROW)
    child, kept = prune(other, target, {"hidden": eigenvalues})
    assert kept["hidden"] == list(range(NARROW))
    assert sum(parameter.numel() for parameter in child.parameters()) == target.parameters
    with masked(other, kept):
        expected = logits(other)
    require_same(logits(child), expected)
    assert (expected - logits(model)).abs().max() > 100 * TOLERANCE


def rms(x: Tensor, gain: Tensor, epsilon: float, width: int) -> Tensor:
    return gain * x / (x.square().sum(-1, keepdim=True) / width + epsilon).sqrt()


def roped(x: Tensor, base: float) -> Tensor:
    """x [T, heads, h] turned by its position."""
    angles = torch.arange(len(x)).double()[:, None] * base ** (-torch.arange(0, HEAD, 2).double() / HEAD)
    sine, cosine = angles.sin()[:, None], angles.cos()[:, None]
    left, right = x[..., : HEAD // 2], x[..., HEAD // 2 :]
    return torch.cat([left * cosine - right * sine, right * cosine + left * sine], dim=-1)


def llama(
    weights: Weights,
    row: Tensor,
    *,
    epsilon: float = EPS,
    width: int = D,
    write: Callable[[Tensor], Tensor] = lambda x: x,
    seen: dict[int, list[Tensor]] | None = None,
) -> Tensor:
    """Logits [T, V] of one row [T]. width: what norms divide by; write: done to all that enters the stream;
    seen: receives, by layer, what its two norms read."""
    read = {} if seen is None else seen
    x = write(weights["model.embed_tokens.weight"][row])
    causal = torch.full((len(row), len(row)), -torch.inf).triu(1).double()
    for layer in range(L):
        own = {
            name.partition(f".{layer}.")[2]: w for name, w in weights.items() if f"layers.{layer}." in name
        }
        linear = {
            name: (own[f"{path}.{name}.weight"], own[f"{path}.{name}.bias"])
            for path, names in (
                ("self_attn", "q_proj k_proj v_proj o_proj"),
                ("mlp", "gate_proj up_proj down_proj"),
            )
            for name in names.split()
        }
        y = rms(x, own["input_layernorm.weight"], epsilon, width)
        heads = {n: functional.linear(y, *linear[f"{n}_proj"]).view(len(row), -1, HEAD) for n in "qkv"}
        q, k = roped(heads["q"], 10000.0), roped(heads["k"], 10000.0)
        k, v = (part.repeat_interleave(H // G, dim=1) for part in (k, heads["v"]))
        scores = torch.einsum("thd,shd->hts", q, k) / HEAD**0.5 + causal
        attended = torch.einsum("hts,shd->thd", scores.softmax(-1), v).flatten(1)
        between = x + write(functional.linear(attended, *linear["o_proj"]))
        read[layer] = [x, between]
        y = rms(between, own["post_attention_layernorm.weight"], epsilon, width)
        product = functional.silu(functional.linear(y, *linear["gate_proj"])) * functional.linear(
            y, *linear["up_proj"]
        )
        x = between + write(functional.linear(product, *linear["down_proj"]))
    return rms(x, weights["model.norm.weight"], epsilon, width) @ weights["lm_head.weight"].T


def truncated(weights: Weights, basis: Tensor, narrow: int) -> Weights:
    """Fold gains, rotate, keep the first `narrow` channels, rescale: with epsilon * D / D', a model of D'."""
    result: Weights = {}
    for name, w in weights.items():
        layer = ".".join(name.split(".")[:3])
        if "norm" in name:
            result[name] = torch.full((narrow,), (D / narrow) ** 0.5, dtype=torch.float64)
        elif "embed" in name:
            result[name] = (w @ basis)[:, :narrow]
        elif "lm_head" in name:
            result[name] = (w * weights["model.norm.weight"] @ basis)[:, :narrow]
        elif "o_proj" in name or "down_proj" in name:
            result[name] = (basis.T @ w)[:narrow]
        elif name.endswith("weight"):
            norm = "input_layernorm" if "self_attn" in name else "post_attention_layernorm"
            result[name] = (w * weights[f"{layer}.{norm}.weight"] @ basis)[:, :narrow]
        else:
            result[name] = w
    return result


def plain_llama(tie: bool = True) -> tuple[PreTrainedModel, Weights]:
    """A Llama with every bias, random gains and a large epsilon, and its weights in float64."""
    model = make_model("llama", attention_bias=True, mlp_bias=True, rms_norm_eps=EPS, tie_word_embeddings=tie)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(torch.rand(D, generator=torch.Generator().manual_seed(len(name))) + 0.5)
    return model, {name: tensor.double() for name, tensor in model.state_dict().items()}


def test_the_reference_is_a_llama() -> None:
    model, weights = plain_llama()
    require_same(logits(model)[0], llama(weights, tokens()[0]))


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("fitted", [True, False])
def test_rotated_and_cut_is_the_formula(tie: bool, fitted: bool) -> None:
    model, weights = plain_llama(tie)
    basis, values = (
        principal_basis(model, tokens(), range(L)) if fitted else (random_basis(D), -torch.arange(D))
    )
    other = rotated(decoder_of(model), basis)
    target = replace(decoder_of(other).architecture, hidden=NARROW)
    child, _ = prune(other, target, {"hidden": values})
    narrow, first = truncated(weights, basis, NARROW), basis[:, :NARROW]
    for row, found in zip(tokens(), logits(child), strict=True):
        by_hand = llama(narrow, row, epsilon=EPS * D / NARROW, width=NARROW)
        require_same(found, by_hand)
        # In the old basis: nothing is folded or rescaled, all that is written is projected.
        projected = llama(weights, row, write=lambda x: x @ first @ first.T)
        assert torch.allclose(by_hand, projected, atol=1e-10)
        assert (projected - llama(weights, row)).abs().max() > 100 * TOLERANCE


def dense(weights: Weights, layers: list[int]) -> Tensor:
    """All that the norms of `layers` read, [N, D], by the reference."""
    found = []
    for row in tokens():
        seen: dict[int, list[Tensor]] = {}
        llama(weights, row, seen=seen)
        found += [x for layer in layers for x in seen[layer]]
    return torch.cat(found)


@pytest.mark.parametrize("layers", [[0, 1, 2, 3], [0, 3], [2]])
def test_the_basis_is_that_of_the_dense_second_moment(layers: list[int]) -> None:
    model, weights = plain_llama()
    read = dense(weights, layers)
    moment = read.T @ read / len(read)
    basis, values = principal_basis(model, tokens(), layers, batch=1)
    expected = torch.linalg.eigh(moment)
    assert basis.dtype == values.dtype == torch.float64
    assert torch.allclose(values, expected.eigenvalues.flip(0), atol=1e-5 * values[0])
    assert torch.allclose(basis * values @ basis.T, moment, atol=1e-5 * values[0])
    # Columns one by one where the eigenvalues are far enough apart.
    assert torch.allclose(
        (basis[:, :3] * expected.eigenvectors.flip(1)[:, :3]).sum(0).abs(), torch.ones(3).double()
    )
    assert (basis.T @ basis - torch.eye(D)).abs().max() < 1e-5


def test_projecting_onto_it_loses_less_than_trimming_any_channels() -> None:
    model, weights = plain_llama()
    read = dense(weights, [0, 1, 2, 3])
    basis, values = principal_basis(model, tokens(), range(L))
    first = basis[:, :NARROW]
    lost = (read - read @ first @ first.T).square().sum() / len(read)
    best_trimmed = (read.square().sum(0) / len(read)).sort().values[: D - NARROW].sum()
    assert torch.allclose(lost, values[NARROW:].sum(), rtol=1e-4)
    assert lost < 0.9 * best_trimmed


def test_the_tolerance_notices_a_gain_that_is_not_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactness would prove nothing if a wrong fold stayed below the tolerance."""
    model, _ = plain_llama()
    plain: Any = rotation.turned
    rotated(decoder_of(model), random_basis(D))
    monkeypatch.setattr(
        rotation, "turned", lambda values, at, basis, read, gain: plain(values, at, basis, read, None)
    )
    other = rotated(decoder_of(model), random_basis(D))
    assert (logits(other) - logits(model)).abs().max() > 100 * TOLERANCE * logits(model).abs().max()
