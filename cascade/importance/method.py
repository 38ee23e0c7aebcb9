"""The ways to score what an axis could lose."""

from __future__ import annotations

from enum import StrEnum


class Method(StrEnum):
    """ACTIVATION: what units put out over calibration tokens. TAYLOR: what the loss would change by, to first
    order, if they went. MAGNITUDE: the size of their weights. RANDOM: the control.
    """

    ACTIVATION = "activation"
    TAYLOR = "taylor"
    MAGNITUDE = "magnitude"
    RANDOM = "random"
