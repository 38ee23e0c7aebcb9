"""What is recorded of every step, and its file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from cascade.data.corpus import Corpus
from cascade.distillation.loop import distill
from cascade.distillation.settings import DistillSettings
from cascade.distillation.signals import OnlineTeacher, Part
from cascade.distillation.targets import StateTargets
from cascade.distillation.training_state import StepRecord
from cascade.storage.checkpoints import TrainingCheckpoints
from tests.unit.distillation.teaching import LENGTH, SETTINGS, make_student, make_teacher, train_until_lost

pytestmark = pytest.mark.usefixtures("stored_at_once")


def read_steps(path: Path) -> list[StepRecord]:
    return [StepRecord(**json.loads(line)) for line in path.read_text("utf-8").splitlines()]


def test_the_step_file_grows_with_the_training_and_has_every_step_once_after_a_crash(
    corpus: Corpus, teacher: OnlineTeacher, checkpoints: TrainingCheckpoints, tmp_path: Path
) -> None:
    path, seen = tmp_path / "steps.jsonl", list[int]()
    train_until_lost(teacher, corpus, checkpoints, lambda step: seen.append(len(read_steps(path))), path)
    assert seen == [1, 2, 3, 4, 5, 6]
    assert [step.step for step in read_steps(path)] == list(range(6))
    steps = distill(
        make_student(), teacher, corpus, settings=SETTINGS, checkpoints=checkpoints, step_file=path
    )
    assert read_steps(path) == steps
    assert [step.step for step in steps] == list(range(8))


def test_a_step_counts_the_seconds_that_its_teacher_waited(corpus: Corpus) -> None:
    class Waiting(OnlineTeacher):
        waited = 5.0

        def targets(self, part: Part, rows: Sequence[int]) -> StateTargets:
            self.waited += 0.25
            return super().targets(part, rows)

    steps = distill(make_student(), Waiting(make_teacher(), corpus), corpus, settings=SETTINGS)
    # Two micro-batches a step; what the checks before the training waited is not counted.
    assert [step.waited for step in steps] == [0.5] * 8


def test_records_are_json(corpus: Corpus, teacher: OnlineTeacher) -> None:
    [step] = distill(
        make_student(), teacher, corpus, settings=DistillSettings(tokens=LENGTH, learning_rate=1e-3)
    )
    assert StepRecord(**json.loads(json.dumps(vars(step)))) == step
    assert step.tokens_per_second == pytest.approx(LENGTH / step.seconds)
    # A process that has loaded torch is larger than 50 MB.
    assert step.memory > 50e6
    assert step.waited == 0
