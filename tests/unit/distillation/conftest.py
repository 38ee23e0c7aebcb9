"""What every test of a training starts with."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor

from cascade.data.corpus import Corpus
from cascade.distillation.keeper import Keeper
from cascade.distillation.signals import OnlineTeacher
from cascade.storage.checkpoints import TrainingCheckpoints
from cascade.storage.locations import open_location
from tests.unit.distillation.teaching import make_rows, make_teacher


@pytest.fixture
def corpus() -> Corpus:
    return make_rows()


@pytest.fixture
def teacher(corpus: Corpus) -> OnlineTeacher:
    return OnlineTeacher(make_teacher(), corpus)


@pytest.fixture
def checkpoints(tmp_path: Path) -> TrainingCheckpoints:
    return TrainingCheckpoints(open_location(str(tmp_path / "checkpoints")))


@pytest.fixture
def stored_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every state that is due is stored before the next step; what happens otherwise: test_keeper.py."""
    save = Keeper.save_when_due

    def wait(keeper: Keeper, random: dict[str, Tensor]) -> None:
        save(keeper, random)
        keeper._wait()

    monkeypatch.setattr(Keeper, "save_when_due", wait)
