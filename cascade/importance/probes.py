"""The width measurements of a calibration pass: hooks on one kind of activation that feed tallies.

Legend: L layers, D hidden, F FFN size, G KV groups, q query heads a group, h head size, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cascade.importance.method import Aggregation
from cascade.importance.tallies import Tally
from cascade.models.decoder import Decoder
from cascade.planning.axes import Axis

Inputs = tuple[Tensor, ...]
Tallies = tuple[Tally, ...]


class Probe(Protocol):
    """Feeds its tallies while tokens stream by."""

    tallies: Tallies

    def attach(self) -> Sequence[AbstractContextManager[object]]:
        """What the caller enters, and leaves to have the model as it was; hooks' handles for one."""


class HiddenProbe:
    """Each hidden channel over the norms' outputs, summed over all norms: [D].

    Minitron's (2407.14679, section 2.2). Measured on SmolLM2-135M, nats right after pruning 576 channels to
    504 and 432: RMS 4.036 and 5.120, the mean over the sequence and L2 over the batch 4.044 and 5.114.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.norms = [norm for norm, _ in decoder.hidden_norms]
        shape, device = (decoder.architecture.hidden,), decoder.model.device
        self.tally = Tally(Axis.HIDDEN, len(self.norms), shape, device, pooled=True)
        self.tallies: Tallies = (self.tally,)

    def attach(self) -> list[RemovableHandle]:
        """One hook a norm."""
        return [norm.register_forward_hook(self._hook(place)) for place, norm in enumerate(self.norms)]

    def _hook(self, place: int) -> Callable[[nn.Module, Inputs, Tensor], None]:
        def read(module: nn.Module, inputs: Inputs, output_BTD: Tensor) -> None:
            self.tally.add(place, output_BTD)

        return read


class FfnProbe:
    """Each neuron's product act(gate) * up, the input of `down`: [L, F].

    Measured on SmolLM2-135M as in `cascade.planning.cost`, nats right after cutting 1536 neurons to 1280,
    1024, 768, 512 at once: RMS 3.386 3.713 4.327 5.436, mean 3.431 3.732 4.262 5.198. A stage of a family
    cuts lightly. Weighting by the norm of the neuron's column of `down` did not help (3.745 at 1024).
    """

    def __init__(self, decoder: Decoder) -> None:
        self.readers = decoder.ffn_readers
        shape, device = (decoder.architecture.ffn,), decoder.model.device
        self.tally = Tally(Axis.FFN, len(self.readers), shape, device)
        self.tallies: Tallies = (self.tally,)

    def attach(self) -> list[RemovableHandle]:
        """One hook a layer."""
        return [reader.register_forward_pre_hook(self._hook(at)) for at, reader in enumerate(self.readers)]

    def _hook(self, place: int) -> Callable[[nn.Module, Inputs], None]:
        def read(module: nn.Module, inputs: Inputs) -> None:
            self.tally.add(place, inputs[0])

        return read


class AttentionProbe:
    """The L2 norm of what query heads put out, before the output projection.

    Per KV group over all its heads [L, G], and per head [L, G, q]. Minitron's head score (2407.14679,
    section 2.2), taken for the heads that share their keys and values.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.projections, sizes = decoder.attention_readers, decoder.architecture
        self.heads = (sizes.kv_groups, sizes.heads_per_group, sizes.head_size)
        places, device = len(self.projections), decoder.model.device
        self.group_tally = Tally(Axis.KV_GROUPS, places, self.heads[:1], device)
        self.head_tally = Tally(Axis.HEADS_PER_GROUP, places, self.heads[:2], device)
        self.tallies: Tallies = (self.group_tally, self.head_tally)

    def attach(self) -> list[RemovableHandle]:
        """One hook a layer."""
        return [o.register_forward_pre_hook(self._hook(place)) for place, o in enumerate(self.projections)]

    def _hook(self, place: int) -> Callable[[nn.Module, Inputs], None]:
        def read(module: nn.Module, inputs: Inputs) -> None:
            heads_NGqh = inputs[0].reshape(-1, *self.heads)
            norms_NGq = torch.linalg.vector_norm(heads_NGqh, dim=-1, dtype=torch.float32)
            self.head_tally.add(place, norms_NGq)
            self.group_tally.add(place, torch.linalg.vector_norm(norms_NGq, dim=-1))

        return read


class RouterProbe:
    """The mean softmax of the router's logits: [L, E].

    The softmax is over all experts, before the active ones are chosen. Not compared with another score.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.routers = [layer.get_submodule(decoder.anatomy.router) for layer in decoder.layers]
        shape, names = (decoder.architecture.experts,), {Aggregation.MEAN: "probability"}
        self.tally = Tally(Axis.EXPERTS, len(self.routers), shape, decoder.model.device, names=names)
        self.tallies: Tallies = (self.tally,)

    def attach(self) -> list[RemovableHandle]:
        """One hook a router."""
        return [
            router.register_forward_pre_hook(self._hook(place), with_kwargs=True)
            for place, router in enumerate(self.routers)
        ]

    def _hook(self, place: int) -> Callable[[nn.Module, Inputs, dict[str, Any]], None]:
        def read(module: nn.Module, inputs: Inputs, keywords: dict[str, Any]) -> None:
            states = inputs[0] if inputs else next(iter(keywords.values()))
            bias = getattr(module, "bias", None)
            logits = nn.functional.linear(states, module.get_parameter("weight"), bias).float()
            self.tally.add(place, logits.softmax(-1))

        return read
