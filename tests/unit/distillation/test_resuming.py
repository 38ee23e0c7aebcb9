"""A training that was stopped, lost or split into legs goes on bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from cascade.data.corpus import Corpus
from cascade.distillation.loop import Leg, distill
from cascade.distillation.settings import DistillSettings
from cascade.distillation.signals import OnlineTeacher
from cascade.distillation.training_state import StepRecord
from cascade.errors import Interrupted
from cascade.storage.checkpoints import TrainingCheckpoints
from cascade.storage.locations import open_location
from tests.unit.distillation.teaching import (
    LENGTH,
    SETTINGS,
    arithmetic,
    assert_equal_weights,
    make_student,
    stop_after,
    train_until_lost,
)

pytestmark = pytest.mark.usefixtures("stored_at_once")


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
    train_until_lost(teacher, corpus, checkpoints)
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
