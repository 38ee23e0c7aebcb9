"""One optimiser step: the loss of its rows with gradients, and the checks before the weights change.

B rows, T tokens, D hidden. A step is computed in micro-batches whose losses are divided by the step's own
number of targets, so that the split changes nothing but rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import nn
from torch.optim import AdamW
from transformers import PreTrainedModel

from cascade.distillation.fused import fused_distillation_loss
from cascade.distillation.intermediate import Intermediate, loss_of
from cascade.distillation.rows import StepRows
from cascade.distillation.settings import Plan
from cascade.distillation.states import all_states, device_of, head_of
from cascade.distillation.training_state import StepRecord
from cascade.errors import CascadeError


@dataclass(frozen=True)
class Losses:
    """Of one step, in nats per target. See `cascade.distillation.fused.Terms`; hidden_states: unweighted."""

    loss: float
    kl: float
    ce: float
    hidden_states: float = 0.0


def adamw(student: PreTrainedModel, weight_decay: float, *others: nn.Parameter) -> AdamW:
    """AdamW with betas (0.9, 0.95), decay on matrices only (GPT-3, 2005.14165, appendix B).

    beta2 = 0.95 forgets in 20 steps, which a run of a few dozen steps needs; 0.999 would not.
    """
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    parameters += others
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return AdamW(groups, betas=(0.9, 0.95), fused=True)


def accumulate(
    student: PreTrainedModel,
    rows: StepRows,
    plan: Plan,
    step: int,
    should_stop: Callable[[], bool],
    inner: Intermediate | None = None,
) -> Losses | None:
    """Add the gradients of the rows of `step` (from 0) to the student; its losses, or None if stopped."""
    device, settings = device_of(student), plan.settings
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    total = rows.targets
    for start in range(0, len(rows), plan.micro_rows):
        batch, targets = rows.part(start, start + plan.micro_rows, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
            places = inner.places if inner else ()
            states_BTD, seen = all_states(student, batch.ids, places, batch.positions)
        student_BTD = states_BTD[:, :-1].to(dtype)
        hidden = torch.zeros((), device=device)
        if inner:
            hidden = loss_of(inner, seen, targets, batch) / max(total, 1)
        terms = fused_distillation_loss(
            student_BTD.flatten(0, 1),
            head_of(student),
            targets,
            batch.labels,
            objective=settings.objective,
            objective_weight=settings.objective_weight,
            temperature=settings.temperature,
            cross_entropy_weight=plan.cross_entropy_weight(step),
            total_targets=total,
            compiled=plan.compiled,
        )
        loss = terms.loss + inner.weight * hidden if inner else terms.loss
        loss.backward()
        sums += torch.stack([loss.detach().double(), terms.kl, terms.ce, hidden.detach().double()])
        if should_stop():
            return None
    return Losses(*sums.tolist())


def require_healthy(before: Sequence[StepRecord], losses: Losses, norm: float, rows: Sequence[int]) -> None:
    """Raises CascadeError for a figure that is not finite or a loss that jumps, before it ruins the weights.

    before: the steps that are finished. norm: of the gradient.
    """
    fault = None
    for name, value in (("loss", losses.loss), ("gradient norm", norm)):
        if not math.isfinite(value):
            fault = f"the {name} of step {len(before)} is not finite", str(value)
            break
    else:
        for name, value in (("divergence", losses.kl), ("cross-entropy", losses.ce)):
            window = [step.kl if name == "divergence" else step.ce for step in before[-SPIKE_WINDOW:]]
            if is_spike(value, window):
                usual = f"{value:.3g} nats, in the steps before it mostly {median(window):.3g}"
                fault = f"the {name} of step {len(before)} jumps", usual
                break
    if fault:
        raise CascadeError(
            fault[0],
            value=fault[1],
            where=f"training rows {', '.join(map(str, rows))}",
            remedy="lower the learning rate, or look at these rows; the snapshots kept are from before it",
        )


SPIKE_WINDOW, SPIKE_STEPS = 32, 8
SPIKE_RATIO, SPIKE_DEVIATIONS, SPIKE_NATS = 3.0, 10.0, 0.05


def is_spike(value: float, window: Sequence[float]) -> bool:
    """Whether a loss of a step stands out of those before it: all of three bounds are passed.

    Three times their median; ten robust standard deviations (1.4826 times the median absolute deviation), so
    that noisy small batches, which differ by multiples, pass; 0.05 nats, below which nothing is lost. Fewer
    than 8 steps tell too little. Steps fall or are level, so that a window that lags is never too low.
    """
    if len(window) < SPIKE_STEPS:
        return False
    centre = median(window)
    deviation = 1.4826 * median([abs(other - centre) for other in window])
    return value - centre > max((SPIKE_RATIO - 1) * centre, SPIKE_DEVIATIONS * deviation, SPIKE_NATS)
