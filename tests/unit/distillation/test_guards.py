"""Each guard lets a healthy chain pass and stops the one fault it is there for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from cascade.distillation import objectives
from cascade.distillation.guards import check_before_training
from cascade.distillation.objectives import Objective
from cascade.distillation.schedules import WeightSchedule
from cascade.distillation.settings import DistillSettings, Plan
from cascade.distillation.signals import OnlineTeacher, Part
from cascade.errors import CascadeError, InputError
from cascade.report import Silent
from tests.unit.distillation.teaching import LENGTH, make_rows, make_student, make_teacher


def make_plan(objective: Objective = Objective.FORWARD_KL, length: int = LENGTH) -> Plan:
    return DistillSettings(tokens=64, objective=objective, temperature=2.0).resolved(32, length)


@pytest.mark.parametrize("objective", Objective)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_healthy_chain_passes_and_leaves_no_trace(objective: Objective, family: str) -> None:
    student = make_student(family=family)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    check_before_training(
        student, OnlineTeacher(make_teacher(), make_rows()), make_rows(), make_plan(objective)
    )
    assert all(parameter.grad is None for parameter in student.parameters())
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_a_student_equal_to_its_teacher_passes() -> None:
    check_before_training(
        make_teacher(), OnlineTeacher(make_teacher(), make_rows()), make_rows(), make_plan()
    )


def test_an_objective_that_is_a_cross_entropy_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The classic fault: off by the teacher's entropy, with the right gradient."""

    def cross_entropy(log_student: Tensor, log_teacher: Tensor) -> tuple[Tensor, Tensor]:
        return -(log_teacher.exp() * log_student).sum(-1), log_student.exp() - log_teacher.exp()

    monkeypatch.setitem(objectives.DIVERGENCES, Objective.FORWARD_KL, cross_entropy)
    with pytest.raises(CascadeError, match="its own student"):
        check_before_training(
            make_student(), OnlineTeacher(make_teacher(), make_rows()), make_rows(), make_plan()
        )


def test_a_parameter_without_a_gradient_is_named() -> None:
    student = make_student()
    with torch.no_grad():
        student.model.layers[1].mlp.up_proj.weight.zero_()
    with pytest.raises(CascadeError, match="no finite gradient") as caught:
        check_before_training(student, OnlineTeacher(make_teacher(), make_rows()), make_rows(), make_plan())
    assert "model.layers.1.mlp" in str(caught.value)


@pytest.mark.parametrize(
    ("weight", "schedule", "terms"),
    [
        (0.0, WeightSchedule.CONSTANT, ["divergence"]),
        (0.3, WeightSchedule.CONSTANT, ["divergence", "cross-entropy"]),
        (1.0, WeightSchedule.CONSTANT, ["cross-entropy"]),
        (1.0, WeightSchedule.LINEAR, ["divergence", "cross-entropy"]),
    ],
)
def test_the_terms_that_a_training_uses_are_measured(
    weight: float, schedule: WeightSchedule, terms: list[str]
) -> None:
    class Lines(Silent):
        line = ""

        def log(self, message: str) -> None:
            self.line = message

    corpus, student, report = make_rows(), make_student(), Lines()
    teacher = OnlineTeacher(make_teacher(), corpus)
    settings = DistillSettings(
        tokens=64, batch_rows=1, cross_entropy_weight=weight, cross_entropy_schedule=schedule
    )
    sizes = check_before_training(student, teacher, corpus, settings.resolved(32, LENGTH), report)
    log_q = student(input_ids=corpus.train[:1].long()).logits[0, :-1].log_softmax(-1)
    log_p = teacher.targets(Part.TRAIN, [0]).logits().log_softmax(-1)
    expected = {
        "divergence": functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True).item(),
        "cross-entropy": functional.nll_loss(log_q, corpus.train[0, 1:].long()).item(),
    }
    assert sizes == {name: pytest.approx(expected[name], rel=1e-5) for name in terms}
    assert all(f"{name} {sizes[name]:.3f}" in report.line for name in terms)


def test_a_term_without_a_gradient_is_found_behind_one_that_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """A divergence whose student is detached: the total still has the cross-entropy's gradient."""

    def detached(log_student: Tensor, log_teacher: Tensor) -> tuple[Tensor, Tensor]:
        value = (log_teacher.exp() * (log_teacher - log_student)).sum(-1)
        return value, torch.zeros_like(log_student)

    monkeypatch.setitem(objectives.DIVERGENCES, Objective.FORWARD_KL, detached)
    plan = DistillSettings(tokens=64, cross_entropy_weight=0.5).resolved(32, LENGTH)
    with pytest.raises(CascadeError, match="the divergence gives parameters no finite gradient"):
        check_before_training(make_student(), OnlineTeacher(make_teacher(), make_rows()), make_rows(), plan)


def test_a_row_of_several_documents_passes() -> None:
    corpus = replace(make_rows(), end_of_text=256)
    corpus.train[0, [3, 4, 11]] = 256
    check_before_training(make_student(), OnlineTeacher(make_teacher(), corpus), corpus, make_plan())


def test_a_teacher_whose_states_are_not_finite_is_caught() -> None:
    class Broken(OnlineTeacher):
        def states(self, part: Part, rows: Sequence[int]) -> Tensor:
            return super().states(part, rows) * torch.nan

    with pytest.raises(CascadeError, match="its own student"):
        check_before_training(make_student(), Broken(make_teacher(), make_rows()), make_rows(), make_plan())


def test_another_vocabulary_is_refused() -> None:
    student = make_student(vocab_size=2000)
    with pytest.raises(InputError, match="different vocabularies"):
        check_before_training(student, OnlineTeacher(make_teacher(), make_rows()), make_rows(), make_plan())


def test_rows_of_one_token_are_refused() -> None:
    corpus = make_rows(length=1)
    with pytest.raises(InputError, match="two tokens"):
        check_before_training(
            make_student(), OnlineTeacher(make_teacher(), corpus), corpus, make_plan(length=1)
        )
