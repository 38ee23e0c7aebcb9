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


# Fitted to 30 cuts of SmolLM2-135M-Instruct (2026-11-22; fp32; scored on 4096 and measured on 2048 tokens of
# WikiText-2 validation, packed to 256, kept apart; default scores; relative error 11 %). Held-out
# cross-entropy in nats right after pruning, parent 3.197:
#   layers 28: 3.451  26: 3.743  24: 4.167  21: 4.468   FFN 1280: 3.386  1024: 3.713  768: 4.327  512: 5.436
#   hidden 558: 3.367  504: 4.036  432: 5.120           KV groups 2: 3.930  1: 6.599
#   the same non-embedding parameters, cut from the FFN first and the rest from N layers:
#     N      30     28     26     24     21     30 with 2 groups
#     0.85   3.466  3.572  3.747                4.041
#     0.70   3.947  3.920  4.020  4.319  4.468  4.304
#     0.55   4.787  4.631  4.552  4.800  4.745  4.653
# The exponents are not those of the best fit (9 %: 1.3, 1.0, 1.4, 1.1) but close ones, picked so that the
# cheapest shape lies near the best measured at all three sizes and trimming a few channels is not free.
# Doubt: one parent, one text, scores and prices chosen on the same 2048 tokens without error bars, no
# training after the cut; rankings can flip once a child is distilled.
PRICES = {
    Axis.FFN: Price(1.82, 1.4),
    Axis.LAYERS: Price(5.15, 1.2),
    Axis.KV_GROUPS: Price(2.53, 1.4),
    Axis.HIDDEN: Price(6.0, 1.0),
    # Not measured, and therefore not among the default axes: those of the KV groups and of the FFN.
    Axis.HEADS_PER_GROUP: Price(2.53, 1.4),
    Axis.EXPERTS: Price(1.82, 1.4),
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
