"""Independent references in float64: divergences from torch's own KL, losses from autograd over [N, V]."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from cascade.distillation.objectives import Objective

WEIGHTED = (Objective.JSD, Objective.SKEW_KL, Objective.SKEW_REVERSE_KL)
EVERY = [
    (objective, weight)
    for objective in Objective
    for weight in ((0.1, 0.5, 0.8) if objective in WEIGHTED else (None,))
]


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) [N]; torch's first argument is the approximation."""
    return kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def mixture(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """log(share p + (1 - share) q)."""
    return torch.logaddexp(log_p + math.log(share), log_q + math.log(1 - share))


def by_definition(objective: Objective, log_q: Tensor, log_p: Tensor, weight: float | None = None) -> Tensor:
    """The divergence [N] as the papers define it, for the student q and the teacher p."""
    if objective is Objective.FORWARD_KL:
        return kl(log_p, log_q)
    if objective is Objective.REVERSE_KL:
        return kl(log_q, log_p)
    if objective is Objective.TOTAL_VARIATION:
        return (log_p.exp() - log_q.exp()).abs().sum(-1) / 2
    assert weight is not None
    if objective is Objective.JSD:
        mixed = mixture(log_p, log_q, weight)
        return weight * kl(log_p, mixed) + (1 - weight) * kl(log_q, mixed)
    if objective is Objective.SKEW_KL:
        return kl(log_p, mixture(log_p, log_q, weight))
    return kl(log_q, mixture(log_p, log_q, 1 - weight))
