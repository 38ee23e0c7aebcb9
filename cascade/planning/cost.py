"""What a cut is expected to cost, from a measurement: this ranks the shapes that meet a budget."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cascade.architecture import Architecture
from cascade.planning.axes import Axis


@dataclass(frozen=True)
class Price:
    """Keeping the share s of an axis raises the cross-entropy by weight * ln(1/s) ** exponent nats."""

    weight: float
    exponent: float


# Fitted to cuts of SmolLM2-135M-Instruct (2026-11-23; fp32; default scores and the default repair by least
# squares; scored on 6144, fitted on 4096 and measured on 2048 tokens of WikiText-2 validation, packed to 256,
# kept apart). Rise of the held-out cross-entropy in nats right after pruning, parent 3.618:
#   FFN 1024: 0.599  768: 0.898  512: 1.274  256: 2.582 (not fitted)   768 without the repair: 1.119
#   KV groups 2: 0.293  1: 1.844   2 without the repair: 0.437
#   layers 28: 0.264  26: 0.484  23: 0.925   hidden 504: 0.839
#   FFN 1024 and 2 groups: 0.826   FFN 640 and 2 groups: 1.240   FFN 1024 and 27 layers: 0.958
# Together cuts cost somewhat less than the sum of their prices (those three: 0.89, 1.36, 1.03).
# Doubt: one parent, one text, 2048 tokens without error bars, no training after the cut; rankings can flip
# once a child is distilled, which is what a race of candidates is for.
PRICES = {
    Axis.FFN: Price(1.18, 0.75),
    Axis.LAYERS: Price(3.17, 0.93),
    Axis.KV_GROUPS: Price(1.55, 1.84),
    Axis.HIDDEN: Price(6.28, 1.0),
    # Not measured, and therefore not among the default axes: those of the KV groups and of the FFN.
    Axis.HEADS_PER_GROUP: Price(1.55, 1.84),
    Axis.EXPERTS: Price(1.18, 0.75),
}


def cost_of_cuts(original: Architecture, child: Architecture) -> float:
    """Expected rise of the held-out cross-entropy in nats right after cutting `original` down to `child`.

    The sum over the axes of their `Price`: it is taken from the original, however many cuts led to the child.
    """
    return sum(
        price.weight * math.log(axis.size(original) / axis.size(child)) ** price.exponent
        for axis, price in PRICES.items()
        if axis.size(child) < axis.size(original)
    )
