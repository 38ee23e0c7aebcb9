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


# Fitted to single cuts of SmolLM2-135M-Instruct with the default scores and repair (2026-11-23; fp32;
# WikiText-2 validation, 32,768 tokens to score and fit, 4,088 targets to measure, kept apart). Rise of the
# held-out cross-entropy in nats right after pruning, parent 3.425:
#   FFN 1280: 0.141  1024: 0.342  768: 0.618  512: 1.083  384: 1.395
#   layers 28: 0.311  26: 0.576  23: 1.055  20: 2.148       hidden 558: 0.143  504: 0.942
#   KV groups 2: 0.205  1: 1.364                            heads per group 2: 0.192  1: 0.835
# and of cuts on several axes, measured and in brackets as priced here:
#   FFN 1280, 2 groups: 0.344 (0.35)     FFN 768, 2 groups, 27 layers: 1.127 (1.27)
#   FFN 1152, 28 layers: 0.552 (0.52)    FFN 896, 23 layers: 1.406 (1.62)
#   FFN 640, 2 groups: 0.987 (1.03)      FFN 832, hidden 504: 1.364 (1.50)
#   2 heads in each of 2 groups: 0.857 (0.40): little is left when both axes of attention are cut.
# Doubt: one parent, one text, no error bars, no training after the cut; rankings can flip once a child is
# distilled.
FITTED = {
    Axis.FFN: Price(0.96, 1.12),
    Axis.LAYERS: Price(4.6, 1.05),
    Axis.KV_GROUPS: Price(1.14, 1.9),
    Axis.HIDDEN: Price(13.2, 1.31),
    # With the price of KV groups beside them they do not add up; hence not among the default axes.
    Axis.HEADS_PER_GROUP: Price(0.73, 1.47),
    # Not measured, and therefore not among the default axes: that of the FFN.
    Axis.EXPERTS: Price(0.96, 1.12),
}
# The same without a fit, for recipes that leave it out, as both presets do: from 30 cuts of the same parent
# (2026-11-22; 4096 tokens to score and 2048 to measure, parent 3.197; relative error 11 %):
#   FFN 1280: 3.386  1024: 3.713  768: 4.327  512: 5.436    KV groups 2: 3.930  1: 6.599
#   layers 28: 3.451  26: 3.743  24: 4.167  21: 4.468       hidden 558: 3.367  504: 4.036  432: 5.120
# The exponents are close to the best fit's, picked so that the cheapest shape lay near the best measured.
PLAIN = {
    Axis.FFN: Price(1.82, 1.4),
    Axis.LAYERS: Price(5.15, 1.2),
    Axis.KV_GROUPS: Price(2.53, 1.4),
    Axis.HIDDEN: Price(6.0, 1.0),
    # Not measured: those of the KV groups and of the FFN.
    Axis.HEADS_PER_GROUP: Price(2.53, 1.4),
    Axis.EXPERTS: Price(1.82, 1.4),
}


def cost_of_cuts(original: Architecture, child: Architecture, *, fitted: bool = True) -> float:
    """Expected rise of the held-out cross-entropy in nats right after cutting `original` down to `child`.

    The sum over the axes of their `Price`: it is taken from the original, however many cuts led to the child.
    fitted: whether least squares repair the cut.
    """
    return sum(
        price.weight * math.log(axis.size(original) / axis.size(child)) ** price.exponent
        for axis, price in (FITTED if fitted else PLAIN).items()
        if axis.size(child) < axis.size(original)
    )
