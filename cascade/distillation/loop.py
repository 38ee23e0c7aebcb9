"""The training loop: one function from a student and a teacher to a trained student."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedModel

from cascade.data.corpus import Corpus
from cascade.distillation.compiled import compiled_layers, require_compiler
from cascade.distillation.guards import check_before_training
from cascade.distillation.intermediate import Intermediate, intermediate_of
from cascade.distillation.keeper import Keeper
from cascade.distillation.meters import StepFile, Stopwatch, peak_memory, seconds_waited
from cascade.distillation.rows import CorpusRows, RowSource
from cascade.distillation.settings import DistillSettings, Plan
from cascade.distillation.signals import Teacher
from cascade.distillation.states import device_of, head_of
from cascade.distillation.steps import accumulate, adamw, require_healthy
from cascade.distillation.training_state import Progress, StepRecord, Training
from cascade.distillation.watch import Watch, best_of, measured
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
    origins: Sequence[int] | None = None,
    watch: Watch | None = None,
    leg: Leg = WHOLE,
    checkpoints: TrainingCheckpoints | None = None,
    checkpoint_seconds: float = 60.0,
    gradient_checkpointing: bool = False,
    compiled: bool = False,
    on_step: Callable[[StepRecord], None] | None = None,
    step_file: Path | None = None,
    report: Report = SILENT,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[StepRecord]:
    """Train `student` in place (its parameters become float32) and return one record per step.

    source: where the rows of every step come from, if they are not those of the corpus as they are.
    origins: of the student's layers in the teacher, if it was cut from it; a loss between layers asks.
    watch: a second corpus, whose cross-entropy ends the training early when it has not fallen for long. The
    student is then that of its best measurement, however the training ended; the records are of all steps.
    Goes on from the newest checkpoint, or else from where the leg starts, bit for bit as if it had not
    stopped; the records returned then include the steps before, while `on_step` hears only of new ones.
    `step_file` is a file of JSON lines with the steps so far, appended to while the training runs.
    `gradient_checkpointing` trades time for memory and changes no result. `compiled` (torch.compile, for the
    student's layers and the loss) trades a minute at the start for time in every step, and changes rounding.
    `should_stop` is asked after every micro-batch. On a GPU the forward pass runs in bfloat16 autocast with
    float32 weights.

    Raises Interrupted (after saving) when asked to stop, CascadeError on a loss or gradient that is not
    finite and on a loss that jumps (naming step and rows; the checkpoints before it are kept), InputError
    for a student, teacher or corpus that do not fit together.
    """
    student.float().eval()
    if compiled:
        require_compiler(device_of(student))
        report.log("compiles the student's layers and the loss: the first steps take longer")
    plan = replace(settings.resolved(head_of(student).width, corpus.sequence_length), compiled=compiled)
    inner = None
    if settings.hidden_states:
        teacher, inner = intermediate_of(student, teacher, plan, origins)
        named = ", ".join(f"{own} with {other}" for own, other in inner.pairs)
        report.log(f"compares layers of student and teacher, counted from 0: {named}")
    check_before_training(student, teacher, corpus, plan, report, inner)
    torch.manual_seed(settings.seed)
    source = source or CorpusRows(corpus, teacher)
    progress = Progress({**plan.record(), **source.record(), "corpus": corpus.identity})
    projections = inner.projections if inner else ()
    training = Training(
        student,
        adamw(student, settings.weight_decay, *projections),
        progress,
        projections,
        watch.record() if watch else None,
    )
    if any(states and training.restore(states) for states in (checkpoints, leg.start)):
        report.log(f"resumed after step {training.step} of {plan.steps}")
    last = leg.steps(plan.steps)
    with Keeper(training, checkpoints, checkpoint_seconds, report) as keeper:
        # The run may have been stopped while it measured.
        _measure(training, watch, last, keeper, should_stop, report)
        steps = StepFile(step_file, progress.steps)
        with _in_training(student, gradient_checkpointing, compiled, inner):
            while training.step < last and not (watch and watch.over(progress.steps)):
                progress.steps.append(_step(training, source, plan, keeper, should_stop, inner))
                _measure(training, watch, last, keeper, should_stop, report)
                steps.append(progress.steps[-1])
                _announce(progress.steps[-1], plan, on_step, report)
        # After the last step too: what follows (the gate, the upload) may be interrupted.
        keeper.save_at_end(training.random_state())
    if leg.end:
        training.state(training.random_state()).save(leg.end)
    if watch:
        _return_to_best(training, last, report)
    return progress.steps


@contextmanager
def _in_training(
    student: PreTrainedModel, gradient_checkpointing: bool, compiled: bool, inner: Intermediate | None
) -> Iterator[None]:
    """Inside, the student is as its training wants it; afterwards plain, in eval mode, whatever happened."""
    student.train()
    _checkpoint_gradients(student, gradient_checkpointing)
    try:
        with compiled_layers(student, inner.places if inner else ()) if compiled else nullcontext():
            yield
    finally:
        _checkpoint_gradients(student, False)
        student.eval()


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
    inner: Intermediate | None,
) -> StepRecord:
    """Train one step. Raises Interrupted and CascadeError as `distill`, before the weights change."""
    clock, step, random = Stopwatch(), training.step, training.random_state()
    student, optimizer = training.student, training.optimizer
    rows = source.rows(plan.positions(step), should_stop)
    waited = seconds_waited(rows.teacher) if rows else 0.0
    losses = accumulate(student, rows, plan, step, should_stop, inner) if rows else None
    if rows is None or losses is None:
        optimizer.zero_grad(set_to_none=True)
        keeper.save(random)
        raise stopped(step, plan.steps)
    trained = [parameter for _, parameter in training.named_parameters()]
    norm = clip_grad_norm_(trained, plan.settings.clip).item()
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


def stopped(step: int, of: int) -> Interrupted:
    """The training's end when it is asked to stop."""
    return Interrupted(f"stopped after step {step} of {of}", where="training", remedy="run it again to go on")


def _measure(
    training: Training,
    watch: Watch | None,
    last: int,
    keeper: Keeper,
    should_stop: Callable[[], bool],
    report: Report,
) -> None:
    """Measure the watched corpus after the last finished step, if that is due and not done; keep the best.

    Raises Interrupted as `distill`, and CascadeError for a cross-entropy that is not finite.
    """
    steps = training.progress.steps
    if not watch or not watch.due(training.step, last) or steps[-1].watched_ce is not None:
        return
    found = watch.measure(training.student, should_stop)
    if found is None:
        keeper.save(training.random_state())
        raise stopped(training.step, last)
    steps[-1] = replace(steps[-1], watched_ce=found)
    report.log(f"watched cross-entropy after step {training.step} of {last}: {found:.4f} nats")
    if best_of(measured(steps)) is steps[-1]:
        training.keep_best()


def _return_to_best(training: Training, last: int, report: Report) -> None:
    """Make the student the one of the best measurement, and say so where it is not the last."""
    training.return_to_best()
    best = best_of(measured(training.progress.steps))
    if best.step + 1 < training.step:
        early = f"ended early, after step {training.step} of {last}" if training.step < last else "is over"
        report.log(
            f"the training {early}; the child is that of step {best.step + 1}, whose watched cross-entropy "
            f"was the lowest: {best.watched_ce:.4f} nats"
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
