"""The loss of some tokens and its gradient for their logits, for every kind of target.

B tokens of a block, V vocabulary, K entries that the teacher's signals keep of a token. Float32 or wider.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cascade.distillation.objectives import Divergence
from cascade.distillation.targets import BucketTargets, SparseTargets

EMPTIEST = 100.0
"""The student's tail is taken for at least e^-100 of its largest kept entry: K = V leaves it empty, and a
logarithm of zero would make the gradient undefined."""


@dataclass(frozen=True)
class Rule:
    """loss = sum over targets of [(1 - weight) * T^2 * divergence + weight * cross-entropy]."""

    divergence: Divergence
    temperature: float
    weight: float

    @property
    def factor(self) -> float:
        """Of the divergence's gradient: logits enter it divided by T, so that T of the T^2 stays."""
        return (1 - self.weight) * self.temperature


@dataclass(frozen=True)
class BlockTerms:
    """value [B]: the divergence; ce [B]: cross-entropy at temperature 1; gradient [B, V] of the loss.

    The gradient is in memory of its own or the teacher's, never the student's.
    """

    value: Tensor
    ce: Tensor
    gradient: Tensor


def dense_terms(student_BV: Tensor, teacher_BV: Tensor, labels_B: Tensor, rule: Rule) -> BlockTerms:
    """Both sides by their logits; the teacher's may be overwritten."""
    value_B, ce_B, gradient_BV, hard_BV = dense_parts(student_BV, teacher_BV, labels_B, rule)
    if rule.factor != 1:
        gradient_BV.mul_(rule.factor)
    if hard_BV is not None:
        gradient_BV.add_(hard_BV, alpha=rule.weight)
    return BlockTerms(value_B, ce_B, _less_labels(gradient_BV, labels_B, rule))


def dense_parts(
    student_BV: Tensor, teacher_BV: Tensor, labels_B: Tensor, rule: Rule
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Divergence [B], cross-entropy [B], the divergence's gradient [B, V] for the student's logits over T,
    and the student's probabilities [B, V] at temperature 1 where the cross-entropy has a weight."""
    log_BV = student_BV.log_softmax(-1)
    ce_B = -log_BV.gather(1, labels_B[:, None])[:, 0]
    hard_BV = log_BV.exp() if rule.weight else None
    if rule.temperature != 1.0:
        log_BV = (student_BV / rule.temperature).log_softmax(-1)
        teacher_BV = teacher_BV.div_(rule.temperature)
    value_B, gradient_BV = rule.divergence(log_BV, teacher_BV.log_softmax(-1))
    return value_B, ce_B, gradient_BV, hard_BV


def bucket_terms(student_BV: Tensor, targets: BucketTargets, labels_B: Tensor, rule: Rule) -> BlockTerms:
    """Any divergence between two distributions over K + 1 buckets: K entries, and all others as one.

    A lower bound of the divergence between the whole distributions (data processing inequality). The tail's
    logit is the logsumexp of its entries', so the tail's gradient reaches each of them by its share.
    """
    kept_BK = student_BV.gather(1, targets.ids)
    label_B = student_BV.gather(1, labels_B[:, None])[:, 0]
    tail_BV = student_BV.scatter(1, targets.ids, -torch.inf)
    tail_B = tail_BV.logsumexp(-1).clamp_min(kept_BK.amax(-1) - EMPTIEST)
    bucket_BK1 = torch.cat([kept_BK, tail_B[:, None]], -1)
    log_BK1 = bucket_BK1.log_softmax(-1)
    ce_B = bucket_BK1.logsumexp(-1) - label_B
    hard_BK1 = log_BK1.exp()
    value_B, gradient_BK1 = rule.divergence(log_BK1, targets.log_buckets().to(log_BK1.dtype))
    gradient_BK1 = gradient_BK1.mul_(rule.factor).add_(hard_BK1, alpha=rule.weight)
    share_BV = tail_BV.sub_(tail_B[:, None]).exp_()
    gradient_BV = share_BV.mul_(gradient_BK1[:, -1:]).scatter_(1, targets.ids, gradient_BK1[:, :-1])
    return BlockTerms(value_B, ce_B, _less_labels(gradient_BV, labels_B, rule))


def sparse_terms(student_BV: Tensor, targets: SparseTargets, labels_B: Tensor, rule: Rule) -> BlockTerms:
    """Forward KL from an unbiased estimate w of the teacher's p: value -entropy - sum w log q.

    Its gradient is q sum(w) - w. Both are linear in w, so their expectations are those of p: the KL and q - p
    (2503.16870), also where a sample's weights do not sum to one.
    """
    weights_BK = targets.weights.to(student_BV.dtype)
    log_BV = student_BV.log_softmax(-1)
    ce_B = -log_BV.gather(1, labels_B[:, None])[:, 0]
    value_B = -targets.entropy.to(student_BV.dtype) - (weights_BK * log_BV.gather(1, targets.ids)).sum(-1)
    total_B1 = weights_BK.sum(-1, keepdim=True).mul_(rule.factor).add_(rule.weight)
    gradient_BV = log_BV.exp_().mul_(total_B1).scatter_add_(1, targets.ids, weights_BK * -rule.factor)
    return BlockTerms(value_B, ce_B, _less_labels(gradient_BV, labels_B, rule))


def _less_labels(gradient_BV: Tensor, labels_B: Tensor, rule: Rule) -> Tensor:
    """The cross-entropy's gradient is q minus one at the label; q is in already."""
    if rule.weight:
        less_B1 = gradient_BV.new_full((len(labels_B), 1), -rule.weight)
        gradient_BV.scatter_add_(1, labels_B[:, None], less_B1)
    return gradient_BV


def sums(value_B: Tensor, ce_B: Tensor) -> Tensor:
    """Both sums, float64 [2]."""
    return torch.stack([value_B.sum(dtype=torch.float64), ce_B.sum(dtype=torch.float64)])


def before_cap(logits_BV: Tensor, gradient_BV: Tensor, cap: float | None) -> None:
    """Replace logits by the gradient for what the cap was applied to: tanh' = 1 - tanh^2."""
    if cap is None:
        logits_BV.copy_(gradient_BV)
    else:
        logits_BV.div_(cap).square_().neg_().add_(1).mul_(gradient_BV)
