"""The loop learns what its settings say, and does not care how a batch is split."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cascade.data.corpus import Corpus
from cascade.distillation.loop import distill
from cascade.distillation.objectives import Objective
from cascade.distillation.schedules import WeightSchedule
from cascade.distillation.settings import DistillSettings
from cascade.distillation.signals import OnlineTeacher, Part, StoredTeacher, write_signals
from cascade.distillation.states import final_states, head_of
from cascade.distillation.steps import adamw
from cascade.distillation.training_state import StepRecord
from tests.numerics.divergences import by_definition
from tests.unit.distillation.teaching import (
    LENGTH,
    SETTINGS,
    arithmetic,
    assert_equal_weights,
    make_student,
    make_teacher,
    weights,
)


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


def test_the_weight_of_the_cross_entropy_follows_its_schedule(corpus: Corpus, teacher: OnlineTeacher) -> None:
    settings = replace(
        SETTINGS, cross_entropy_weight=0.7, cross_entropy_schedule=WeightSchedule.LINEAR, temperature=2.0
    )
    steps = distill(make_student(), teacher, corpus, settings=settings)
    assert [step.cross_entropy_weight for step in steps] == pytest.approx([0.1 * n for n in range(8)])
    for step in steps:
        weight = step.cross_entropy_weight
        assert step.loss == pytest.approx((1 - weight) * 4 * step.kl + weight * step.ce, rel=1e-5)


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
