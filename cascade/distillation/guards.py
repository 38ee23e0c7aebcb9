"""Checks of the whole chain before a long run, in seconds: what is wrong shows on a few tokens."""

from __future__ import annotations

from functools import partial

import torch
from transformers import PreTrainedModel

from cascade.data.corpus import Corpus
from cascade.distillation.fused import fused_distillation_loss
from cascade.distillation.settings import Plan
from cascade.distillation.signals import Part, Teacher, batch_ids
from cascade.distillation.states import check_head, device_of, final_states, head_of
from cascade.distillation.targets import StateTargets
from cascade.errors import CascadeError, InputError
from cascade.models.documents import check_documents_apart

GUARD_TOKENS = 32
ZERO = 1e-6
"""Nats per token. The two sides run the same operations on the same numbers, so only an objective's
own rounding remains."""


def check_before_training(student: PreTrainedModel, teacher: Teacher, corpus: Corpus, plan: Plan) -> None:
    """The head is what the loss takes it for, the teacher agrees with itself, every parameter learns.

    Raises InputError for a student or data that cannot be trained, CascadeError for a broken chain.
    """
    if corpus.sequence_length < 2:
        raise InputError(
            "a row needs at least two tokens to hold a prediction",
            value=corpus.sequence_length,
            where="corpus.sequence_length",
            remedy="raise it to 8 or more",
        )
    ids_BT = batch_ids(corpus, Part.TRAIN, [corpus.row(0)], device_of(student))[:, :GUARD_TOKENS]
    check_head(student, ids_BT[0])
    check_documents_apart(student, corpus)
    targets = teacher.targets(Part.TRAIN, [corpus.row(0)])[: ids_BT.shape[1] - 1]
    labels_N = ids_BT[0, 1:]
    loss = partial(
        fused_distillation_loss,
        objective=plan.settings.objective,
        objective_weight=plan.settings.objective_weight,
        temperature=plan.settings.temperature,
    )
    itself = 0.0
    if isinstance(targets, StateTargets):
        itself = loss(targets.states, targets.head, targets, labels_N).kl.item()
    if not abs(itself) <= ZERO:
        raise CascadeError(
            "the teacher as its own student has a loss",
            value=f"{itself:.3g} nats",
            where=plan.settings.objective.value,
            remedy="check the parent's weights for values that are not finite, or choose another objective",
        )
    # The teacher's states are moved by one token, so that even a student equal to it must learn.
    student_NE = final_states(student, ids_BT)[0, :-1]
    moved = targets[torch.arange(len(targets)).roll(1)]
    loss(student_NE, head_of(student), moved, labels_N).loss.backward()
    _require_gradients(student)
    student.zero_grad(set_to_none=True)


def _require_gradients(student: PreTrainedModel) -> None:
    """Raises CascadeError naming the parameters that the loss does not reach."""
    unreached = [
        name
        for name, parameter in student.named_parameters()
        if parameter.requires_grad
        and (parameter.grad is None or not torch.isfinite(parameter.grad).all() or not parameter.grad.any())
    ]
    if unreached:
        raise CascadeError(
            "the distillation loss gives parameters no finite gradient other than zero",
            value=", ".join(unreached[:3])
            + (f" and {len(unreached) - 3} more" if len(unreached) > 3 else ""),
            where="the student, before its first step",
            remedy="check the student's weights for parts that are zero or not finite",
        )
