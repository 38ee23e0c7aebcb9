"""The measurements of a calibration pass: hooks on one kind of activation in, a one-dimensional score out.

Each probe keeps running sums only, in float64 where the activations may be of any type, so its memory
does not depend on how many tokens pass. A token counts as much as any other.

Legend: B batch, T tokens, L layers, D hidden, F FFN size, G KV groups, q query heads a group, h head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cascade.models.decoder import Decoder

Inputs = tuple[Tensor, ...]


class Probe(Protocol):
    """Sums while tokens stream by."""

    def attach(self) -> list[RemovableHandle]:
        """Hook into the model; the caller removes the handles."""

    def scores(self, tokens: int) -> Tensor:
        """The scores after `tokens` tokens; larger means keep."""


class StreamProbe:
    """Block influence of each layer, 1 - E[cos(x_in, x_out)] (ShortGPT, 2403.03853, equation 1): scores [L].

    The residual stream is read where each norm reads it: before layer 0, between layers, and at the end.
    Measured on SmolLM2-135M as in `cascade.planning.cost`, against the norm ratio E[|x_out| / |x_in|] of
    Ministral 3 (2601.08584), nats right after dropping 2, 4, 6, 9, 13 of 30 layers at once:
    influence 3.451 3.743 4.167 4.468 6.673, ratio 3.696 4.048 4.392 5.066 5.638.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.norms = [layer.input_norm for layer in decoder.layers] + [decoder.final_norm]
        device = decoder.model.device
        self.cosines = torch.zeros(len(decoder.layers), dtype=torch.float64, device=device)
        self.finite = torch.ones(len(self.norms), dtype=torch.bool, device=device)
        self.before_BTD = torch.empty(0)
        self.before_norm_BT = torch.empty(0)

    def attach(self) -> list[RemovableHandle]:
        """One hook a place in the stream."""
        return [norm.register_forward_pre_hook(self._hook(place)) for place, norm in enumerate(self.norms)]

    def _hook(self, place: int) -> Callable[[nn.Module, Inputs], None]:
        def read(module: nn.Module, inputs: Inputs) -> None:
            stream_BTD = inputs[0].float()
            norm_BT = torch.linalg.vector_norm(stream_BTD, dim=-1)
            self.finite[place] &= norm_BT.isfinite().all()
            if place > 0:
                dot_BT = torch.einsum("btd,btd->bt", self.before_BTD, stream_BTD)
                # A token whose stream is all zero has no direction; it must not turn the sum into NaN.
                size_BT = (self.before_norm_BT * norm_BT).clamp_min(torch.finfo(torch.float32).tiny)
                self.cosines[place - 1] += (dot_BT / size_BT).sum()
            self.before_BTD, self.before_norm_BT = stream_BTD, norm_BT

        return read

    def first_broken(self) -> int | None:
        """The first place that was not finite: 0 the embeddings, i the output of layer i - 1."""
        broken = (~self.finite).nonzero()
        return int(broken[0]) if len(broken) else None

    def scores(self, tokens: int) -> Tensor:
        """1 - mean cosine, [L]."""
        return 1 - self.cosines / tokens


class HiddenProbe:
    """Root mean square of each hidden channel over the norms' outputs, summed over all norms: scores [D].

    Minitron (2407.14679, section 2.2) takes L2 over the batch and the mean over the sequence, which
    needs sums of [norms, T, D]. Over all tokens at once picks as well (SmolLM2-135M, right after
    pruning to 504 and 432 channels: 4.036 and 5.120 nats against 4.044 and 5.114) in [norms, D].
    """

    def __init__(self, decoder: Decoder) -> None:
        self.norms = [norm for layer in decoder.layers for norm in (layer.input_norm, layer.ffn_norm)]
        self.norms.append(decoder.final_norm)
        shape = (len(self.norms), decoder.embeddings.embedding_dim)
        self.squares = torch.zeros(shape, dtype=torch.float64, device=decoder.model.device)

    def attach(self) -> list[RemovableHandle]:
        """One hook a norm."""
        return [norm.register_forward_hook(self._hook(place)) for place, norm in enumerate(self.norms)]

    def _hook(self, place: int) -> Callable[[nn.Module, Inputs, Tensor], None]:
        def read(module: nn.Module, inputs: Inputs, output_BTD: Tensor) -> None:
            self.squares[place] += sum_of_squares(output_BTD)

        return read

    def scores(self, tokens: int) -> Tensor:
        """Sum over norms of the root mean square, [D]."""
        return (self.squares / tokens).sqrt().sum(dim=0)


class FfnProbe:
    """Root mean square of each neuron's product act(gate) * up, the input of `down`: scores [L, F].

    Measured on SmolLM2-135M as in `cascade.planning.cost`, against the mean |product| of Ministral 3
    (2601.08584), nats right after cutting 1536 neurons to 1280, 1024, 768, 512 at once:
    RMS 3.386 3.713 4.327 5.436, mean 3.431 3.732 4.262 5.198. A stage of a family cuts lightly.
    Weighting by the norm of the neuron's column of `down` did not help (3.745 at 1024).
    """

    def __init__(self, decoder: Decoder) -> None:
        self.downs = [layer.down for layer in decoder.layers]
        shape = (len(self.downs), self.downs[0].in_features)
        self.squares = torch.zeros(shape, dtype=torch.float64, device=decoder.model.device)

    def attach(self) -> list[RemovableHandle]:
        """One hook a layer."""
        return [down.register_forward_pre_hook(self._hook(place)) for place, down in enumerate(self.downs)]

    def _hook(self, place: int) -> Callable[[nn.Module, Inputs], None]:
        def read(module: nn.Module, inputs: Inputs) -> None:
            self.squares[place] += sum_of_squares(inputs[0])

        return read

    def scores(self, tokens: int) -> Tensor:
        """Root mean square, [L, F]."""
        return (self.squares / tokens).sqrt()


class AttentionProbe:
    """Mean L2 norm of what a KV group's query heads put out, before the output projection: scores [L, G].

    Minitron's head score (2407.14679, section 2.2), taken for the heads that share their keys and values.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.projections = [layer.o for layer in decoder.layers]
        self.groups = decoder.architecture.kv_groups
        shape = (len(self.projections), self.groups)
        self.norms = torch.zeros(shape, dtype=torch.float64, device=decoder.model.device)

    def attach(self) -> list[RemovableHandle]:
        """One hook a layer."""
        return [o.register_forward_pre_hook(self._hook(place)) for place, o in enumerate(self.projections)]

    def _hook(self, place: int) -> Callable[[nn.Module, Inputs], None]:
        def read(module: nn.Module, inputs: Inputs) -> None:
            heads_BTGx = inputs[0].unflatten(-1, (self.groups, -1)).float()
            self.norms[place] += torch.linalg.vector_norm(heads_BTGx, dim=-1).sum(dim=(0, 1))

        return read

    def scores(self, tokens: int) -> Tensor:
        """Mean over tokens, [L, G]."""
        return self.norms / tokens


def sum_of_squares(values_BTx: Tensor) -> Tensor:
    """Sum of squares over batch and tokens, without a copy of the activations: [x], float32."""
    return torch.linalg.vector_norm(values_BTx, dim=(0, 1), dtype=torch.float32).square()
