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
from cascade.models.entries import Entries
from cascade.planning.axes import Axis

Inputs = tuple[Tensor, ...]
Scores = dict[Axis, Tensor]


class Probe(Protocol):
    """Sums while tokens stream by."""

    def attach(self) -> list[RemovableHandle]:
        """Hook into the model; the caller removes the handles."""

    def scores(self, tokens: int) -> Scores:
        """The scores after `tokens` tokens; larger means keep."""


class StreamProbe:
    """Block influence of each layer, 1 - E[cos(x_in, x_out)] (ShortGPT, 2403.03853, equation 1): scores [L].

    The residual stream is read before layer 0, between layers, and after the last.
    Measured on SmolLM2-135M as in `cascade.planning.cost`, against the norm ratio E[|x_out| / |x_in|] of
    Ministral 3 (2601.08584), nats right after dropping 2, 4, 6, 9, 13 of 30 layers at once:
    influence 3.451 3.743 4.167 4.468 6.673, ratio 3.696 4.048 4.392 5.066 5.638.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.layers = decoder.layers
        device = decoder.model.device
        self.cosines = torch.zeros(len(self.layers), dtype=torch.float64, device=device)
        self.finite = torch.ones(len(self.layers) + 1, dtype=torch.bool, device=device)
        self.before_BTD = torch.empty(0)
        self.before_norm_BT = torch.empty(0)

    def attach(self) -> list[RemovableHandle]:
        """One hook a place in the stream."""
        handles = [
            layer.register_forward_pre_hook(self._before(place), with_kwargs=True)
            for place, layer in enumerate(self.layers)
        ]
        return [*handles, self.layers[-1].register_forward_hook(self._after)]

    def _before(self, place: int) -> Callable[[nn.Module, Inputs, dict[str, Tensor]], None]:
        def read(module: nn.Module, inputs: Inputs, keywords: dict[str, Tensor]) -> None:
            self._read(place, inputs[0] if inputs else keywords["hidden_states"])

        return read

    def _after(self, module: nn.Module, inputs: Inputs, output: Tensor | tuple[Tensor, ...]) -> None:
        self._read(len(self.layers), output[0] if isinstance(output, tuple) else output)

    def _read(self, place: int, values_BTD: Tensor) -> None:
        stream_BTD = values_BTD.float()
        norm_BT = torch.linalg.vector_norm(stream_BTD, dim=-1)
        self.finite[place] &= norm_BT.isfinite().all()
        if place > 0:
            dot_BT = torch.einsum("btd,btd->bt", self.before_BTD, stream_BTD)
            # A token whose stream is all zero has no direction; it must not turn the sum into NaN.
            size_BT = (self.before_norm_BT * norm_BT).clamp_min(torch.finfo(torch.float32).tiny)
            self.cosines[place - 1] += (dot_BT / size_BT).sum()
        self.before_BTD, self.before_norm_BT = stream_BTD, norm_BT

    def first_broken(self) -> int | None:
        """The first place that was not finite: 0 the embeddings, i the output of layer i - 1."""
        broken = (~self.finite).nonzero()
        return int(broken[0]) if len(broken) else None

    def scores(self, tokens: int) -> Scores:
        """1 - mean cosine, [L]."""
        return {Axis.LAYERS: 1 - self.cosines / tokens}


class HiddenProbe:
    """Root mean square of each hidden channel over the norms' outputs, summed over all norms: scores [D].

    Minitron (2407.14679, section 2.2) takes L2 over the batch and the mean over the sequence, which
    needs sums of [norms, T, D]. Over all tokens at once picks as well (SmolLM2-135M, right after
    pruning to 504 and 432 channels: 4.036 and 5.120 nats against 4.044 and 5.114) in [norms, D].
    """

    def __init__(self, decoder: Decoder) -> None:
        self.norms = [norm for norm, _ in decoder.hidden_norms]
        shape = (len(self.norms), decoder.architecture.hidden)
        self.squares = torch.zeros(shape, dtype=torch.float64, device=decoder.model.device)

    def attach(self) -> list[RemovableHandle]:
        """One hook a norm."""
        return [norm.register_forward_hook(self._hook(place)) for place, norm in enumerate(self.norms)]

    def _hook(self, place: int) -> Callable[[nn.Module, Inputs, Tensor], None]:
        def read(module: nn.Module, inputs: Inputs, output_BTD: Tensor) -> None:
            self.squares[place] += sum_of_squares(output_BTD)

        return read

    def scores(self, tokens: int) -> Scores:
        """Sum over norms of the root mean square, [D]."""
        return {Axis.HIDDEN: (self.squares / tokens).sqrt().sum(dim=0)}


class FfnProbe:
    """Root mean square of each neuron's product act(gate) * up, the input of `down`: scores [L, F].

    Measured on SmolLM2-135M as in `cascade.planning.cost`, against the mean |product| of Ministral 3
    (2601.08584), nats right after cutting 1536 neurons to 1280, 1024, 768, 512 at once:
    RMS 3.386 3.713 4.327 5.436, mean 3.431 3.732 4.262 5.198. A stage of a family cuts lightly.
    Weighting by the norm of the neuron's column of `down` did not help (3.745 at 1024).
    """

    def __init__(self, decoder: Decoder) -> None:
        self.readers = decoder.ffn_readers
        shape = (len(self.readers), decoder.architecture.ffn)
        self.squares = torch.zeros(shape, dtype=torch.float64, device=decoder.model.device)

    def attach(self) -> list[RemovableHandle]:
        """One hook a layer."""
        return [reader.register_forward_pre_hook(self._hook(at)) for at, reader in enumerate(self.readers)]

    def _hook(self, place: int) -> Callable[[nn.Module, Inputs], None]:
        def read(module: nn.Module, inputs: Inputs) -> None:
            self.squares[place] += sum_of_squares(inputs[0])

        return read

    def scores(self, tokens: int) -> Scores:
        """Root mean square, [L, F]."""
        return {Axis.FFN: (self.squares / tokens).sqrt()}


class ExpertProbe:
    """Of a mixture of experts: the mean softmax of the router's logits [L, E], and for neurons [L, E, F] the
    L2 norm of their row of the down projection.

    The softmax is over all experts, before the active ones are chosen. Tokens are not followed into the
    experts, whose implementations in transformers have no modules to hook; the neurons' score is therefore
    one of weights alone. Neither was compared with another score.
    """

    def __init__(self, decoder: Decoder) -> None:
        anatomy, self.layers = decoder.anatomy, decoder.layers
        self.routers = [layer.get_submodule(anatomy.router) for layer in self.layers]
        shape = (len(self.layers), decoder.architecture.experts)
        self.probabilities = torch.zeros(shape, dtype=torch.float64, device=decoder.model.device)
        self.down = anatomy.experts_down
        self.hidden_dimension = anatomy.layer[self.down].index(Entries.HIDDEN)

    def attach(self) -> list[RemovableHandle]:
        """One hook a router."""
        return [
            router.register_forward_pre_hook(self._hook(place), with_kwargs=True)
            for place, router in enumerate(self.routers)
        ]

    def _hook(self, place: int) -> Callable[[nn.Module, Inputs, dict[str, Tensor]], None]:
        def read(module: nn.Module, inputs: Inputs, keywords: dict[str, Tensor]) -> None:
            states = inputs[0] if inputs else next(iter(keywords.values()))
            bias = getattr(module, "bias", None)
            logits = nn.functional.linear(states, module.get_parameter("weight"), bias).float()
            self.probabilities[place] += logits.softmax(-1).flatten(0, -2).sum(0)

        return read

    def scores(self, tokens: int) -> Scores:
        """Mean probability [L, E] and norms of rows [L, E, F]."""
        downs = [layer.get_parameter(self.down).detach() for layer in self.layers]
        norms = [torch.linalg.vector_norm(d, dim=self.hidden_dimension, dtype=torch.float32) for d in downs]
        return {Axis.EXPERTS: self.probabilities / tokens, Axis.FFN: torch.stack(norms)}


class AttentionProbe:
    """Mean L2 norm of what query heads put out, before the output projection.

    Per KV group over all its heads [L, G], and per head [L, G, q]. Minitron's head score (2407.14679,
    section 2.2), taken for the heads that share their keys and values.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.projections, sizes = decoder.attention_readers, decoder.architecture
        self.heads = (sizes.kv_groups, sizes.heads_per_group, sizes.head_size)
        shape, device = (len(self.projections), *self.heads[:2]), decoder.model.device
        self.head_norms = torch.zeros(shape, dtype=torch.float64, device=device)
        self.group_norms = torch.zeros(shape[:2], dtype=torch.float64, device=device)

    def attach(self) -> list[RemovableHandle]:
        """One hook a layer."""
        return [o.register_forward_pre_hook(self._hook(place)) for place, o in enumerate(self.projections)]

    def _hook(self, place: int) -> Callable[[nn.Module, Inputs], None]:
        def read(module: nn.Module, inputs: Inputs) -> None:
            heads_NGqh = inputs[0].reshape(-1, *self.heads)
            norms_NGq = torch.linalg.vector_norm(heads_NGqh, dim=-1, dtype=torch.float32)
            self.head_norms[place] += norms_NGq.sum(dim=0)
            self.group_norms[place] += torch.linalg.vector_norm(norms_NGq, dim=-1).sum(dim=0)

        return read

    def scores(self, tokens: int) -> Scores:
        """Means over tokens."""
        return {
            Axis.KV_GROUPS: self.group_norms / tokens,
            Axis.HEADS_PER_GROUP: self.head_norms / tokens,
        }


def sum_of_squares(values: Tensor) -> Tensor:
    """Sum of squares over every dimension but the last, without a copy of the activations: [x], float32.

    Some classes flatten batch and tokens before their FFN.
    """
    return torch.linalg.vector_norm(values.flatten(0, -2), dim=0, dtype=torch.float32).square()
