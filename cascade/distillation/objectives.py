"""What the student is asked to match: divergences between two distributions, by name.

N tokens, V vocabulary entries; p the teacher's probabilities, q the student's. A divergence takes two
tensors [N, V] of log-probabilities (the student's, the teacher's; float32 or wider, rows that sum to one
after `exp`) and returns

- value [N], in nats, zero exactly when the two are equal, never negative beyond rounding;
- gradient [N, V] of that value with respect to the logits whose log-softmax is the first argument.

Both are closed forms, so that no autograd graph over [N, V] is kept. They follow from
d q_v / d z_u = q_v (1[u = v] - q_u): a value with derivatives g_v = d value / d q_v has the gradient
q_v (g_v - sum_u q_u g_u). A divergence may overwrite both arguments: at V = 128256 every temporary of a
chunk costs as much as the chunk's logits.

Four compare with a mixture m of p and q instead of p or q itself, so that they stay bounded where one
of the two is almost zero; their weight (the recipe's `objective_weight`) is beta or alpha of the papers:

- jsd              beta KL(p || m) + (1 - beta) KL(q || m),  m = beta p + (1 - beta) q
- skew_kl          KL(p || m),                               m = alpha p + (1 - alpha) q
- skew_reverse_kl  KL(q || m),                               m = (1 - alpha) p + alpha q

jsd / beta -> KL(p || q) for beta -> 0, and jsd / (1 - beta) -> KL(q || p) for beta -> 1; the two skew
divergences are the two KLs at alpha = 0. To add an objective, write the two formulas, name it in
`Objective` and enter it in `DIVERGENCES` or `WEIGHTED`; the property tests run over every member.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from functools import cache, partial
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    # The recipe needs the names alone, and torch takes seconds to load.
    from torch import Tensor

Divergence: TypeAlias = "Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]"


class Objective(StrEnum):
    """The divergences a recipe can name."""

    FORWARD_KL = "forward_kl"
    REVERSE_KL = "reverse_kl"
    JSD = "jsd"
    SKEW_KL = "skew_kl"
    SKEW_REVERSE_KL = "skew_reverse_kl"
    TOTAL_VARIATION = "total_variation"


def forward_kl(log_student_NV: Tensor, log_teacher_NV: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p || q) = sum_v p (log p - log q); gradient q - p (Hinton et al., 1503.02531, eq. 2)."""
    teacher_NV = log_teacher_NV.exp()
    value_N = log_teacher_NV.sub_(log_student_NV).mul_(teacher_NV).sum(-1)
    return value_N, log_student_NV.exp_().sub_(teacher_NV)


def reverse_kl(log_student_NV: Tensor, log_teacher_NV: Tensor) -> tuple[Tensor, Tensor]:
    """KL(q || p) = sum_v q (log q - log p); gradient q (log q - log p - KL) (MiniLLM, 2306.08543)."""
    student_NV = log_student_NV.exp()
    ratio_NV = log_student_NV.sub_(log_teacher_NV)
    value_N = (student_NV * ratio_NV).sum(-1)
    return value_N, ratio_NV.sub_(value_N[:, None]).mul_(student_NV)


def jsd(log_student_NV: Tensor, log_teacher_NV: Tensor, *, weight: float) -> tuple[Tensor, Tensor]:
    """Generalised Jensen-Shannon divergence (GKD, 2306.13649, eq. 1), weight = beta.

    The derivative by q_v is (1 - beta) log(q / m), so the gradient is (1 - beta) q (log(q / m) - KL(q || m)).
    """
    student_NV, teacher_NV, against_student_NV, against_teacher_NV = _mixed(
        log_student_NV, log_teacher_NV, weight
    )
    student_kl_N = (student_NV * against_student_NV).sum(-1)
    value_N = against_teacher_NV.mul_(teacher_NV).sum(-1).mul_(weight).add_(student_kl_N, alpha=1 - weight)
    gradient_NV = against_student_NV.sub_(student_kl_N[:, None]).mul_(student_NV).mul_(1 - weight)
    return value_N, gradient_NV


def skew_kl(log_student_NV: Tensor, log_teacher_NV: Tensor, *, weight: float) -> tuple[Tensor, Tensor]:
    """KL(p || alpha p + (1 - alpha) q) (DistiLLM, 2402.03898, section 3.1), weight = alpha.

    With the student's share of the mixture s = (1 - alpha) p q / m the gradient is q sum(s) - s.
    """
    student_NV, teacher_NV, against_student_NV, against_teacher_NV = _mixed(
        log_student_NV, log_teacher_NV, weight
    )
    value_N = against_teacher_NV.mul_(teacher_NV).sum(-1)
    share_NV = against_student_NV.exp_().mul_(teacher_NV).mul_(1 - weight)
    return value_N, student_NV.mul_(share_NV.sum(-1, keepdim=True)).sub_(share_NV)


def skew_reverse_kl(
    log_student_NV: Tensor, log_teacher_NV: Tensor, *, weight: float
) -> tuple[Tensor, Tensor]:
    """KL(q || (1 - alpha) p + alpha q) (DistiLLM, 2402.03898, section 3.1), weight = alpha.

    The derivative by q_v is g = log(q / m) - alpha q / m up to a constant; gradient q (g - sum_u q_u g_u).
    """
    student_NV, _, against_student_NV, _ = _mixed(log_student_NV, log_teacher_NV, 1 - weight)
    value_N = (student_NV * against_student_NV).sum(-1)
    slope_NV = against_student_NV.sub_(against_student_NV.exp().mul_(weight))
    mean_N = (student_NV * slope_NV).sum(-1, keepdim=True)
    return value_N, slope_NV.sub_(mean_N).mul_(student_NV)


def total_variation(log_student_NV: Tensor, log_teacher_NV: Tensor) -> tuple[Tensor, Tensor]:
    """sum_v |p - q| / 2, at most 1; the derivative by q_v is sign(q - p) / 2, zero where they are equal.

    As a distillation objective: f-distill (2307.15190).
    """
    student_NV = log_student_NV.exp_()
    difference_NV = student_NV - log_teacher_NV.exp_()
    value_N = difference_NV.abs().sum(-1).div_(2)
    sign_NV = difference_NV.sign_().div_(2)
    mean_N = (student_NV * sign_NV).sum(-1, keepdim=True)
    return value_N, sign_NV.sub_(mean_N).mul_(student_NV)


LARGEST = 80.0
"""Of log p - log q: beyond it q / p < e^-80, so that q and what it adds to the mixture are below rounding,
while e^d would overflow float32 at 88."""


def _mixed(
    log_student_NV: Tensor, log_teacher_NV: Tensor, weight: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, p, log(q / m) and log(p / m) for m = weight p + (1 - weight) q; the arguments are overwritten.

    With d = log p - log q, log(q / m) = -log1p(weight expm1(d)): exactly zero at d = 0, accurate near it,
    and finite where q underflows.
    """
    teacher_NV, student_NV = log_teacher_NV.exp(), log_student_NV.exp()
    difference_NV = log_teacher_NV.sub_(log_student_NV).clamp_(max=LARGEST)
    against_student_NV = log_student_NV.copy_(difference_NV).expm1_().mul_(weight).log1p_().neg_()
    return student_NV, teacher_NV, against_student_NV, difference_NV.add_(against_student_NV)


DIVERGENCES: dict[Objective, Divergence] = {
    Objective.FORWARD_KL: forward_kl,
    Objective.REVERSE_KL: reverse_kl,
    Objective.TOTAL_VARIATION: total_variation,
}
WEIGHTED: dict[Objective, Callable[..., tuple[Tensor, Tensor]]] = {
    Objective.JSD: jsd,
    Objective.SKEW_KL: skew_kl,
    Objective.SKEW_REVERSE_KL: skew_reverse_kl,
}
DEFAULT_WEIGHTS = {Objective.JSD: 0.5, Objective.SKEW_KL: 0.1, Objective.SKEW_REVERSE_KL: 0.1}
"""beta = 1/2 is the symmetric Jensen-Shannon divergence, alpha = 0.1 DistiLLM's choice; not compared here."""


def divergence_of(objective: Objective, weight: float | None = None) -> Divergence:
    """The function of that name, with beta or alpha where it has one, the same object for the same arguments.

    Raises ValueError as `check_weight`.
    """
    check_weight(objective, weight)
    if objective not in WEIGHTED:
        return DIVERGENCES[objective]
    return _at(WEIGHTED[objective], weight or DEFAULT_WEIGHTS[objective])


@cache
def _at(divergence: Callable[..., tuple[Tensor, Tensor]], weight: float) -> Divergence:
    """The divergence at a weight."""
    return partial(divergence, weight=weight)


def check_weight(objective: Objective, weight: float | None) -> None:
    """Raise ValueError for a weight that the objective does not take."""
    if weight is None:
        return
    if objective not in WEIGHTED:
        raise ValueError(f"`objective_weight` belongs to {', '.join(WEIGHTED)}, not {objective.value}")
    if not 0 < weight < 1:
        raise ValueError("`objective_weight` is more than 0 and less than 1")
