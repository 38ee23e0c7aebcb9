"""Checks of the whole chain before a long run, in seconds: what is wrong shows on a few tokens."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial

import torch
from transformers import PreTrainedModel

from cascade.data.corpus import Corpus
from cascade.distillation.batches import Batch, batch_of
from cascade.distillation.fused import IGNORED, Terms, fused_distillation_loss
from cascade.distillation.intermediate import Intermediate, inside, loss_of, parts_of
from cascade.distillation.settings import Plan
from cascade.distillation.signals import Part, Teacher
from cascade.distillation.states import all_states, check_head, device_of, final_states, head_of
from cascade.distillation.targets import StateTargets, Targets
from cascade.errors import CascadeError, InputError
from cascade.models.documents import check_documents_apart
from cascade.report import SILENT, Report

GUARD_TOKENS = 32
ZERO = 1e-6
"""Nats per token. The two sides run the same operations on the same numbers, so only an objective's
own rounding remains."""


def check_before_training(
    student: PreTrainedModel,
    teacher: Teacher,
    corpus: Corpus,
    plan: Plan,
    report: Report = SILENT,
    inner: Intermediate | None = None,
) -> dict[str, float]:
    """The head is what it is taken for, the teacher agrees with itself, every term teaches every parameter.

    Returns the terms that the training uses, in nats per target before its first step, and logs them.
    Raises InputError for a student or data that cannot be trained, CascadeError for a broken chain.
    """
    if corpus.sequence_length < 2:
        raise InputError(
            "a row needs at least two tokens to hold a prediction",
            value=corpus.sequence_length,
            where="corpus.sequence_length",
            remedy="raise it to 8 or more",
        )
    batch = batch_of(corpus, Part.TRAIN, [corpus.row(0)], device_of(student)).beginning(GUARD_TOKENS)
    check_head(student, batch.ids[0])
    check_documents_apart(student, corpus)
    targets = teacher.targets(Part.TRAIN, [corpus.row(0)])[: len(batch.labels)]
    loss = partial(
        fused_distillation_loss,
        labels=batch.labels,
        objective=plan.settings.objective,
        objective_weight=plan.settings.objective_weight,
        temperature=plan.settings.temperature,
    )
    if isinstance(targets, StateTargets):
        itself = loss(targets.states, targets.head, targets).kl.item()
        _require_agreement(itself, plan.settings.objective.value)
    sizes = _terms(student, batch, targets, plan, loss)
    if inner:
        count = max(1, int((batch.labels != IGNORED).sum()))
        itself = inner.itself(inside(targets), batch).item() / count
        _require_agreement(itself, f"hidden_states: {plan.settings.hidden_states}")
        sizes["hidden states"] = _hidden_states(student, batch, targets, inner) / count
    figures = ", ".join(f"{name} {size:.3f}" for name, size in sizes.items())
    report.log(f"terms of the loss before the first step, in nats: {figures}")
    return sizes


def _require_agreement(itself: float, term: str) -> None:
    """Raises CascadeError when the teacher has a loss, in nats, as its own student."""
    if not abs(itself) <= ZERO:
        raise CascadeError(
            "the teacher as its own student has a loss",
            value=f"{itself:.3g} nats",
            where=term,
            remedy="check the parent's weights for values that are not finite, or choose another objective",
        )


def _terms(
    student: PreTrainedModel, batch: Batch, targets: Targets, plan: Plan, loss: Callable[..., Terms]
) -> dict[str, float]:
    """Each term that has a weight in some step, alone: its size, and gradients for all that is trained."""
    weights = [plan.cross_entropy_weight(step) for step in range(plan.steps)]
    terms = {"divergence": 0.0} if min(weights) < 1 else {}
    terms |= {"cross-entropy": 1.0} if max(weights) > 0 else {}
    # The teacher's answers are moved by one token, so that even a student equal to it must learn.
    moved = targets[torch.arange(len(targets)).roll(1)]
    sizes = {}
    for name, weight in terms.items():
        states_ND = final_states(student, batch.ids, batch.positions)[0, :-1]
        found = loss(states_ND, head_of(student), moved, cross_entropy_weight=weight)
        found.loss.backward()
        _require_gradients(student, name)
        student.zero_grad(set_to_none=True)
        true = loss(states_ND.detach(), head_of(student).detach(), targets)
        sizes[name] = (true.ce if weight else true.kl).item()
    return sizes


def _hidden_states(student: PreTrainedModel, batch: Batch, targets: Targets, inner: Intermediate) -> float:
    """The sum of this term, after each part was seen to teach all that it depends on."""
    _, seen = all_states(student, batch.ids, inner.places, batch.positions)
    moved = targets[torch.arange(len(targets)).roll(1)]
    for part, names in zip(parts_of(inner, seen, moved, batch), inner.reached(student), strict=True):
        part.backward(retain_graph=True)
        _require_gradients(student, "hidden-state loss", names)
        student.zero_grad(set_to_none=True)
    for projection in inner.projections:
        projection.grad = None
    return loss_of(inner, tuple(one.detach() for one in seen), targets, batch).item()


def _require_gradients(student: PreTrainedModel, term: str, names: Collection[str] | None = None) -> None:
    """Raises CascadeError naming those parameters, of all or of `names`, that a term does not reach."""
    unreached = [
        name
        for name, parameter in student.named_parameters()
        if parameter.requires_grad
        and (names is None or name in names)
        and (parameter.grad is None or not torch.isfinite(parameter.grad).all() or not parameter.grad.any())
    ]
    if unreached:
        raise CascadeError(
            f"the {term} gives parameters no finite gradient other than zero",
            value=", ".join(unreached[:3])
            + (f" and {len(unreached) - 3} more" if len(unreached) > 3 else ""),
            where="the student, before its first step",
            remedy="check the student's weights for parts that are zero or not finite",
        )
