"""The distillation loss straight from hidden states, with its gradient computed in the forward pass.

N tokens, D student hidden size, E teacher hidden size, V vocabulary, C tokens of one chunk, B tokens of
one block. For each chunk: project to logits [C, V], replace them block by block by the loss's closed-form
gradient for them, and project that back at once. What is kept is [N, D] and [V, D]; [N, V] never exists.
The idea is Liger's fused linear loss (2410.10989, section 3.2); the gradient needs no autograd graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from cascade.distillation.compiled import compiled_block
from cascade.distillation.objectives import Objective, divergence_of
from cascade.distillation.states import Head
from cascade.distillation.targets import BucketTargets, SparseTargets, Targets, aligned, dense
from cascade.distillation.terms import (
    BlockTerms,
    Rule,
    before_cap,
    bucket_terms,
    dense_terms,
    sparse_terms,
    sums,
)
from cascade.errors import InputError

IGNORED = -100
"""The label of a token that is no target, as in torch's cross-entropy."""

CHUNK_BYTES, BLOCK_BYTES = 64 * 2**20, 8 * 2**20
"""Bytes of one [C, V] of logits, of which two exist at a time, and on a CPU of one [B, V], of which three or
four do.

Matrix products want large chunks, what is between them small blocks. One thread, D = 384, E = 768,
V = 128256, seconds for 1024 tokens: the four products 4.9 in chunks of 56 tokens and 3.2 in chunks of 128
(64 MiB); a forward KL after them 0.5, 0.6, 0.7 and 0.9 in blocks of 4, 8, 16 and 64 MiB, because small
blocks stay in the cache and glibc maps more than 32 MiB anew every time. In blocks under 8 MiB the threads
of a busy machine wait for each other too often. On a GPU a block is a chunk; its best size is unmeasured."""


@dataclass(frozen=True)
class Terms:
    """The loss (a scalar with gradients) and its two parts (detached), all over the same targets.

    kl: the divergence at the temperature, without the T^2. ce: cross-entropy against the labels at
    temperature 1, also where its weight is zero. Nats, divided by `total_targets`.
    """

    loss: Tensor
    kl: Tensor
    ce: Tensor


@dataclass(frozen=True)
class _Plan:
    """One call: the rule of a token, what the sum is multiplied by, tokens of a chunk and of a block."""

    rule: Rule
    scale: float
    chunk: int
    block: int
    compiled: bool


def fused_distillation_loss(
    student_hidden: Tensor,
    student_head: Head,
    targets: Targets,
    labels: Tensor,
    *,
    objective: Objective = Objective.FORWARD_KL,
    objective_weight: float | None = None,
    temperature: float = 1.0,
    cross_entropy_weight: float = 0.0,
    total_targets: int | None = None,
    chunk: int | None = None,
    compiled: bool = False,
) -> Terms:
    """Distillation loss of N tokens, differentiable in `student_hidden` and the head's weight.

    student_hidden [N, D]: floating; targets: of the same N tokens; labels [N]: int64, `IGNORED` where
    the token is no target (such rows are dropped before the projection). The product with a head runs
    in the hidden states' dtype, everything after it and the sum of the head's gradient in float32
    (float64 for float64 input). Where one vocabulary is padded further than the other, both distributions
    are over the entries of the smaller.

    The T^2 keeps the gradient's size independent of the temperature (1503.02531, section 2.1).
    `total_targets` divides the sums: give every micro-batch of one step the step's count, and the
    sum of the losses does not depend on how the step was split. Default: this call's targets.
    `chunk` is in tokens, derived from `CHUNK_BYTES` when not given. compiled: whole blocks go through
    `cascade.distillation.compiled` where the targets are whole distributions; the rest is computed as ever.

    Raises InputError when the vocabularies differ by more than padding, and for an objective, weight or
    temperature that the targets or the objective do not take.
    """
    _require_known(targets, objective, temperature)
    targets = aligned(targets, student_head.vocabulary).to(student_hidden.device, student_hidden.dtype)
    kept = (labels != IGNORED).nonzero().squeeze(1)
    if len(kept) < len(labels):
        student_hidden, targets, labels = student_hidden[kept], targets[kept], labels[kept]
    chunk = chunk or chunk_tokens(targets.vocabulary)
    on_cpu = student_hidden.device.type == "cpu"
    plan = _Plan(
        Rule(divergence_of(objective, objective_weight), temperature, cross_entropy_weight),
        scale=1.0 / max(len(labels) if total_targets is None else total_targets, 1),
        chunk=chunk,
        block=max(1, min(chunk, BLOCK_BYTES // (4 * targets.vocabulary))) if on_cpu else chunk,
        compiled=compiled,
    )
    # The weight goes apart from its head: autograd looks for tensors among the arguments alone.
    head, weight = replace(student_head, weight=student_head.weight.detach()), student_head.weight
    loss, kl, ce = _FusedDistillation.apply(student_hidden, weight, head, targets, labels, plan)
    return Terms(loss, kl, ce)


def _require_known(targets: Targets, objective: Objective, temperature: float) -> None:
    """Raise InputError for what cannot be computed exactly from a few entries of each distribution."""
    wrong = ""
    # A job's settings come from JSON, where an objective is its plain name.
    if isinstance(targets, SparseTargets) and objective != Objective.FORWARD_KL:
        # Only the forward KL is linear in p, so that an unbiased estimate of p gives one of it.
        wrong = f"objective {objective}"
    elif isinstance(targets, SparseTargets | BucketTargets) and temperature != 1:
        # A mass at temperature 1 does not tell the mass at another.
        wrong = f"temperature {temperature:g}"
    if wrong:
        raise InputError(
            "the teacher's signals keep too few entries of each distribution for this",
            value=wrong,
            where="teacher.signals",
            remedy="use `signals: hidden`, which gives back whole distributions, or forward_kl at "
            "temperature 1",
        )


def chunk_tokens(vocabulary: int) -> int:
    """Tokens C whose float32 logits [C, V] fit `CHUNK_BYTES`: a multiple of 8, at least 8."""
    return max(8, CHUNK_BYTES // (4 * vocabulary) // 8 * 8)


class _FusedDistillation(torch.autograd.Function):
    """Forward computes value and gradients; backward only scales them."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        student_ND: Tensor,
        student_WD: Tensor,
        head: Head,
        targets: Targets,
        labels_N: Tensor,
        plan: _Plan,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.promote_types(student_ND.dtype, torch.float32)
        needs_hidden, needs_head = ctx.needs_input_grad[:2]  # type: ignore[attr-defined]
        grad_ND = torch.empty_like(student_ND) if needs_hidden else None
        # W >= V: entries beyond the shared vocabulary get no gradient.
        grad_WD = torch.zeros_like(student_WD, dtype=wide) if needs_head else None
        total = torch.zeros(2, dtype=torch.float64, device=student_ND.device)
        # Under autocast the caller has already chosen the dtype of the states: keep to it.
        with torch.autocast(student_ND.device.type, enabled=False):
            head = head.narrowed(targets.vocabulary).to(student_ND.device, student_ND.dtype)
            for part, grad_CV in _gradients(student_ND, head, targets, labels_N, plan, total):
                grad_CV = grad_CV.to(student_ND.dtype)
                if grad_ND is not None:
                    grad_ND[part] = (grad_CV @ head.weight).mul_(plan.scale * head.scale)
                if grad_WD is not None:
                    shared_VD = grad_WD[: head.vocabulary]
                    _add_product(shared_VD, grad_CV, student_ND[part], plan.scale * head.scale)
        ctx.save_for_backward(grad_ND, grad_WD)  # type: ignore[arg-type]
        ctx.head_dtype = student_WD.dtype  # type: ignore[attr-defined]
        kl, ce = (total * plan.scale).unbind()
        rule = plan.rule
        loss = (1 - rule.weight) * rule.temperature**2 * kl + rule.weight * ce
        ctx.mark_non_differentiable(kl, ce)
        return loss.to(wide), kl, ce

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad_ND, grad_WD = ctx.saved_tensors  # type: ignore[attr-defined]
        if grad_outputs[0] != 1:
            # Not in the common case: it would write another [V, D].
            grad_ND, grad_WD = (
                None if gradient is None else gradient * grad_outputs[0].to(gradient.dtype)
                for gradient in (grad_ND, grad_WD)
            )
        head = None if grad_WD is None else grad_WD.to(ctx.head_dtype)  # type: ignore[attr-defined]
        return grad_ND, head, None, None, None, None


def _gradients(
    student_ND: Tensor, head: Head, targets: Targets, labels_N: Tensor, plan: _Plan, total: Tensor
) -> Iterator[tuple[slice, Tensor]]:
    """Chunk by chunk the gradient [C, V] for the head's product with the states; adds up divergence and CE.

    The gradient is for states @ weight^T times the head's scale, so its cap is in and its scale is not.
    """
    wide = torch.promote_types(student_ND.dtype, torch.float32)
    some = isinstance(targets, BucketTargets | SparseTargets)
    size = (min(plan.chunk, len(labels_N)), targets.vocabulary)
    # Written anew for every chunk: memory that is mapped anew costs a page fault for each 4 kB.
    student = torch.empty(size, dtype=wide, device=student_ND.device)
    teacher = None if some else torch.empty_like(student)
    compiled = compiled_block(plan.rule, head.cap) if plan.compiled else None
    weight = torch.full((), plan.rule.weight, dtype=wide, device=student_ND.device)
    for start in range(0, len(labels_N), plan.chunk):
        part = slice(start, min(start + plan.chunk, len(labels_N)))
        student_CV = head.logits(student_ND[part], student[: part.stop - start])
        teacher_CV = None
        if teacher is not None:
            teacher_CV = dense(targets[part]).logits(teacher[: part.stop - start])
        for at in range(0, len(student_CV), plan.block):
            rows = slice(at, at + plan.block)
            inside = slice(start + at, min(start + at + plan.block, part.stop))
            block_BV, labels_B = student_CV[rows], labels_N[inside]
            if compiled and teacher_CV is not None and len(block_BV) == plan.block:
                total += compiled(block_BV, teacher_CV[rows], labels_B, weight)
                continue
            told = targets[inside] if teacher_CV is None else teacher_CV[rows]
            terms = _block_terms(block_BV, told, labels_B, plan.rule)
            total += sums(terms.value, terms.ce)
            before_cap(block_BV, terms.gradient, head.cap)
        yield part, student_CV


def _block_terms(student_BV: Tensor, targets: Targets | Tensor, labels_B: Tensor, rule: Rule) -> BlockTerms:
    """By the kind of the targets; a tensor holds the teacher's logits [B, V]."""
    if isinstance(targets, Tensor):
        return dense_terms(student_BV, targets, labels_B, rule)
    if isinstance(targets, BucketTargets):
        return bucket_terms(student_BV, targets, labels_B, rule)
    if isinstance(targets, SparseTargets):
        return sparse_terms(student_BV, targets, labels_B, rule)
    raise TypeError(f"no terms for {type(targets).__name__}")


def _add_product(total_VD: Tensor, grad_CV: Tensor, hidden_CD: Tensor, scale: float) -> None:
    """total += scale * grad^T hidden, without a [V, D] temporary where the dtypes allow it."""
    if total_VD.dtype == grad_CV.dtype:
        total_VD.addmm_(grad_CV.T, hidden_CD, alpha=scale)
    else:
        total_VD.add_(grad_CV.T @ hidden_CD, alpha=scale)
