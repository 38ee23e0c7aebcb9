"""The streamed scores against a dense reference: a Llama from its formulas in float64."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from cascade.importance.agreement import agreement
from cascade.importance.calibration import calibrate
from cascade.importance.method import Aggregation
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


def dense_llama(model: PreTrainedModel, rows: Tensor, kept: Collection[int] | None = None) -> Dense:
    """Run the Llama of `model` on all rows at once, with the layers of `kept` only."""
    config, weights = model.config, {k: v.double() for k, v in model.state_dict().items()}
    seen, eps, size = Dense(), config.rms_norm_eps, config.head_dim
    x = weights["model.embed_tokens.weight"][rows]
    causal = torch.full((rows.shape[1],) * 2, -torch.inf, dtype=torch.float64).triu(1)
    for layer in range(config.num_hidden_layers) if kept is None else kept:
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
def found(model: PreTrainedModel, rows: Tensor) -> dict[str, Tensor]:
    return calibrate(model, rows, batch=3, drops=(1, 2, 3)).statistics


def aggregated(values_NTX: Tensor) -> dict[str, Tensor]:
    """The three aggregations from their formulas, [..., N, T, X] to [..., X]."""
    magnitudes = values_NTX.abs()
    return {
        "rms": values_NTX.pow(2).mean((-3, -2)).sqrt(),
        "mean": magnitudes.mean((-3, -2)),
        "l2_mean": magnitudes.mean(-2).pow(2).sum(-2).sqrt(),
    }


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6, equal_nan=True)


def pairs(value: Callable[[int, int], Tensor], lengths: Collection[int]) -> Tensor:
    """The matrix [5, 5] of value(i, j) for the blocks of these lengths, NaN elsewhere."""
    matrix = torch.full((5, 5), torch.nan, dtype=torch.float64)
    for i in range(5):
        for j in range(i + 1, 5):
            if j - i in lengths:
                matrix[i, j] = value(i, j)
    return matrix


def test_reference_is_the_model(model: PreTrainedModel, rows: Tensor, dense: Dense) -> None:
    """The reference would prove nothing if it were another model."""
    with torch.no_grad():
        logits = model(input_ids=rows.long()).logits.double()
    expected = dense.norms[-1] @ model.get_output_embeddings().weight.double().T
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_block_influence_is_one_minus_the_mean_cosine(found: dict[str, Tensor], dense: Dense) -> None:
    def influence(i: int, j: int) -> Tensor:
        before, after = dense.streams[i], dense.streams[j]
        cosine = (before * after).sum(-1) / (before.pow(2).sum(-1).sqrt() * after.pow(2).sum(-1).sqrt())
        return 1 - cosine.mean()

    same(found["layers.block_influence"], pairs(influence, range(1, 5)))


def test_norm_ratio_is_the_mean_of_output_over_input(found: dict[str, Tensor], dense: Dense) -> None:
    norms = [stream.pow(2).sum(-1).sqrt() for stream in dense.streams]
    same(found["layers.norm_ratio"], pairs(lambda i, j: (norms[j] / norms[i]).mean(), range(1, 5)))


def test_drops_are_what_a_model_without_the_layers_does(
    found: dict[str, Tensor], model: PreTrainedModel, rows: Tensor, dense: Dense
) -> None:
    def logits(kept: Collection[int]) -> Tensor:
        seen = dense_llama(model, rows.long(), kept)
        return seen.norms[-1] @ model.get_output_embeddings().weight.double().T

    def loss(values: Tensor) -> Tensor:
        likely = values[:, :-1].log_softmax(-1).gather(-1, rows.long()[:, 1:, None])
        return -likely.mean()

    whole = logits(range(4))
    without = {
        (i, j): logits([k for k in range(4) if not i <= k < j]) for i in range(4) for j in range(i + 1, 5)
    }
    rises = pairs(lambda i, j: loss(without[i, j]) - loss(whole), (1, 2, 3))
    torch.testing.assert_close(
        found["layers.perplexity"].double(), rises, rtol=1e-3, atol=1e-5, equal_nan=True
    )
    same(found["layers.logit_mse"], pairs(lambda i, j: (without[i, j] - whole).pow(2).mean(), (1, 2, 3)))


@pytest.mark.parametrize("aggregation", Aggregation)
def test_widths_are_aggregated_over_rows_and_tokens(
    found: dict[str, Tensor], dense: Dense, aggregation: Aggregation
) -> None:
    same(found[f"hidden.{aggregation}"], aggregated(torch.stack(dense.norms))[aggregation].sum(0))
    same(found[f"ffn.{aggregation}"], aggregated(torch.stack(dense.products))[aggregation])
    heads_LNTGqh = torch.stack(dense.heads).unflatten(3, (2, 2))
    groups = heads_LNTGqh.pow(2).sum((-1, -2)).sqrt()
    same(found[f"kv_groups.{aggregation}"], aggregated(groups)[aggregation])
    heads = heads_LNTGqh.pow(2).sum(-1).sqrt().flatten(-2)
    same(found[f"heads_per_group.{aggregation}"], aggregated(heads)[aggregation].unflatten(-1, (2, 2)))


def test_agreement_is_that_of_even_and_odd_rows(model: PreTrainedModel, rows: Tensor) -> None:
    """Batches of three begin at even and at odd rows."""
    measured = calibrate(model, rows, batch=3)
    even, odd = calibrate(model, rows[::2]).statistics, calibrate(model, rows[1::2]).statistics
    assert measured.agreement.keys() == {
        f"{axis}.{aggregation}"
        for axis in ("hidden", "ffn", "kv_groups", "heads_per_group")
        for aggregation in Aggregation
    }
    for name, share in measured.agreement.items():
        assert share == pytest.approx(agreement(even[name], odd[name]), abs=0.01)
        assert 0.25 <= share <= 1
