"""A loss that is not finite or that jumps stops a training before it reaches the weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cascade.data.corpus import Corpus
from cascade.distillation.loop import Leg, distill
from cascade.distillation.settings import DistillSettings
from cascade.distillation.signals import OnlineTeacher, Part
from cascade.errors import CascadeError
from cascade.storage.checkpoints import TrainingCheckpoints
from tests.unit.distillation.teaching import (
    LENGTH,
    SETTINGS,
    assert_equal_weights,
    make_student,
    make_teacher,
)

pytestmark = pytest.mark.usefixtures("stored_at_once")


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
