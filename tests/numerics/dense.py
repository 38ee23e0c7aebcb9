"""A Llama from its formulas in float64, with all that it computes on the way: written without cascade.

Legend: N rows, T tokens, L layers, D hidden, F FFN size, H query heads, h head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel


@dataclass
class Dense:
    """All activations: streams [L+1][N,T,D], between attention and FFN [L][N,T,D], norms' outputs
    [2L+1][N,T,D], products [L][N,T,F], heads [L][N,T,H,h]."""

    streams: list[Tensor] = field(default_factory=list)
    between: list[Tensor] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)
    products: list[Tensor] = field(default_factory=list)
    heads: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Llama:
    """weights: by their names in transformers, float64. width: over how many channels norms take the mean."""

    weights: dict[str, Tensor]
    layers: int
    head_size: int
    epsilon: float
    theta: float
    width: int

    def of_layer(self, layer: int) -> dict[str, Tensor]:
        """One layer's weights by their names within it."""
        prefix = f"model.layers.{layer}."
        return {name.removeprefix(prefix): w for name, w in self.weights.items() if name.startswith(prefix)}

    def norm(self, x: Tensor, gain: Tensor) -> Tensor:
        """RMSNorm (1910.07467, equation 4)."""
        return gain * x / (x.pow(2).sum(-1, keepdim=True) / self.width + self.epsilon).sqrt()

    def run(self, rows: Tensor, kept: Collection[int] | None = None) -> Dense:
        """All rows at once through the layers of `kept`, or all."""
        seen, causal = Dense(), torch.full((rows.shape[1],) * 2, -torch.inf, dtype=torch.float64).triu(1)
        x = self.weights["model.embed_tokens.weight"][rows.long()]
        for layer in range(self.layers) if kept is None else kept:
            w = self.of_layer(layer)
            seen.streams.append(x)
            seen.norms.append(self.norm(x, w["input_layernorm.weight"]))
            q, k, v = (
                (seen.norms[-1] @ w[f"self_attn.{name}_proj.weight"].T).unflatten(-1, (-1, self.head_size))
                for name in "qkv"
            )
            repeats = q.shape[2] // k.shape[2]
            k = rotate(k, self.theta).repeat_interleave(repeats, dim=2)
            v = v.repeat_interleave(repeats, dim=2)
            scores = torch.einsum("nthc,nshc->nhts", rotate(q, self.theta), k) / self.head_size**0.5 + causal
            seen.heads.append(torch.einsum("nhts,nshc->nthc", scores.softmax(-1), v))
            x = x + seen.heads[-1].flatten(2) @ w["self_attn.o_proj.weight"].T
            seen.between.append(x)
            seen.norms.append(self.norm(x, w["post_attention_layernorm.weight"]))
            gate, up = (seen.norms[-1] @ w[f"mlp.{name}_proj.weight"].T for name in ("gate", "up"))
            seen.products.append(gate * gate.sigmoid() * up)
            x = x + seen.products[-1] @ w["mlp.down_proj.weight"].T
        seen.streams.append(x)
        seen.norms.append(self.norm(x, self.weights["model.norm.weight"]))
        return seen

    def logits(self, rows: Tensor, kept: Collection[int] | None = None) -> Tensor:
        """[N, T, V]."""
        return self.run(rows, kept).norms[-1] @ self.weights["lm_head.weight"].T

    def loss(self, rows: Tensor, kept: Collection[int] | None = None) -> Tensor:
        """Mean cross-entropy of the tokens after the first of every row, in nats."""
        likely = self.logits(rows[:, :-1], kept).log_softmax(-1).gather(-1, rows.long()[:, 1:, None])
        return -likely.mean()


def llama_of(model: PreTrainedModel) -> Llama:
    """What `model` is to compute; of a tied one the head is the embeddings."""
    config, weights = model.config, {name: w.double() for name, w in model.state_dict().items()}
    weights["lm_head.weight"] = model.get_output_embeddings().weight.detach().double()
    theta = config.rope_parameters["rope_theta"]
    sizes = (config.num_hidden_layers, config.head_dim, config.rms_norm_eps, theta, config.hidden_size)
    return Llama(weights, *sizes)


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
