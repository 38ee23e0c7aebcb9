"""A tiny teacher, student and corpus, for every test of the step; and what two trainings are compared by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from cascade.data.corpus import Corpus
from cascade.distillation.loop import distill
from cascade.distillation.settings import DistillSettings
from cascade.distillation.signals import Teacher
from cascade.distillation.training_state import StepRecord
from cascade.storage.checkpoints import TrainingCheckpoints
from tests.tiny import make_model

LENGTH = 16
SETTINGS = DistillSettings(tokens=16 * LENGTH, batch_rows=2, micro_rows=1, learning_rate=0.01)


def make_rows(train: int = 24, held_out: int = 3, length: int = LENGTH, seed: int = 0) -> Corpus:
    """Rows of bytes with structure to learn: each is a random walk with small steps."""
    draw = torch.Generator().manual_seed(seed)
    steps = torch.randint(1, 4, (train + held_out, length), generator=draw)
    rows = (torch.randint(256, (train + held_out, 1), generator=draw) + steps.cumsum(1)) % 256
    return Corpus(rows[:train].int(), rows[train:].int(), identity=f"walk-{seed}-{length}", seed=seed)


def make_teacher() -> PreTrainedModel:
    """Wider than the student, with the same vocabulary."""
    return make_model(seed=1, num_hidden_layers=2, hidden_size=48)


def make_student(seed: int = 2, **overrides: object) -> PreTrainedModel:
    """Two layers, tied, with gains and biases away from their constants."""
    return make_model(seed=seed, **{"num_hidden_layers": 2, "hidden_size": 32, **overrides})


def weights(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_equal_weights(one: PreTrainedModel, two: PreTrainedModel) -> None:
    for (name, ours), theirs in zip(weights(one).items(), weights(two).values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, msg=name)


def arithmetic(steps: Sequence[StepRecord]) -> list[tuple[float, ...]]:
    """The records without what depends on the clock."""
    return [(s.step, s.tokens, s.loss, s.kl, s.ce, s.lr, s.grad_norm) for s in steps]


def stop_after(calls: int) -> Iterator[bool]:
    yield from [False] * calls
    while True:
        yield True


def train_until_lost(
    teacher: Teacher,
    corpus: Corpus,
    checkpoints: TrainingCheckpoints,
    on_step: Callable[[StepRecord], object] = lambda record: None,
    step_file: Path | None = None,
) -> None:
    """A training whose process is lost after step 5, when every state before was due to be stored."""

    def die(record: StepRecord) -> None:
        on_step(record)
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
            step_file=step_file,
        )
