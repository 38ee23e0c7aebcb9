"""The training loop: one function from a student and a teacher to a trained student."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedModel

from cascade.data.corpus import Corpus
from cascade.distillation.guards import check_before_training
from cascade.distillation.meters import StepFile, Stopwatch, peak_memory, seconds_waited
from cascade.distillation.rows import CorpusRows, RowSource
from cascade.distillation.settings import DistillSettings, Plan
from cascade.distillation.signals import Teacher
from cascade.distillation.states import head_of
from cascade.distillation.steps import accumulate, adamw, require_healthy
from cascade.distillation.training_state import Keeper, Progress, StepRecord, Training
from cascade.errors import Interrupted
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
    source: RowSource | None = None,
    leg: Leg = WHOLE,
    checkpoints: TrainingCheckpoints | None = None,
    checkpoint_seconds: float = 60.0,
    gradient_checkpointing: bool = False,
    on_step: Callable[[StepRecord], None] | None = None,
    step_file: Path | None = None,
    report: Report = SILENT,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[StepRecord]:
    """Train `student` in place (its parameters become float32) and return one record per step.

    source: where the rows of every step come from, if they are not those of the corpus as they are.
    Goes on from the newest checkpoint, or else from where the leg starts, bit for bit as if it had not
    stopped; the records returned then include the steps before, while `on_step` hears only of new ones.
    `step_file` is a file of JSON lines with the steps so far, appended to while the training runs.
    `gradient_checkpointing` trades time for memory and changes no result.
    `should_stop` is asked after every micro-batch. On a GPU the forward pass runs in bfloat16 autocast with
    float32 weights.

    Raises Interrupted (after saving) when asked to stop, CascadeError on a loss or gradient that is not
    finite and on a loss that jumps (naming step and rows; the checkpoints before it are kept), InputError
    for a student, teacher or corpus that do not fit together.
    """
    student.float().eval()
    plan = settings.resolved(head_of(student).width, corpus.sequence_length)
    check_before_training(student, teacher, corpus, plan, report)
    student.train()
    _checkpoint_gradients(student, gradient_checkpointing)
    torch.manual_seed(settings.seed)
    source = source or CorpusRows(corpus, teacher)
    progress = Progress({**plan.record(), **source.record(), "corpus": corpus.identity})
    training = Training(student, adamw(student, settings.weight_decay), progress)
    if any(states and training.restore(states) for states in (checkpoints, leg.start)):
        report.log(f"resumed after step {training.step} of {plan.steps}")
    keeper = Keeper(training, checkpoints, checkpoint_seconds)
    steps = StepFile(step_file, progress.steps)
    last = leg.steps(plan.steps)
    while training.step < last:
        record = _step(training, source, plan, keeper, should_stop)
        progress.steps.append(record)
        steps.append(record)
        _announce(record, plan, on_step, report)
    # After the last step too: what follows (the gate, the upload) may be interrupted.
    keeper.save_when_due(training.random_state())
    if leg.end:
        training.save(leg.end, training.random_state())
    _checkpoint_gradients(student, False)
    student.eval()
    return progress.steps


def _checkpoint_gradients(student: PreTrainedModel, wanted: bool) -> None:
    """Compute the activations of a layer again for its gradients, or keep them."""
    with warnings.catch_warnings():
        # transformers 6 will rename them, but 5.0 does not know the new names.
        warnings.simplefilter("ignore", FutureWarning)
        if wanted:
            student.gradient_checkpointing_enable({"use_reentrant": False})
        elif student.is_gradient_checkpointing:
            student.gradient_checkpointing_disable()


def _step(
    training: Training,
    source: RowSource,
    plan: Plan,
    keeper: Keeper,
    should_stop: Callable[[], bool],
) -> StepRecord:
    """Train one step. Raises Interrupted and CascadeError as `distill`, before the weights change."""
    clock, step, random = Stopwatch(), training.step, training.random_state()
    student, optimizer = training.student, training.optimizer
    rows = source.rows(plan.positions(step), should_stop)
    waited = seconds_waited(rows.teacher) if rows else 0.0
    losses = accumulate(student, rows, plan, step, should_stop) if rows else None
    if rows is None or losses is None:
        optimizer.zero_grad(set_to_none=True)
        keeper.save(random)
        raise Interrupted(f"stopped after step {step} of {plan.steps}", remedy="run it again to go on")
    norm = clip_grad_norm_(student.parameters(), plan.settings.clip).item()
    require_healthy(training.progress.steps, losses, norm, rows.named)
    with clock.paused():
        keeper.save_when_due(random)
    for group in optimizer.param_groups:
        group["lr"] = plan.learning_rate(step)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    seconds, tokens = clock.seconds(), len(rows) * plan.sequence_length
    return StepRecord(
        step=step,
        tokens=training.progress.tokens + tokens,
        **asdict(losses),
        cross_entropy_weight=plan.cross_entropy_weight(step),
        lr=plan.learning_rate(step),
        grad_norm=norm,
        tokens_per_second=tokens / seconds,
        waited=seconds_waited(rows.teacher) - waited,
        memory=peak_memory(training.device),
        seconds=training.progress.seconds + seconds,
        own_targets=rows.own_targets,
    )


def _announce(
    record: StepRecord, plan: Plan, on_step: Callable[[StepRecord], None] | None, report: Report
) -> None:
    """Tell everyone who listens about a step."""
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
