"""The linear maps from states of a student to its teacher's, as a training starts with them.

N tokens, D student and E teacher hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cascade.distillation.batches import batch_of
from cascade.distillation.fused import IGNORED
from cascade.distillation.settings import Plan
from cascade.distillation.signals import OnlineTeacher, Part
from cascade.distillation.states import all_states, device_of, head_of, of_targets

FITTED_TOKENS = 4096
RIDGE = 0.1
"""A map starts as a fit to so many tokens, with this share of the mean squared singular value added: tokens
may be fewer than channels, and an exact fit would carry over to no other token. Doubt: not measured."""


@torch.no_grad()
def fitted(
    student: PreTrainedModel, places: Sequence[nn.Module], teacher: OnlineTeacher, plan: Plan
) -> list[Tensor]:
    """The map [D, E], float32, of every place: a ridge regression on the training's first rows.

    teacher: answering with what it has at the places that belong to them.
    """
    corpus, device = teacher.corpus, device_of(student)
    width, wanted = head_of(student).width, teacher.head.width
    squares = [torch.zeros(width, width, dtype=torch.float64) for _ in places]
    products = [torch.zeros(width, wanted, dtype=torch.float64) for _ in places]
    count = min(plan.rows, -(-FITTED_TOKENS // plan.sequence_length))
    for start in range(0, count, plan.micro_rows):
        rows = [corpus.row(position) for position in range(start, min(start + plan.micro_rows, count))]
        batch = batch_of(corpus, Part.TRAIN, rows, device)
        told_N = batch.labels != IGNORED
        _, seen = all_states(student, batch.ids, places, batch.positions)
        for place, (inner_BTD, inner_NE) in enumerate(
            zip(seen, teacher.targets(Part.TRAIN, rows).inner, strict=True)
        ):
            read_ND = of_targets(inner_BTD)[told_N].cpu().double()
            squares[place] += read_ND.T @ read_ND
            products[place] += read_ND.T @ inner_NE[told_N].cpu().double()
    pairs = zip(squares, products, strict=True)
    return [ridge(square, product).float().contiguous().to(device) for square, product in pairs]


def ridge(square_DD: Tensor, product_DE: Tensor) -> Tensor:
    """The map [D, E] with the least squared error plus a little of its own size, float64.

    square_DD: S^T S of what it reads; product_DE: S^T T with what it is to give.
    """
    size = RIDGE * square_DD.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    return torch.linalg.solve(square_DD + size * torch.eye(len(square_DD), dtype=torch.float64), product_DE)
