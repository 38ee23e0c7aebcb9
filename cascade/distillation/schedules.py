"""How the learning rate and the weight of the cross-entropy change from step to step, as shares."""

from __future__ import annotations

import math
from enum import StrEnum

DECAY = 0.2
"""The last share of the steps in which a warmup-stable-decay schedule decays: 10 to 20 % is enough for the
loss of a cosine of the same length (Haegele et al., 2405.18392, section 4.1). Doubt: seen in pretraining."""


class Schedule(StrEnum):
    """Of the learning rate, after its warm-up."""

    LINEAR = "linear"
    COSINE = "cosine"
    WSD = "wsd"


class WeightSchedule(StrEnum):
    """Of the weight of the cross-entropy."""

    CONSTANT = "constant"
    LINEAR = "linear"
    WSD = "wsd"


def warm_steps(warmup: float, steps: int) -> int:
    """Steps of a warm-up that is a share of all."""
    return max(1, round(warmup * steps))


def rate_share(schedule: Schedule, step: int, steps: int, *, warmup: float, final: float) -> float:
    """Share of the peak rate at `step` (from 0): a linear warm-up to 1, then a fall that ends at `final`.

    linear: straight. cosine: half a period (Loshchilov and Hutter, 1608.03983, equation 5). wsd: 1 until the
    last `DECAY` of the steps, then 1 - sqrt (Haegele et al., 2405.18392, section 3).
    """
    warm = warm_steps(warmup, steps)
    if step < warm:
        return (step + 1) / warm
    if schedule == Schedule.LINEAR:
        return 1 - (1 - final) * _passed(step, warm, steps)
    if schedule == Schedule.COSINE:
        return final + (1 - final) * (1 + math.cos(math.pi * _passed(step, warm, steps))) / 2
    return 1 - (1 - final) * math.sqrt(_passed(step, max(warm, _stable_end(steps)), steps))


def weight_share(schedule: WeightSchedule, step: int, steps: int, *, warmup: float) -> float:
    """Share of the stated weight at `step` (from 0).

    constant: 1. linear: rises from 0 at the first step to 1 at the last, as SlimQwen moves from the teacher
    alone to a mix (2605.08738). wsd: rises in the warm-up, stays 1, falls to 0 in the last `DECAY` of the
    steps, so that a training ends on the teacher alone. Doubt: neither was compared here.
    """
    if schedule == WeightSchedule.CONSTANT:
        return 1.0
    if schedule == WeightSchedule.LINEAR:
        return step / max(1, steps - 1)
    warm = warm_steps(warmup, steps)
    return min((step + 1) / warm, 1 - _passed(step, max(warm, _stable_end(steps)), steps))


def _stable_end(steps: int) -> int:
    """The first step of the decay."""
    return steps - max(1, round(DECAY * steps))


def _passed(step: int, begin: int, steps: int) -> float:
    """0 before step `begin`, then rising to 1 at the last step."""
    return max(0, step + 1 - begin) / max(1, steps - begin)
