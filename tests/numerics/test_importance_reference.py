"""The streamed scores against a dense reference: a Llama from its formulas in float64."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from cascade.importance.calibration import calibrate
from tests.tiny import make_model


@dataclass
class Dense:
    """All activations: streams [L+1][N,T,D], norms [2L+1][N,T,D], products [L][N,T,F], heads [L][N,T,H,h]."""

    streams: list[Tensor] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)
    products: list[Tensor] = field(default_factory=list)
    heads: list[Tensor] = field(default_factory=list)


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """1910.07467, equation 4."""
    return gain * x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def rotate(x: Tensor, theta: float) -> Tensor:
    """Rotary positions (2104.09864, equation 34) in the half-split order of Llama, x [N,T,H,h]."""
    half = x.shape[-1] // 2
    frequency = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = (torch.arange(x.shape[1], dtype=torch.float64)[:, None] * frequency)[:, None, :]
    first, second = x[..., :half], x[..., half:]
    return torch.cat(
        [
            first * angle.cos() - second * angle.sin(),
            second * angle.cos() + first * angle.sin(),
        ],
        dim=-1,
    )


def dense_llama(model: PreTrainedModel, rows: Tensor) -> Dense:
    """Run the Llama of `model` on all rows at once."""
    config, weights = model.config, {k: v.double() for k, v in model.state_dict().items()}
    seen, eps, size = Dense(), config.rms_norm_eps, config.head_dim
    x = weights["model.embed_tokens.weight"][rows]
    causal = torch.full((rows.shape[1],) * 2, -torch.inf, dtype=torch.float64).triu(1)
    for layer in range(config.num_hidden_layers):
        w = {k.split(f"layers.{layer}.")[1]: v for k, v in weights.items() if f"layers.{layer}." in k}
        seen.streams.append(x)
        seen.norms.append(rms_norm(x, w["input_layernorm.weight"], eps))
        q, k, v = (
            (seen.norms[-1] @ w[f"self_attn.{name}_proj.weight"].T).unflatten(-1, (-1, size))
            for name in "qkv"
        )
        theta = config.rope_parameters["rope_theta"]
        repeats = q.shape[2] // k.shape[2]
        k, v = rotate(k, theta).repeat_interleave(repeats, dim=2), v.repeat_interleave(repeats, dim=2)
        scores = torch.einsum("nthc,nshc->nhts", rotate(q, theta), k) / size**0.5 + causal
        seen.heads.append(torch.einsum("nhts,nshc->nthc", scores.softmax(-1), v))
        x = x + seen.heads[-1].flatten(2) @ w["self_attn.o_proj.weight"].T
        seen.norms.append(rms_norm(x, w["post_attention_layernorm.weight"], eps))
        gate, up = (seen.norms[-1] @ w[f"mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        seen.products.append(gate * gate.sigmoid() * up)
        x = x + seen.products[-1] @ w["mlp.down_proj.weight"].T
    seen.streams.append(x)
    seen.norms.append(rms_norm(x, weights["model.norm.weight"], eps))
    return seen


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return make_model("llama", seed=3)


@pytest.fixture(scope="module")
def rows() -> Tensor:
    return torch.randint(0, 256, (7, 24), generator=torch.Generator().manual_seed(1), dtype=torch.int32)


@pytest.fixture(scope="module")
def dense(model: PreTrainedModel, rows: Tensor) -> Dense:
    return dense_llama(model, rows.long())


@pytest.fixture(scope="module")
def scores(model: PreTrainedModel, rows: Tensor) -> dict[str, Tensor]:
    return calibrate(model, rows, batch=3)


def test_reference_is_the_model(model: PreTrainedModel, rows: Tensor, dense: Dense) -> None:
    """The reference would prove nothing if it were another model."""
    with torch.no_grad():
        logits = model(input_ids=rows.long()).logits.double()
    expected = dense.norms[-1] @ model.get_output_embeddings().weight.double().T
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_layers_are_one_minus_the_mean_cosine(scores: dict[str, Tensor], dense: Dense) -> None:
    expected = []
    for before, after in zip(dense.streams, dense.streams[1:], strict=False):
        cosine = (before * after).sum(-1) / (before.pow(2).sum(-1).sqrt() * after.pow(2).sum(-1).sqrt())
        expected.append(1 - cosine.mean())
    torch.testing.assert_close(scores["layers"].double(), torch.stack(expected), rtol=1e-4, atol=1e-6)


def test_hidden_is_the_rms_of_the_norm_outputs_summed_over_norms(
    scores: dict[str, Tensor], dense: Dense
) -> None:
    expected = sum(norm.pow(2).mean((0, 1)).sqrt() for norm in dense.norms)
    torch.testing.assert_close(scores["hidden"].double(), expected, rtol=1e-4, atol=1e-6)


def test_ffn_is_the_rms_of_the_gated_product(scores: dict[str, Tensor], dense: Dense) -> None:
    expected = torch.stack([product.pow(2).mean((0, 1)).sqrt() for product in dense.products])
    torch.testing.assert_close(scores["ffn"].double(), expected, rtol=1e-4, atol=1e-6)


def test_kv_groups_are_the_mean_norm_of_their_heads_outputs(scores: dict[str, Tensor], dense: Dense) -> None:
    expected = torch.stack(
        [
            torch.stack([heads[:, :, :2], heads[:, :, 2:]]).pow(2).sum((-1, -2)).sqrt().mean((1, 2))
            for heads in dense.heads
        ]
    )
    torch.testing.assert_close(scores["kv_groups"].double(), expected, rtol=1e-4, atol=1e-6)
