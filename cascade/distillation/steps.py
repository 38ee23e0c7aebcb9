"""One optimiser step: the loss of its rows with gradients, and the checks before the weights change.

B rows, T tokens, D hidden. A step is computed in micro-batches whose losses are divided by the step's own
number of targets, so that the split changes nothing but rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.optim import AdamW
from transformers import PreTrainedModel

from cascade.distillation.fused import fused_distillation_loss
from cascade.distillation.rows import StepRows
from cascade.distillation.settings import Plan
from cascade.distillation.states import device_of, final_states, head_of
from cascade.errors import CascadeError


@dataclass(frozen=True)
class Losses:
    """Of one step, in nats per target. See `cascade.distillation.fused.Terms`."""

    loss: float
    kl: float
    ce: float


def adamw(student: PreTrainedModel, weight_decay: float) -> AdamW:
    """AdamW with betas (0.9, 0.95), decay on matrices only (GPT-3, 2005.14165, appendix B).

    beta2 = 0.95 forgets in 20 steps, which a run of a few dozen steps needs; 0.999 would not.
    """
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return AdamW(groups, betas=(0.9, 0.95), fused=True)


def accumulate(
    student: PreTrainedModel,
    rows: StepRows,
    plan: Plan,
    should_stop: Callable[[], bool],
) -> Losses | None:
    """Add one step's gradients to the student; its losses, or None if stopped."""
    device, settings = device_of(student), plan.settings
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    total = rows.targets
    for start in range(0, len(rows), plan.micro_rows):
        batch, targets = rows.part(start, start + plan.micro_rows, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
            student_BTD = final_states(student, batch.ids, batch.positions)[:, :-1].to(dtype)
        terms = fused_distillation_loss(
            student_BTD.flatten(0, 1),
            head_of(student),
            targets,
            batch.labels,
            objective=settings.objective,
            objective_weight=settings.objective_weight,
            temperature=settings.temperature,
            cross_entropy_weight=settings.cross_entropy_weight,
            total_targets=total,
        )
        terms.loss.backward()
        sums += torch.stack([terms.loss.detach().double(), terms.kl, terms.ce])
        if should_stop():
            return None
    return Losses(*sums.tolist())


def require_finite(step: int, rows: Sequence[int], **figures: float) -> None:
    """Raises CascadeError when a figure is not finite: one bad step would ruin every weight."""
    for name, value in figures.items():
        if not math.isfinite(value):
            raise CascadeError(
                f"the {name.replace('_', ' ')} of step {step} is not finite",
                value=value,
                where=f"training rows {', '.join(map(str, rows))}",
                remedy="lower the learning rate, or look at these rows; earlier checkpoints are kept",
            )
