"""Running sums over calibration tokens, from which every aggregation of a unit's values follows.

Legend: P places (layers or norms), B rows in a batch, T tokens a row, X units.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cascade.importance.method import Aggregation
from cascade.planning.axes import Axis

HALVES = (0, 1)
SAME_NAMES: Mapping[Aggregation, str] = {aggregation: aggregation.value for aggregation in Aggregation}


class Tally:
    """Sums of |x| and x^2 over all tokens, and of (sum of |x| over a row)^2 over rows.

    Even and odd rows are summed apart, so that the two halves can be compared. Within a batch the sums are
    float32, one for each row; over batches they are float64. shape: of one place's units. pooled: places are
    added up to one score. names: which aggregations make a statistic, and its name behind the axis.
    """

    def __init__(
        self,
        axis: Axis,
        places: int,
        shape: tuple[int, ...],
        device: torch.device,
        *,
        pooled: bool = False,
        names: Mapping[Aggregation, str] = SAME_NAMES,
    ) -> None:
        self.axis, self.shape, self.pooled, self.names = axis, shape, pooled, names
        self.places, self.units, self.device = places, math.prod(shape), device
        self.sums = torch.zeros(3, len(HALVES), places, self.units, dtype=torch.float64, device=device)
        self.rows = [0, 0]
        self.first = 0
        self.scratch = torch.empty(0)

    def begin(self, first: int, rows: int) -> None:
        """A batch of `rows` rows follows, the first of which is number `first` of all."""
        self.first = first
        self.magnitudes_PBX = torch.zeros(self.places, rows, self.units, device=self.device)
        self.squares_PBX = torch.zeros_like(self.magnitudes_PBX)

    def add(self, place: int, values: Tensor) -> None:
        """Values [.., X] of every token of the batch, row by row; some classes flatten rows and tokens."""
        values_BTX = values.reshape(self.magnitudes_PBX.shape[1], -1, self.units)
        # Writing to one buffer is several times faster on a CPU than new memory for every layer's |x|.
        if self.scratch.shape != values_BTX.shape or self.scratch.device != values.device:
            self.scratch = torch.empty(values_BTX.shape, device=values.device)
        self.scratch.copy_(values_BTX).abs_()
        self.magnitudes_PBX[place] += self.scratch.sum(1)
        self.squares_PBX[place] += self.scratch.square_().sum(1)

    def add_part(self, place: int, part: int, values_NX: Tensor) -> None:
        """Values [N, X] of some tokens of the one row in this batch, for the units [part, :] of `shape`."""
        own = slice(part * values_NX.shape[-1], (part + 1) * values_NX.shape[-1])
        magnitudes_NX = values_NX.float().abs()
        self.magnitudes_PBX[place, 0, own] += magnitudes_NX.sum(0)
        self.squares_PBX[place, 0, own] += magnitudes_NX.square_().sum(0)

    def end(self) -> None:
        """The batch is complete."""
        for half in HALVES:
            own = slice((half - self.first) % 2, None, 2)
            magnitudes_PBX = self.magnitudes_PBX[:, own].double()
            self.rows[half] += magnitudes_PBX.shape[1]
            self.sums[0, half] += magnitudes_PBX.sum(1)
            self.sums[1, half] += self.squares_PBX[:, own].double().sum(1)
            self.sums[2, half] += magnitudes_PBX.square().sum(1)

    def statistics(self, length: int, halves: Sequence[int] = HALVES) -> dict[str, Tensor]:
        """By "axis.name", float64; length: T, the tokens of a row; halves: which of the rows count."""
        magnitudes_PX, squares_PX, rows_PX = self.sums[:, list(halves)].sum(1)
        tokens = length * sum(self.rows[half] for half in halves)
        values = {
            Aggregation.RMS: (squares_PX / tokens).sqrt(),
            Aggregation.MEAN: magnitudes_PX / tokens,
            Aggregation.L2_MEAN: rows_PX.sqrt() / length,
        }
        return {f"{self.axis}.{name}": self._shaped(values[kind]) for kind, name in self.names.items()}

    def reached(self) -> Tensor | None:
        """Which sets of units that are compared were measured at all, [...]; None for all of them."""
        return None

    def _shaped(self, values_PX: Tensor) -> Tensor:
        return values_PX.sum(0) if self.pooled else values_PX.reshape(-1, *self.shape)
