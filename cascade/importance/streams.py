"""The residual stream between layers, and what it says about dropping any contiguous block of them.

Legend: B rows in a batch, T tokens, L layers, D hidden; a place is before layer 0, 1, .., or after the last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cascade.importance.method import LayerScore
from cascade.importance.tallies import HALVES
from cascade.models.decoder import Decoder

Inputs = tuple[Tensor, ...]


class Streams:
    """Remembers one batch's stream at every place, and sums over tokens what each pair of places has.

    The memory is (L+1) * B * T * D values of the model's own type, whatever the number of batches. It is a
    copy, because a layer may add to its input in place.

    Measured on SmolLM2-135M as in `cascade.planning.cost`, nats right after dropping 2, 4, 6, 9, 13 of 30
    layers at once: influence 3.451 3.743 4.167 4.468 6.673, norm ratio 3.696 4.048 4.392 5.066 5.638.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.layers, self.device = decoder.layers, decoder.model.device
        places = len(self.layers) + 1
        self.cosines = torch.zeros(len(HALVES), places, places, dtype=torch.float64, device=self.device)
        self.ratios = torch.zeros_like(self.cosines)
        self.finite = torch.ones(places, dtype=torch.bool, device=self.device)
        self.memory = torch.empty(0)
        self.rows = 0
        self.counted = [0, 0]
        """Rows in each half, the even and the odd ones."""
        self.outputs = 0
        """How many outputs a layer has as a tuple, 0 where it is the stream itself."""

    @property
    def states(self) -> Tensor:
        """The streams of the current batch, [L+1, B, T, D]."""
        return self.memory[:, : self.rows]

    def attach(self) -> list[RemovableHandle]:
        """One hook a place in the stream."""
        handles = [
            layer.register_forward_pre_hook(self._before(place), with_kwargs=True)
            for place, layer in enumerate(self.layers)
        ]
        return [*handles, self.layers[-1].register_forward_hook(self._after)]

    def _before(self, place: int) -> Callable[[nn.Module, Inputs, dict[str, Any]], None]:
        def read(module: nn.Module, inputs: Inputs, keywords: dict[str, Any]) -> None:
            self._read(place, inputs[0] if inputs else keywords["hidden_states"])

        return read

    def _after(self, module: nn.Module, inputs: Inputs, output: Tensor | tuple[Tensor, ...]) -> None:
        self.outputs = len(output) if isinstance(output, tuple) else 0
        self._read(len(self.layers), output[0] if isinstance(output, tuple) else output)

    def _read(self, place: int, values_BTD: Tensor) -> None:
        if place == 0:
            self.rows = len(values_BTD)
            if self.memory.ndim != 4 or self.memory.shape[1] < self.rows:
                shape = (len(self.layers) + 1, *values_BTD.shape)
                self.memory = torch.empty(shape, dtype=values_BTD.dtype, device=self.device)
        self.memory[place, : self.rows] = values_BTD

    def end(self, first: int) -> None:
        """Add the batch, whose first row is number `first` of all, to the sums of each row's half: row by row
        in float32, one product of all places with all others."""
        for row in range(self.rows):
            half = (first + row) % len(HALVES)
            self.counted[half] += 1
            states_TLD = self.memory[:, row].float().transpose(0, 1)
            dots_TLL = torch.bmm(states_TLD, states_TLD.mT)
            norms_TL = dots_TLL.diagonal(dim1=1, dim2=2).sqrt()
            self.finite &= norms_TL.isfinite().all(0)
            # A token whose stream is all zero has no direction and no ratio; it must not make NaN of a sum.
            inverse_TL = torch.where(norms_TL > torch.finfo(torch.float32).tiny, 1 / norms_TL, 0.0)
            cosines_TLL = dots_TLL.mul_(inverse_TL[:, :, None]).mul_(inverse_TL[:, None, :])
            self.cosines[half] += cosines_TLL.sum(0)
            self.ratios[half] += inverse_TL.double().T @ norms_TL.double()

    def first_broken(self) -> int | None:
        """The first place that was not finite: 0 the embeddings, i the output of layer i - 1."""
        broken = (~self.finite).nonzero()
        return int(broken[0]) if len(broken) else None

    def statistics(self, length: int) -> dict[str, Tensor]:
        """Matrices [L+1, L+1] whose entry (i, j), i < j, is about dropping layers i..j-1; NaN elsewhere.
        Also by halves, see `with_halves`; length: T, the tokens of a row."""
        cosines = with_halves(LayerScore.BLOCK_INFLUENCE, self.cosines, self.counted, length)
        ratios = with_halves(LayerScore.NORM_RATIO, self.ratios, self.counted, length)
        influences = {name: 1 - mean for name, mean in cosines.items()}
        return {name: blocks_only(matrix) for name, matrix in (influences | ratios).items()}


def layer_key(score: LayerScore) -> str:
    """The name of a layer score's matrix among the statistics."""
    return f"layers.{score}"


def halves_key(score: LayerScore) -> str:
    """The name of a layer score's two matrices, of the even and of the odd rows."""
    return f"{layer_key(score)}.halves"


def with_halves(score: LayerScore, sums: Tensor, rows: Sequence[int], length: int) -> dict[str, Tensor]:
    """Means of sums [2, ...] over the rows of each half, `length` values a row: [...] of all rows, and
    [2, ...] of each half where both have rows."""
    found = {layer_key(score): sums.sum(0) / (sum(rows) * length)}
    if all(rows):
        counts = torch.tensor(rows, dtype=sums.dtype, device=sums.device) * length
        found[halves_key(score)] = sums / counts[:, None, None]
    return found


def blocks_only(pairs: Tensor) -> Tensor:
    """The entries above the diagonal, NaN elsewhere."""
    return torch.where(torch.ones_like(pairs, dtype=torch.bool).triu(1), pairs, torch.nan)
