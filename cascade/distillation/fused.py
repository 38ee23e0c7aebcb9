"""The distillation loss straight from hidden states, with its gradient computed in the forward pass.

N tokens, D student hidden size, E teacher hidden size, V vocabulary, C tokens of one chunk.
For each chunk: project to logits [C, V], take the closed-form gradient of the loss with respect to
them, and project it back at once. What is kept is [N, D] and [V, D]; [N, V] never exists.
The idea is Liger's fused linear loss (2410.10989, section 3.2); the gradient needs no autograd graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from cascade.distillation.objectives import DIVERGENCES, Divergence, Objective
from cascade.distillation.states import Head
from cascade.distillation.targets import Targets
from cascade.errors import InputError

IGNORED = -100
"""The label of a token that is no target, as in torch's cross-entropy."""

CHUNK_BYTES = 28 * 2**20
"""Bytes of one [C, V] temporary. glibc keeps blocks under 32 MiB on its heap and maps larger ones
anew every time, with a page fault for each 4 kB: measured at V = 49152 on 2 cores, a log-softmax
takes 50 us per token in chunks of 170 tokens and 94 us in chunks of 256. Smaller chunks starve
the matrix products (at 64 tokens they run at two thirds of the speed). On a GPU no such edge
exists and larger chunks may win: unmeasured."""


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
class _Rule:
    """loss = scale * sum over targets of [(1 - weight) * T^2 * divergence + weight * cross-entropy]."""

    divergence: Divergence
    temperature: float
    weight: float
    scale: float
    chunk: int


def fused_distillation_loss(
    student_hidden: Tensor,
    student_head: Head,
    targets: Targets,
    labels: Tensor,
    *,
    objective: Objective = Objective.FORWARD_KL,
    temperature: float = 1.0,
    cross_entropy_weight: float = 0.0,
    total_targets: int | None = None,
    chunk: int | None = None,
) -> Terms:
    """Distillation loss of N tokens, differentiable in `student_hidden` and the head's weight.

    student_hidden [N, D]: floating; targets: of the same N tokens; labels [N]: int64, `IGNORED` where
    the token is no target (such rows are dropped before the projection). The product with a head runs
    in the hidden states' dtype, everything after it and the sum of the head's gradient in float32
    (float64 for float64 input).

    The T^2 keeps the gradient's size independent of the temperature (1503.02531, section 2.1).
    `total_targets` divides the sums: give every micro-batch of one step the step's count, and the
    sum of the losses does not depend on how the step was split. Default: this call's targets.
    `chunk` is in tokens, derived from `CHUNK_BYTES` when not given.

    Raises InputError when the two heads differ in vocabulary.
    """
    if student_head.vocabulary != targets.vocabulary:
        raise InputError(
            "student and teacher have different vocabularies",
            value=f"{student_head.vocabulary} and {targets.vocabulary} entries",
            where="the LM heads",
            remedy="distil from a teacher with the same tokenizer and the same padding of its embeddings",
        )
    kept = (labels != IGNORED).nonzero().squeeze(1)
    if len(kept) < len(labels):
        student_hidden, targets, labels = student_hidden[kept], targets[kept], labels[kept]
    rule = _Rule(
        divergence=DIVERGENCES[objective],
        temperature=temperature,
        weight=cross_entropy_weight,
        scale=1.0 / max(len(labels) if total_targets is None else total_targets, 1),
        chunk=chunk or chunk_tokens(student_head.vocabulary),
    )
    loss, kl, ce = _FusedDistillation.apply(student_hidden, student_head.weight, targets, labels, rule)
    return Terms(loss, kl, ce)


def chunk_tokens(vocabulary: int) -> int:
    """Tokens C whose float32 logits [C, V] fit `CHUNK_BYTES`: a multiple of 8, at least 8."""
    return max(8, CHUNK_BYTES // (4 * vocabulary) // 8 * 8)


class _FusedDistillation(torch.autograd.Function):
    """Forward computes value and gradients; backward only scales them."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        student_ND: Tensor,
        student_VD: Tensor,
        targets: Targets,
        labels_N: Tensor,
        rule: _Rule,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.promote_types(student_ND.dtype, torch.float32)
        needs_hidden, needs_head = ctx.needs_input_grad[:2]  # type: ignore[attr-defined]
        grad_ND = torch.empty_like(student_ND) if needs_hidden else None
        grad_VD = torch.zeros_like(student_VD, dtype=wide) if needs_head else None
        kl = torch.zeros((), dtype=torch.float64, device=student_ND.device)
        ce = torch.zeros_like(kl)
        # Under autocast the caller has already chosen the dtype of the states: keep to it.
        with torch.autocast(student_ND.device.type, enabled=False):
            weight_VD = student_VD.to(student_ND.dtype)
            targets = targets.to(student_ND.device, student_ND.dtype)
            for start in range(0, len(labels_N), rule.chunk):
                part = slice(start, start + rule.chunk)
                kl_C, ce_C, grad_CV = _logit_terms(
                    (student_ND[part] @ weight_VD.T).to(wide),
                    targets[part].logits().to(wide),
                    labels_N[part],
                    rule,
                )
                kl += kl_C.sum(dtype=torch.float64)
                ce += ce_C.sum(dtype=torch.float64)
                grad_CV = grad_CV.to(student_ND.dtype)
                if grad_ND is not None:
                    grad_ND[part] = (grad_CV @ weight_VD).mul_(rule.scale)
                if grad_VD is not None:
                    _add_product(grad_VD, grad_CV, student_ND[part], rule.scale)
        ctx.save_for_backward(grad_ND, grad_VD)  # type: ignore[arg-type]
        ctx.head_dtype = student_VD.dtype  # type: ignore[attr-defined]
        kl, ce = kl * rule.scale, ce * rule.scale
        loss = (1 - rule.weight) * rule.temperature**2 * kl + rule.weight * ce
        ctx.mark_non_differentiable(kl, ce)
        return loss.to(wide), kl, ce

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad_ND, grad_VD = ctx.saved_tensors  # type: ignore[attr-defined]
        if grad_outputs[0] != 1:
            # Not in the common case: it would write another [V, D].
            grad_ND, grad_VD = (
                None if gradient is None else gradient * grad_outputs[0].to(gradient.dtype)
                for gradient in (grad_ND, grad_VD)
            )
        head = None if grad_VD is None else grad_VD.to(ctx.head_dtype)  # type: ignore[attr-defined]
        return grad_ND, head, None, None, None


def _logit_terms(
    student_CV: Tensor, teacher_CV: Tensor, labels_C: Tensor, rule: _Rule
) -> tuple[Tensor, Tensor, Tensor]:
    """Divergence [C], cross-entropy [C] and the unscaled loss's gradient [C, V] for the student's logits."""
    rows = torch.arange(len(labels_C), device=labels_C.device)
    log_CV = student_CV.log_softmax(-1)
    ce_C = -log_CV[rows, labels_C]
    hard_CV = log_CV.exp() if rule.weight else None
    if rule.temperature != 1.0:
        log_CV = (student_CV / rule.temperature).log_softmax(-1)
        teacher_CV = teacher_CV / rule.temperature
    kl_C, grad_CV = rule.divergence(log_CV, teacher_CV.log_softmax(-1))
    # The logits enter the divergence divided by T, so the chain rule leaves T of the T^2.
    factor = (1 - rule.weight) * rule.temperature
    if factor != 1:
        grad_CV.mul_(factor)
    if hard_CV is not None:
        hard_CV[rows, labels_C] -= 1.0
        grad_CV.add_(hard_CV, alpha=rule.weight)
    return kl_C, ce_C, grad_CV


def _add_product(total_VD: Tensor, grad_CV: Tensor, hidden_CD: Tensor, scale: float) -> None:
    """total += scale * grad^T hidden, without a [V, D] temporary where the dtypes allow it."""
    if total_VD.dtype == grad_CV.dtype:
        total_VD.addmm_(grad_CV.T, hidden_CD, alpha=scale)
    else:
        total_VD.add_(grad_CV.T @ hidden_CD, alpha=scale)
