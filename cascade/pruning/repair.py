"""The closed-form repairs of a cut."""

from __future__ import annotations

from enum import StrEnum

from cascade.architecture import Sizes
from cascade.planning.axes import Axis


class Repair(StrEnum):
    """LEAST_SQUARES: the projections that read what was cut are fitted anew to the calibration data
    (`cascade.pruning.compensation`). FOLD_HEADS: what pruned query heads differ by goes into kept ones
    (`cascade.pruning.folding`).
    """

    NONE = "none"
    LEAST_SQUARES = "least_squares"
    FOLD_HEADS = "fold_heads"


def can_fit(source: Sizes, target: Sizes) -> bool:
    """Whether the cut takes neurons or heads, whose readers least squares may fit anew."""
    read = [Axis.KV_GROUPS, Axis.HEADS_PER_GROUP]
    if not source.experts:
        # Experts have no module that could be read.
        read.append(Axis.FFN)
    return any(axis.size(target) < axis.size(source) for axis in read)
