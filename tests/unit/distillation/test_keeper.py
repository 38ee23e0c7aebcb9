"""Snapshots while the training goes on: what is stored, what waits for it, and what a failing store costs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cascade.data.corpus import Corpus
from cascade.distillation import keeper
from cascade.distillation.loop import distill
from cascade.distillation.settings import DistillSettings
from cascade.distillation.signals import OnlineTeacher
from cascade.distillation.training_state import StepRecord
from cascade.errors import CascadeError, Interrupted, StorageFault
from cascade.storage.checkpoints import TrainingCheckpoints
from cascade.storage.locations import open_location
from tests.reports import Recorder
from tests.unit.distillation.teaching import LENGTH, make_rows, make_student, make_teacher

STEPS = 12
SETTINGS = DistillSettings(STEPS * 2 * LENGTH, seed=3, learning_rate=1e-3, batch_rows=2)
PATIENCE = 120.0


class Slow(TrainingCheckpoints):
    """A store that begins to store a state, and ends when it is let; or fails."""

    def __init__(self, folder: Path, errors: dict[int, Exception] | None = None) -> None:
        super().__init__(open_location(str(folder)))
        self.begun, self.ended, self.errors = [], [], errors or {}
        self.let = threading.Event()

    def save(self, step: int, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
        self.begun.append(step)
        assert self.let.wait(PATIENCE)
        if len(self.begun) in self.errors:
            raise self.errors[len(self.begun)]
        super().save(step, tensors, record)
        self.ended.append(step)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return make_rows()


@pytest.fixture(scope="module")
def teacher(corpus: Corpus) -> OnlineTeacher:
    return OnlineTeacher(make_teacher(), corpus)


@pytest.fixture
def train(corpus: Corpus, teacher: OnlineTeacher) -> Callable[..., dict[str, Tensor]]:
    """The weights after a training with these options."""

    def run(**options: Any) -> dict[str, Tensor]:
        student = make_student()
        distill(student, teacher, corpus, settings=SETTINGS, **options)
        return dict(student.state_dict())

    return run


Train = Callable[..., dict[str, Tensor]]


def assert_equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name


def test_the_training_goes_on_while_a_state_is_stored_and_the_state_stays_what_it_was(
    train: Train, tmp_path: Path
) -> None:
    slow, during = Slow(tmp_path), []

    def on_step(record: StepRecord) -> None:
        if slow.begun and not slow.ended:
            during.append(record.step)
        if record.step == STEPS - 1:
            slow.let.set()

    straight = train()
    assert_equal(straight, train(checkpoints=slow, checkpoint_seconds=0, on_step=on_step))
    # Nothing else was begun meanwhile, and the end waits for the last.
    assert during == list(range(1, STEPS))
    assert slow.begun == slow.ended == [1, STEPS]
    (slow.location / f"step-{STEPS:08d}").delete_tree()
    heard: list[StepRecord] = []
    assert_equal(straight, train(checkpoints=slow, on_step=heard.append))
    assert [record.step for record in heard] == list(range(1, STEPS))


def test_a_stop_waits_for_the_state_in_hand_and_stores_the_newest(train: Train, tmp_path: Path) -> None:
    slow, asked = Slow(tmp_path), threading.Event()

    def on_step(record: StepRecord) -> None:
        if record.step == 4:
            asked.set()
            slow.let.set()

    with pytest.raises(Interrupted):
        train(checkpoints=slow, checkpoint_seconds=0, on_step=on_step, should_stop=asked.is_set)
    assert slow.ended == [1, 5]
    assert_equal(train(), train(checkpoints=slow))


def test_an_error_of_the_training_loses_no_state_in_hand(train: Train, tmp_path: Path) -> None:
    slow = Slow(tmp_path)

    def on_step(record: StepRecord) -> None:
        if record.step == 4:
            slow.let.set()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(checkpoints=slow, checkpoint_seconds=0, on_step=on_step)
    assert slow.ended == [1]
    assert slow.location.children() == ["step-00000001"]


def failure() -> StorageFault:
    return StorageFault("the store failed", where="here", remedy="none")


def test_a_store_that_fails_is_reported_and_tried_again(train: Train, tmp_path: Path) -> None:
    slow, report = Slow(tmp_path, {1: failure()}), Recorder()
    slow.let.set()
    weights = train(checkpoints=slow, checkpoint_seconds=0, report=report)
    assert_equal(train(), weights)
    assert slow.begun[0] == 1
    assert slow.ended[0] > 1
    (warning,) = [line for line in report.lines if "the store failed" in line]
    assert warning.startswith("warning: the snapshot after step 1 could not be stored")
    # What was not stored is not taken for stored.
    assert slow.ended[-1] == STEPS


def test_a_store_that_fails_to_the_end_costs_only_the_snapshots(train: Train, tmp_path: Path) -> None:
    slow = Slow(tmp_path, dict.fromkeys(range(1, STEPS + 2), failure()))
    slow.let.set()
    assert_equal(train(), train(checkpoints=slow, checkpoint_seconds=0))
    assert slow.ended == []


@pytest.mark.parametrize(
    "error", [CascadeError("the disk is full", where="here", remedy="none"), ZeroDivisionError("of a thread")]
)
def test_what_no_retry_heals_is_raised(train: Train, tmp_path: Path, error: Exception) -> None:
    slow = Slow(tmp_path, {1: error})
    slow.let.set()
    with pytest.raises(type(error)):
        train(checkpoints=slow, checkpoint_seconds=0)
    assert slow.begun == [1]


def test_states_are_stored_at_the_interval(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored_at_once: None
) -> None:
    """A step takes ten seconds of a clock of our own."""
    slow, now = Slow(tmp_path), [0.0]
    slow.let.set()
    monkeypatch.setattr(keeper, "monotonic", lambda: now[0])

    def on_step(record: StepRecord) -> None:
        now[0] += 10

    train(checkpoints=slow, checkpoint_seconds=30, on_step=on_step)
    assert slow.begun == [3, 6, 9, 12]


def test_a_stop_says_that_its_state_could_not_be_stored(train: Train, tmp_path: Path) -> None:
    slow = Slow(tmp_path, {1: failure()})
    slow.let.set()
    calls = iter(range(100))
    with pytest.raises(StorageFault):
        train(checkpoints=slow, checkpoint_seconds=3600, should_stop=lambda: next(calls) > 6)
