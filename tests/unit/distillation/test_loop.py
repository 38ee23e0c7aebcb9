"""The loop learns, does not care how a batch is split, and resumes bit for bit."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from cascade.data.corpus import Corpus
from cascade.distillation.loop import Leg, distill
from cascade.distillation.objectives import Objective
from cascade.distillation.schedules import WeightSchedule
from cascade.distillation.settings import DistillSettings
from cascade.distillation.signals import OnlineTeacher, Part, StoredTeacher, write_signals
from cascade.distillation.states import final_states, head_of
from cascade.distillation.steps import adamw
from cascade.distillation.targets import StateTargets
from cascade.distillation.training_state import StepRecord
from cascade.errors import CascadeError, Interrupted
from cascade.storage.checkpoints import TrainingCheckpoints
from cascade.storage.locations import open_location
from tests.numerics.divergences import by_definition
from tests.unit.distillation.teaching import LENGTH, make_rows, make_student, make_teacher

SETTINGS = DistillSettings(tokens=16 * LENGTH, batch_rows=2, micro_rows=1, learning_rate=0.01)


@pytest.fixture
def corpus() -> Corpus:
    return make_rows()


@pytest.fixture
def teacher(corpus: Corpus) -> OnlineTeacher:
    return OnlineTeacher(make_teacher(), corpus)


@pytest.fixture
def checkpoints(tmp_path: Path) -> TrainingCheckpoints:
    return TrainingCheckpoints(open_location(str(tmp_path / "checkpoints")))


def weights(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_equal_weights(one: PreTrainedModel, two: PreTrainedModel) -> None:
    for (name, ours), theirs in zip(weights(one).items(), weights(two).values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, msg=name)


def arithmetic(steps: Sequence[StepRecord]) -> list[tuple[float, ...]]:
    """The records without what depends on the clock."""
    return [(s.step, s.tokens, s.loss, s.kl, s.ce, s.lr, s.grad_norm) for s in steps]


def test_the_student_comes_closer_to_its_teacher(corpus: Corpus, teacher: OnlineTeacher) -> None:
    student, heard = make_student(), list[StepRecord]()
    steps = distill(student, teacher, corpus, settings=SETTINGS, on_step=heard.append)
    assert steps == heard
    assert [step.step for step in steps] == list(range(8))
    assert [step.tokens for step in steps] == [2 * LENGTH * (step + 1) for step in range(8)]
    assert sum(step.kl for step in steps[-2:]) < 0.8 * sum(step.kl for step in steps[:2])
    assert not student.training
    assert student.lm_head.weight is student.model.embed_tokens.weight


def test_the_first_step_is_the_definition(corpus: Corpus, teacher: OnlineTeacher) -> None:
    """Loss, terms, gradient norm and update of one step against plain autograd and torch's AdamW."""
    settings = DistillSettings(
        tokens=3 * LENGTH, batch_rows=3, micro_rows=2, learning_rate=0.01, cross_entropy_weight=0.25
    )
    student, plain = make_student(), make_student()
    [step] = distill(student, teacher, corpus, settings=settings)
    ids = corpus.train[:3].long()
    logits = head_of(plain).logits(final_states(plain, ids))[:, :-1].flatten(0, 1)
    log_p = teacher.targets(Part.TRAIN, range(3)).logits().log_softmax(-1)
    log_q = logits.log_softmax(-1)
    kl = torch.nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    ce = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
    (0.75 * kl + 0.25 * ce).backward()
    norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
    optimizer = adamw(plain, 0.1)
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    optimizer.step()
    assert step.kl == pytest.approx(kl.item(), rel=1e-5)
    assert step.ce == pytest.approx(ce.item(), rel=1e-5)
    assert step.loss == pytest.approx(0.75 * kl.item() + 0.25 * ce.item(), rel=1e-5)
    assert step.grad_norm == pytest.approx(norm.item(), rel=1e-4)
    for (name, ours), theirs in zip(weights(student).items(), weights(plain).values(), strict=True):
        # The first Adam step is lr * sign(gradient): where a gradient is all but zero, its sign is rounding.
        assert ((ours - theirs).abs() > 1e-5).float().mean() < 0.01, name


@pytest.mark.parametrize("weight", [None, 0.1, 0.9])
def test_the_weight_of_an_objective_reaches_the_loss(
    corpus: Corpus, teacher: OnlineTeacher, weight: float | None
) -> None:
    settings = DistillSettings(
        tokens=LENGTH, batch_rows=1, objective=Objective.JSD, objective_weight=weight, temperature=2.0
    )
    student = make_student()
    logits = head_of(student).logits(final_states(student, corpus.train[:1].long()))[0, :-1]
    log_q, log_p = ((z / 2).log_softmax(-1) for z in (logits, teacher.targets(Part.TRAIN, [0]).logits()))
    expected = by_definition(Objective.JSD, log_q.double(), log_p.double(), weight or 0.5).mean()
    [step] = distill(student, teacher, corpus, settings=settings)
    assert step.kl == pytest.approx(expected.item(), rel=1e-4)
    assert step.loss == pytest.approx(4 * expected.item(), rel=1e-4)


def test_weight_decay_spares_vectors() -> None:
    student = make_student(family="qwen2")
    decayed = {
        id(p): group["weight_decay"] for group in adamw(student, 0.1).param_groups for p in group["params"]
    }
    for name, parameter in student.named_parameters():
        assert decayed[id(parameter)] == (0.1 if parameter.ndim == 2 else 0.0), name


@pytest.mark.parametrize("objective", Objective)
def test_micro_batches_change_nothing_but_rounding(
    corpus: Corpus, teacher: OnlineTeacher, objective: Objective
) -> None:
    runs = [
        distill(
            make_student(),
            teacher,
            corpus,
            settings=DistillSettings(
                tokens=9 * LENGTH, batch_rows=4, micro_rows=micro, learning_rate=1e-3, objective=objective
            ),
        )
        for micro in (4, 3, 1)
    ]
    for run in runs[1:]:
        for ours, theirs in zip(arithmetic(run), arithmetic(runs[0]), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-3)


def test_stored_signals_teach_like_the_live_teacher(
    corpus: Corpus, teacher: OnlineTeacher, tmp_path: Path
) -> None:
    write_signals(teacher.model, corpus, tmp_path, rows=16, held_out_rows=0)
    stored = StoredTeacher(tmp_path, teacher.head, corpus.identity)
    live, replayed = (
        distill(make_student(), source, corpus, settings=SETTINGS) for source in (teacher, stored)
    )
    assert replayed[-1].kl == pytest.approx(live[-1].kl, rel=0.02)


def test_the_seed_of_the_process_does_not_matter(corpus: Corpus, teacher: OnlineTeacher) -> None:
    students = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        students.append(make_student(attention_dropout=0.5))
        distill(students[-1], teacher, corpus, settings=SETTINGS)
    assert_equal_weights(*students)


def stop_after(calls: int) -> Iterator[bool]:
    yield from [False] * calls
    while True:
        yield True


@pytest.mark.parametrize("calls", [5, 6], ids=["between-steps", "within-a-step"])
def test_resuming_is_bit_identical(
    corpus: Corpus, teacher: OnlineTeacher, checkpoints: TrainingCheckpoints, calls: int
) -> None:
    """With dropout, so that a wrong random state would show; stopped in either micro-batch of step 2."""
    straight, broken = make_student(attention_dropout=0.5), make_student(attention_dropout=0.5)
    whole = distill(straight, teacher, corpus, settings=SETTINGS)
    asked = stop_after(calls)
    with pytest.raises(Interrupted) as caught:
        distill(
            broken,
            teacher,
            corpus,
            settings=SETTINGS,
            checkpoints=checkpoints,
            checkpoint_seconds=1e9,
            should_stop=lambda: next(asked),
        )
    assert caught.value.exit_code == 75
    heard: list[StepRecord] = []
    resumed = make_student(attention_dropout=0.5)
    steps = distill(
        resumed, teacher, corpus, settings=SETTINGS, checkpoints=checkpoints, on_step=heard.append
    )
    assert_equal_weights(straight, resumed)
    assert arithmetic(steps) == arithmetic(whole)
    assert heard == steps[calls // 2 :]
    seconds = [step.seconds for step in steps]
    assert seconds == sorted(seconds)


def test_a_lost_process_goes_on_from_the_last_periodic_checkpoint(
    corpus: Corpus, teacher: OnlineTeacher, checkpoints: TrainingCheckpoints
) -> None:
    straight, resumed = make_student(), make_student()
    distill(straight, teacher, corpus, settings=SETTINGS)

    def die(record: StepRecord) -> None:
        if record.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distill(
            make_student(),
            teacher,
            corpus,
            settings=SETTINGS,
            checkpoints=checkpoints,
            checkpoint_seconds=0,
            on_step=die,
        )
    heard: list[StepRecord] = []
    distill(resumed, teacher, corpus, settings=SETTINGS, checkpoints=checkpoints, on_step=heard.append)
    assert [record.step for record in heard] == [5, 6, 7]
    assert_equal_weights(straight, resumed)


def test_a_run_lost_after_its_last_step_has_nothing_to_train_again(
    corpus: Corpus, teacher: OnlineTeacher, checkpoints: TrainingCheckpoints
) -> None:
    trained, resumed = make_student(), make_student()
    steps = distill(
        trained, teacher, corpus, settings=SETTINGS, checkpoints=checkpoints, checkpoint_seconds=0
    )
    heard: list[StepRecord] = []
    assert steps == distill(
        resumed, teacher, corpus, settings=SETTINGS, checkpoints=checkpoints, on_step=heard.append
    )
    assert heard == []
    assert_equal_weights(trained, resumed)


def test_frozen_weights_are_neither_stored_nor_missed(
    corpus: Corpus, teacher: OnlineTeacher, checkpoints: TrainingCheckpoints, tmp_path: Path
) -> None:
    """As where LoRA trains what it adds and nothing else."""

    def part_of_a_student() -> PreTrainedModel:
        student = make_student()
        student.requires_grad_(False)
        student.model.layers[1].requires_grad_(True)
        return student

    whole, resumed = part_of_a_student(), part_of_a_student()
    distill(whole, teacher, corpus, settings=SETTINGS)
    asked = stop_after(7)
    with pytest.raises(Interrupted):
        distill(
            part_of_a_student(),
            teacher,
            corpus,
            settings=SETTINGS,
            checkpoints=checkpoints,
            should_stop=lambda: next(asked),
        )
    found = checkpoints.latest(tmp_path)
    assert found
    assert not any("embed_tokens" in name for name in found[1])
    distill(resumed, teacher, corpus, settings=SETTINGS, checkpoints=checkpoints)
    assert_equal_weights(whole, resumed)


def test_a_stop_without_a_new_step_saves_nothing(
    corpus: Corpus,
    teacher: OnlineTeacher,
    checkpoints: TrainingCheckpoints,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Asked in step 2, right after it was saved; then at once after resuming."""
    saved: list[int] = []
    monkeypatch.setattr(checkpoints, "save", lambda step, *rest: saved.append(step) or save(step, *rest))
    save = TrainingCheckpoints.save.__get__(checkpoints)
    for calls in (4, 0):
        asked = stop_after(calls)
        with pytest.raises(Interrupted):
            distill(
                make_student(),
                teacher,
                corpus,
                settings=SETTINGS,
                checkpoints=checkpoints,
                checkpoint_seconds=0,
                should_stop=lambda asked=asked: next(asked),
            )
    assert saved == [1, 2]


def test_a_state_from_a_gpu_is_resumed_without_one(
    corpus: Corpus, teacher: OnlineTeacher, checkpoints: TrainingCheckpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    distill(make_student(), teacher, corpus, settings=SETTINGS, checkpoints=checkpoints, checkpoint_seconds=0)
    found = checkpoints.latest(Path(checkpoints.location.uri).parent)
    assert found is not None
    tensors = {**found[1], "random.cuda": torch.zeros(16, dtype=torch.uint8)}
    monkeypatch.setattr(checkpoints, "latest", lambda cache: (found[0], tensors))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda *_: 1 / 0)
    assert len(distill(make_student(), teacher, corpus, settings=SETTINGS, checkpoints=checkpoints)) == 8


def test_a_stop_before_the_first_step_stores_nothing(
    corpus: Corpus, teacher: OnlineTeacher, checkpoints: TrainingCheckpoints, tmp_path: Path
) -> None:
    with pytest.raises(Interrupted):
        distill(
            make_student(),
            teacher,
            corpus,
            settings=SETTINGS,
            checkpoints=checkpoints,
            should_stop=lambda: True,
        )
    assert checkpoints.latest(tmp_path) is None


def test_legs_of_a_training_end_at_the_bits_of_the_whole(
    corpus: Corpus, teacher: OnlineTeacher, tmp_path: Path
) -> None:
    whole = make_student()
    undisturbed = distill(whole, teacher, corpus, settings=SETTINGS)
    states = [TrainingCheckpoints(open_location(str(tmp_path / name))) for name in ("first", "second")]
    legs = [Leg(0.25, end=states[0]), Leg(0.5, states[0], states[1]), Leg(start=states[1])]
    for leg, steps in zip(legs, (2, 4, 8), strict=True):
        # A process of its own: nothing but the state carries over.
        student = make_student()
        records = distill(student, teacher, corpus, settings=SETTINGS, leg=leg)
        assert len(records) == steps
    assert_equal_weights(student, whole)
    assert arithmetic(records) == arithmetic(undisturbed)


def test_an_own_checkpoint_comes_before_the_state_that_a_leg_starts_from(
    corpus: Corpus, teacher: OnlineTeacher, tmp_path: Path, checkpoints: TrainingCheckpoints
) -> None:
    start = TrainingCheckpoints(open_location(str(tmp_path / "start")))
    distill(make_student(), teacher, corpus, settings=SETTINGS, leg=Leg(0.25, end=start))
    later = iter([False] * 5 + [True])
    with pytest.raises(Interrupted):
        distill(
            make_student(),
            teacher,
            corpus,
            settings=SETTINGS,
            leg=Leg(start=start),
            checkpoints=checkpoints,
            should_stop=lambda: next(later),
        )
    heard = list[StepRecord]()
    distill(
        make_student(),
        teacher,
        corpus,
        settings=SETTINGS,
        leg=Leg(start=start),
        checkpoints=checkpoints,
        on_step=heard.append,
    )
    # Two steps in the first leg, two whole ones before the stop.
    assert [record.step for record in heard] == [4, 5, 6, 7]


def test_a_checkpoint_of_other_settings_is_left_alone(
    corpus: Corpus, teacher: OnlineTeacher, checkpoints: TrainingCheckpoints
) -> None:
    distill(make_student(), teacher, corpus, settings=SETTINGS, checkpoints=checkpoints, checkpoint_seconds=0)
    other = DistillSettings(tokens=16 * LENGTH, batch_rows=4, micro_rows=1, learning_rate=0.01)
    fresh, unaware = make_student(), make_student()
    steps = distill(fresh, teacher, corpus, settings=other, checkpoints=checkpoints)
    distill(unaware, teacher, corpus, settings=other)
    assert len(steps) == 4
    assert_equal_weights(fresh, unaware)


def test_a_non_finite_loss_names_step_and_rows_and_keeps_the_checkpoint(
    corpus: Corpus, checkpoints: TrainingCheckpoints, tmp_path: Path
) -> None:
    class Spoiled(OnlineTeacher):
        def states(self, part: Part, rows: Sequence[int]) -> Tensor:
            states = super().states(part, rows)
            return states * torch.nan if 7 in rows else states

    student = make_student()
    with pytest.raises(CascadeError, match="loss of step 3 is not finite") as caught:
        distill(
            student,
            Spoiled(make_teacher(), corpus),
            corpus,
            settings=SETTINGS,
            checkpoints=checkpoints,
            checkpoint_seconds=0,
        )
    assert "training rows 6, 7" in str(caught.value)
    assert all(torch.isfinite(parameter).all() for parameter in student.parameters())
    found = checkpoints.latest(tmp_path)
    assert found is not None
    # Not the state after step 2, which no loss has shown to be good.
    assert len(found[0]["steps"]) == 2


def test_a_loss_that_jumps_stops_the_run_before_the_weights_change(
    corpus: Corpus, checkpoints: TrainingCheckpoints, tmp_path: Path
) -> None:
    class Spoiled(OnlineTeacher):
        """Wrong about two rows of step 9: its loss is finite, and far from the others'."""

        def states(self, part: Part, rows: Sequence[int]) -> Tensor:
            states = super().states(part, rows)
            return states * -20 if 18 in rows else states

    settings = DistillSettings(tokens=24 * LENGTH, batch_rows=2, micro_rows=1, learning_rate=1e-3)
    student, undisturbed = make_student(), make_student()
    with pytest.raises(CascadeError, match="divergence of step 9 jumps") as caught:
        distill(
            student,
            Spoiled(make_teacher(), corpus),
            corpus,
            settings=settings,
            checkpoints=checkpoints,
            checkpoint_seconds=0,
        )
    assert "training rows 18, 19" in str(caught.value)
    distill(undisturbed, OnlineTeacher(make_teacher(), corpus), corpus, settings=settings, leg=Leg(9 / 12))
    assert_equal_weights(student, undisturbed)
    found = checkpoints.latest(tmp_path)
    assert found is not None
    # Not the state after step 8: the loss that would have shown it to be good is the one that jumped.
    assert len(found[0]["steps"]) == 8


def read_steps(path: Path) -> list[StepRecord]:
    return [StepRecord(**json.loads(line)) for line in path.read_text("utf-8").splitlines()]


def test_the_step_file_grows_with_the_training_and_has_every_step_once_after_a_crash(
    corpus: Corpus, teacher: OnlineTeacher, checkpoints: TrainingCheckpoints, tmp_path: Path
) -> None:
    path, seen = tmp_path / "steps.jsonl", list[int]()

    def die(record: StepRecord) -> None:
        seen.append(len(read_steps(path)))
        if record.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distill(
            make_student(),
            teacher,
            corpus,
            settings=SETTINGS,
            checkpoints=checkpoints,
            checkpoint_seconds=0,
            on_step=die,
            step_file=path,
        )
    assert seen == [1, 2, 3, 4, 5, 6]
    assert [step.step for step in read_steps(path)] == list(range(6))
    steps = distill(
        make_student(), teacher, corpus, settings=SETTINGS, checkpoints=checkpoints, step_file=path
    )
    assert read_steps(path) == steps
    assert [step.step for step in steps] == list(range(8))


def test_the_weight_of_the_cross_entropy_follows_its_schedule(corpus: Corpus, teacher: OnlineTeacher) -> None:
    settings = replace(
        SETTINGS, cross_entropy_weight=0.7, cross_entropy_schedule=WeightSchedule.LINEAR, temperature=2.0
    )
    steps = distill(make_student(), teacher, corpus, settings=settings)
    assert [step.cross_entropy_weight for step in steps] == pytest.approx([0.1 * n for n in range(8)])
    for step in steps:
        weight = step.cross_entropy_weight
        assert step.loss == pytest.approx((1 - weight) * 4 * step.kl + weight * step.ce, rel=1e-5)


def test_a_step_counts_the_seconds_that_its_teacher_waited(corpus: Corpus) -> None:
    class Waiting(OnlineTeacher):
        waited = 5.0

        def targets(self, part: Part, rows: Sequence[int]) -> StateTargets:
            self.waited += 0.25
            return super().targets(part, rows)

    steps = distill(make_student(), Waiting(make_teacher(), corpus), corpus, settings=SETTINGS)
    # Two micro-batches a step; what the checks before the training waited is not counted.
    assert [step.waited for step in steps] == [0.5] * 8


@pytest.mark.parametrize("end_of_text", [None, 256], ids=["one-text", "documents"])
def test_gradient_checkpointing_changes_nothing(corpus: Corpus, end_of_text: int | None) -> None:
    """With dropout, whose draws have to be made again; the layers run once more for every backward pass."""
    corpus = replace(corpus, end_of_text=end_of_text)
    corpus.train[:, 5] = 256
    teacher = OnlineTeacher(make_teacher(), corpus)
    plain, saving = make_student(attention_dropout=0.5), make_student(attention_dropout=0.5)
    passes = {id(plain): 0, id(saving): 0}
    for student in (plain, saving):

        def count(*_: object, key: int = id(student)) -> None:
            passes[key] += 1

        student.model.layers[0].mlp.register_forward_pre_hook(count)
    whole = distill(plain, teacher, corpus, settings=SETTINGS)
    steps = distill(saving, teacher, corpus, settings=SETTINGS, gradient_checkpointing=True)
    assert arithmetic(steps) == arithmetic(whole)
    assert_equal_weights(plain, saving)
    assert not any(getattr(part, "gradient_checkpointing", False) for part in saving.modules())
    assert passes[id(saving)] == passes[id(plain)] + 16


def test_records_are_json(corpus: Corpus, teacher: OnlineTeacher) -> None:
    [step] = distill(
        make_student(), teacher, corpus, settings=DistillSettings(tokens=LENGTH, learning_rate=1e-3)
    )
    assert StepRecord(**json.loads(json.dumps(vars(step)))) == step
    assert step.tokens_per_second == pytest.approx(LENGTH / step.seconds)
    # A process that has loaded torch is larger than 50 MB.
    assert step.memory > 50e6
    assert step.waited == 0
