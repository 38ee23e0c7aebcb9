"""What the student is asked to match: divergences between two distributions, by name.

N tokens, V vocabulary entries. A divergence takes two tensors [N, V] of log-probabilities (the
student's, the teacher's; float32 or wider, rows that sum to one after `exp`) and returns

- value [N], in nats, zero exactly when the two are equal, never negative beyond rounding;
- gradient [N, V] of that value with respect to the logits whose log-softmax is the first argument.

Both are closed forms, so that no autograd graph over [N, V] is kept. A divergence may overwrite
both arguments: at V = 128256 every temporary of a chunk costs as much as the chunk's logits.
To add an objective, write the two formulas, name it in `Objective` and enter it in `DIVERGENCES`;
the property tests run over every member.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    # The recipe needs the names alone, and torch takes seconds to load.
    from torch import Tensor

Divergence: TypeAlias = "Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]"


class Objective(StrEnum):
    """The divergences a recipe can name."""

    FORWARD_KL = "forward_kl"
    REVERSE_KL = "reverse_kl"


def forward_kl(log_student_NV: Tensor, log_teacher_NV: Tensor) -> tuple[Tensor, Tensor]:
    """KL(teacher || student) = sum_v p (log p - log q); gradient q - p (Hinton et al., 1503.02531, eq. 2)."""
    teacher_NV = log_teacher_NV.exp()
    value_N = log_teacher_NV.sub_(log_student_NV).mul_(teacher_NV).sum(-1)
    return value_N, log_student_NV.exp_().sub_(teacher_NV)


def reverse_kl(log_student_NV: Tensor, log_teacher_NV: Tensor) -> tuple[Tensor, Tensor]:
    """KL(student || teacher) = sum_v q (log q - log p); gradient q (log q - log p - KL).

    The gradient follows from d q_v / d z_u = q_v (1[u = v] - q_u); used for language models in
    MiniLLM (2306.08543, section 2.1).
    """
    student_NV = log_student_NV.exp()
    ratio_NV = log_student_NV.sub_(log_teacher_NV)
    value_N = (student_NV * ratio_NV).sum(-1)
    return value_N, ratio_NV.sub_(value_N[:, None]).mul_(student_NV)


DIVERGENCES: dict[Objective, Divergence] = {
    Objective.FORWARD_KL: forward_kl,
    Objective.REVERSE_KL: reverse_kl,
}
