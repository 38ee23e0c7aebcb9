"""What the neurons of experts put out, seen in the products with their down projections.

Legend: L layers, E experts, F FFN size, n tokens that an expert gets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from cascade.importance.tallies import HALVES, Tally
from cascade.models.decoder import Decoder
from cascade.models.entries import Entries
from cascade.planning.axes import Axis

PRODUCTS = (functional.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__)


class ExpertTally(Tally):
    """Neurons of an expert that no product was seen of are scored by the norm of their weights in `down`."""

    def __init__(self, weights_LEF: Tensor) -> None:
        super().__init__(Axis.FFN, len(weights_LEF), tuple(weights_LEF.shape[1:]), weights_LEF.device)
        self.weights_LEF = weights_LEF.double()

    def statistics(self, length: int, halves: Sequence[int] = HALVES) -> dict[str, Tensor]:
        """As for any axis, [L, E, F]. Only neurons of one expert are ever compared."""
        found = super().statistics(length, halves)
        seen_LE1 = {name: values.any(-1, keepdim=True) for name, values in found.items()}
        return {name: torch.where(seen_LE1[name], found[name], self.weights_LEF) for name in found}

    def reached(self) -> Tensor:
        """Experts that got a token, [L, E]."""
        return self._shaped(self.sums[0].sum(0)).any(-1)


class ExpertFfnProbe(TorchFunctionMode):
    """Each neuron's product act(gate) * up in every expert, 0 for tokens that go elsewhere: [L, E, F].

    Experts have no modules to hook. Run eagerly, transformers takes one expert's matrix out of the stacked
    down projection and multiplies the expert's tokens by it: both calls are recognised by the parameter. A
    batch has to be one row, because an expert gets its tokens without their rows.
    Not compared with another score.
    """

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        name, self.model = decoder.anatomy.experts_down, decoder.model
        downs = [layer.get_parameter(name).detach() for layer in decoder.layers]
        over = decoder.anatomy.layer[name].index(Entries.HIDDEN)
        weights = [torch.linalg.vector_norm(down, dim=over, dtype=torch.float32) for down in downs]
        self.places = {id(layer.get_parameter(name)): place for place, layer in enumerate(decoder.layers)}
        self.tally = ExpertTally(torch.stack(weights))
        self.tallies: tuple[Tally, ...] = (self.tally,)
        self.taken: tuple[Tensor | None, int, int] = (None, 0, 0)

    def attach(self) -> list[AbstractContextManager[object]]:
        """Watches every call of torch, with the experts run one by one."""
        return [eager_experts(self.model), self]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Pass every call on; remember the expert whose matrix was taken, and what it is multiplied with."""
        if func in PRODUCTS and args[1] is self.taken[0]:
            _, place, expert = self.taken
            self.tally.add_part(place, expert, args[0])
        result = func(*args, **(kwargs or {}))
        if func is Tensor.__getitem__ and id(args[0]) in self.places and result.ndim == 2:
            self.taken = (result, self.places[id(args[0])], int(args[1]))
        return result


@contextmanager
def eager_experts(model: PreTrainedModel) -> Iterator[None]:
    """Inside, transformers computes one expert after the other."""
    before = model.config._experts_implementation
    model.config._experts_implementation = "eager"
    try:
        yield
    finally:
        model.config._experts_implementation = before
