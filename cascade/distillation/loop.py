"""The training loop: one function from a student and a teacher to a trained student.

B rows, T tokens, D hidden. A step is one optimiser update over `batch_rows` rows; it is computed in
micro-batches whose losses are divided by the step's own number of targets, so that the split changes
nothing but rounding. Every target is the next token: positions 0..T-2 of a row.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW
from transformers import PreTrainedModel

from cascade.data.corpus import Corpus
from cascade.distillation import training_state
from cascade.distillation.fused import fused_distillation_loss
from cascade.distillation.guards import check_before_training
from cascade.distillation.settings import DistillSettings, Plan
from cascade.distillation.signals import Part, Teacher, batch_ids
from cascade.distillation.states import device_of, final_states, head_of
from cascade.distillation.training_state import Progress, StepRecord
from cascade.errors import CascadeError, Interrupted
from cascade.report import SILENT, Report
from cascade.storage.checkpoints import TrainingCheckpoints


@dataclass(frozen=True)
class Leg:
    """A part of a training, under the schedule of the whole.

    part: the share of all steps after which it ends. start: the state it goes on from, if any. end: where its
    last state is stored.
    """

    part: float = 1.0
    start: TrainingCheckpoints | None = None
    end: TrainingCheckpoints | None = None

    def steps(self, whole: int) -> int:
        """The step it ends after, of so many."""
        return max(1, round(self.part * whole))


WHOLE = Leg()


def distill(
    student: PreTrainedModel,
    teacher: Teacher,
    corpus: Corpus,
    *,
    settings: DistillSettings,
    leg: Leg = WHOLE,
    checkpoints: TrainingCheckpoints | None = None,
    checkpoint_seconds: float = 60.0,
    on_step: Callable[[StepRecord], None] | None = None,
    report: Report = SILENT,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[StepRecord]:
    """Train `student` in place (its parameters become float32) and return one record per step.

    Goes on from the newest checkpoint, or else from where the leg starts, bit for bit as if it had not
    stopped; the records returned then include the steps before, while `on_step` hears only of new ones.
    `should_stop` is asked after every micro-batch. On a GPU the forward pass runs in bfloat16 autocast with
    float32 weights.

    Raises Interrupted (after saving) when asked to stop, CascadeError on a non-finite loss or
    gradient (naming step and rows; the checkpoints before it are kept), InputError for a student,
    teacher or corpus that do not fit together.
    """
    student.float().eval()
    plan = settings.resolved(head_of(student).width, corpus.sequence_length)
    check_before_training(student, teacher, corpus, plan)
    student.train()
    torch.manual_seed(settings.seed)
    optimizer = adamw(student, settings.weight_decay)
    identity = {**plan.record(), "corpus": corpus.identity}
    progress = None
    for states in (checkpoints, leg.start):
        if states and not progress:
            progress = training_state.restore(states, student, optimizer, identity)
    if progress:
        report.log(f"resumed after step {len(progress.steps)} of {plan.steps}")
    progress = progress or Progress(identity)
    saved, saved_steps = time.monotonic(), len(progress.steps)
    last = leg.steps(plan.steps)
    while (step := len(progress.steps)) < last:
        started = time.monotonic()
        random = training_state.random_state(device_of(student))
        rows = [corpus.row(position) for position in plan.positions(step)]
        sums = _accumulate(student, teacher, corpus, plan, rows, should_stop)
        if sums is None:
            optimizer.zero_grad(set_to_none=True)
            if checkpoints and step > saved_steps:
                training_state.save(checkpoints, student, optimizer, random, progress)
            raise Interrupted(f"stopped after step {step} of {plan.steps}", remedy="run it again to go on")
        norm = clip_grad_norm_(student.parameters(), settings.clip).item()
        _require_finite(step, rows, loss=sums[0], gradient_norm=norm)
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate(step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        record = _record(plan, progress, sums, norm, len(rows), time.monotonic() - started)
        progress.steps.append(record)
        if on_step:
            on_step(record)
        report.progress(
            record.tokens,
            plan.tokens,
            "tokens",
            loss=record.loss,
            kl=record.kl,
            tokens_per_second=record.tokens_per_second,
        )
        # After the last step too: what follows (the gate, the upload) may be interrupted.
        if checkpoints and time.monotonic() - saved >= checkpoint_seconds:
            random = training_state.random_state(device_of(student))
            training_state.save(checkpoints, student, optimizer, random, progress)
            saved, saved_steps = time.monotonic(), step + 1
    if leg.end:
        training_state.save(
            leg.end, student, optimizer, training_state.random_state(device_of(student)), progress
        )
    student.eval()
    return progress.steps


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


def _accumulate(
    student: PreTrainedModel,
    teacher: Teacher,
    corpus: Corpus,
    plan: Plan,
    rows: Sequence[int],
    should_stop: Callable[[], bool],
) -> tuple[float, float, float] | None:
    """Add one step's gradients to the student; its loss, divergence and cross-entropy, or None if stopped."""
    device, settings = device_of(student), plan.settings
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    for start in range(0, len(rows), plan.micro_rows):
        part = rows[start : start + plan.micro_rows]
        ids_BT = batch_ids(corpus, Part.TRAIN, part, device)
        targets = teacher.targets(Part.TRAIN, part)
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
            student_BTD = final_states(student, ids_BT)[:, :-1].to(dtype)
        terms = fused_distillation_loss(
            student_BTD.flatten(0, 1),
            head_of(student),
            targets,
            ids_BT[:, 1:].flatten(),
            objective=settings.objective,
            objective_weight=settings.objective_weight,
            temperature=settings.temperature,
            cross_entropy_weight=settings.cross_entropy_weight,
            total_targets=len(rows) * (plan.sequence_length - 1),
        )
        terms.loss.backward()
        sums += torch.stack([terms.loss.detach().double(), terms.kl, terms.ce])
        if should_stop():
            return None
    loss, kl, ce = sums.tolist()
    return loss, kl, ce


def _require_finite(step: int, rows: Sequence[int], **figures: float) -> None:
    """Raises CascadeError when a figure is not finite: one bad step would ruin every weight."""
    for name, value in figures.items():
        if not math.isfinite(value):
            raise CascadeError(
                f"the {name.replace('_', ' ')} of step {step} is not finite",
                value=value,
                where=f"training rows {', '.join(map(str, rows))}",
                remedy="lower the learning rate, or look at these rows; earlier checkpoints are kept",
            )


def _record(
    plan: Plan, progress: Progress, sums: tuple[float, float, float], norm: float, rows: int, seconds: float
) -> StepRecord:
    """The step's figures, counted on from the steps before it."""
    tokens, step = rows * plan.sequence_length, len(progress.steps)
    return StepRecord(
        step=step,
        tokens=progress.tokens + tokens,
        loss=sums[0],
        kl=sums[1],
        ce=sums[2],
        lr=plan.learning_rate(step),
        grad_norm=norm,
        tokens_per_second=tokens / seconds,
        seconds=progress.seconds + seconds,
    )
