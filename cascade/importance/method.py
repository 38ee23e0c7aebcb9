"""The ways to score what an axis could lose, and which of the measured statistics decide."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Method(StrEnum):
    """ACTIVATION: what units put out over calibration tokens. TAYLOR: what the loss would change by, to first
    order, if they went. MAGNITUDE: the size of their weights. RANDOM: the control.
    """

    ACTIVATION = "activation"
    TAYLOR = "taylor"
    MAGNITUDE = "magnitude"
    RANDOM = "random"


class LayerScore(StrEnum):
    """How much layers i..j-1 matter; x_i is the residual stream before layer i. Larger means keep.

    BLOCK_INFLUENCE: 1 - E cos(x_i, x_j) (ShortGPT, 2403.03853, equation 1). NORM_RATIO: E[|x_j| / |x_i|],
    layer output over input (Ministral 3, 2601.08584, Algorithm 2). The others drop the layers and run the
    rest. PERPLEXITY: the rise of the mean cross-entropy in nats (Minitron, 2407.14679, section 2.2).
    LOGIT_MSE: the mean squared difference of the logits (Nemotron Nano 2, 2508.14444).
    """

    BLOCK_INFLUENCE = "block_influence"
    NORM_RATIO = "norm_ratio"
    PERPLEXITY = "perplexity"
    LOGIT_MSE = "logit_mse"

    @property
    def drops(self) -> bool:
        """Whether it has to be asked for, because layers are really dropped."""
        return self in (LayerScore.PERPLEXITY, LayerScore.LOGIT_MSE)


class Aggregation(StrEnum):
    """From a unit's values x over calibration tokens to one number.

    RMS: root mean square over all tokens. MEAN: mean |x|; of the FFN's product this is the score of Ministral
    3 (2601.08584, Algorithm 2). L2_MEAN: mean |x| over each row, then the L2 norm over rows, Minitron's best
    (2407.14679, section 2.2: "batch=L2, seq=mean") in the order of NVIDIA's own implementation.
    """

    RMS = "rms"
    MEAN = "mean"
    L2_MEAN = "l2_mean"


@dataclass(frozen=True)
class Scoring:
    """Which of the measured statistics decide.

    contiguous: layers go as one block, the one that matters least as a whole (Gromov et al., 2403.17887),
    rather than each by its own score.
    """

    layers: LayerScore = LayerScore.BLOCK_INFLUENCE
    contiguous: bool = False
    aggregation: Aggregation = Aggregation.RMS

    def drops(self, dropped: int) -> tuple[int, ...]:
        """What to ask `calibrate` for, so that a target with `dropped` layers less can be decided."""
        if dropped == 0 or not self.layers.drops:
            return ()
        return (dropped if self.contiguous else 1,)
