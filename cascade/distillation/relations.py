"""Self-attention relations (MiniLMv2, 2012.15828, section 3): how alike the queries of a text's tokens are to
each other, and so its keys and its values. Widths of student and teacher may differ; nothing is projected.

B rows, T tokens, C student and E teacher channels of one kind (all queries, all keys or all values of a
layer), H relation heads, Q tokens of a block whose relations are computed, K tokens they see.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

FINEST = 16
BLOCK_BYTES = 16 * 2**20
"""Of one [H, Q, K], of which about six exist at a time; the whole would grow with the square of a row."""


def relation_heads(student: int, teacher: int) -> int:
    """H for so many channels C and E: the largest divisor of gcd(C, E) that leaves the teacher 16 a head.

    Channels of all attention heads are joined and split anew, so that H need not be a number of heads.
    The paper took 48 of a teacher of 768 and 64 of one of 1024, which is 16 channels each, and found more
    heads better than fewer. Cuts of heads and KV groups leave what divides both.
    """
    common = math.gcd(student, teacher)
    return max(heads for heads in range(1, common + 1) if not common % heads and fits(heads, teacher))


def fits(heads: int, teacher: int) -> bool:
    """Whether so many relation heads are coarse enough."""
    return heads == 1 or heads * FINEST <= teacher


@dataclass(frozen=True)
class Sight:
    """Who sees whom. documents [B, T]: int64, the text a token belongs to, negative for padding: it sees
    nobody and nobody sees it. causal: a token sees itself and those before it; else all of its text."""

    documents: Tensor
    causal: bool = True

    def seen(self, row: int, tokens_Q: Tensor) -> Tensor:
        """Whether those tokens of a row see each of its first K [Q, K], where K holds all that they do."""
        text_T = self.documents[row]
        stop = int(tokens_Q[-1]) + 1 if self.causal else len(text_T)
        same_QK = text_T[tokens_Q, None] == text_T[None, :stop]
        if not self.causal:
            return same_QK
        return same_QK & (torch.arange(stop, device=text_T.device) <= tokens_Q[:, None])


def documents_of(positions_BT: Tensor | None, shape: tuple[int, int], device: torch.device) -> Tensor:
    """The text of every token of a row [B, T], by positions that start at 0 in each; None: one."""
    if positions_BT is None:
        return torch.zeros(shape, dtype=torch.int64, device=device)
    return (positions_BT == 0).cumsum(-1)


def relation_loss(
    student_BTC: Tensor, teacher_BTE: Tensor, told_BT: Tensor, sight: Sight, heads: int
) -> Tensor:
    """The sum over the tokens told of KL(R_teacher || R_student), averaged over heads, float32 or wider.

    R = softmax over the tokens seen of A A^T / sqrt(d), d the channels of a head, on each side its own.
    told_BT: bool. No gradients flow to the teacher.
    """
    wide = torch.promote_types(student_BTC.dtype, torch.float32)
    told_BT = told_BT & (sight.documents >= 0)
    found: Tensor = _Relations.apply(
        student_BTC.to(wide), teacher_BTE.detach().to(wide), told_BT, sight, heads
    )
    return found


class _Relations(torch.autograd.Function):
    """Computes the gradient in the forward pass, block by block, so that no [H, T, T] is kept."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        student_BTC: Tensor,
        teacher_BTE: Tensor,
        told_BT: Tensor,
        sight: Sight,
        heads: int,
    ) -> Tensor:
        """The value; the student's gradient is kept."""
        gradient_BTC = torch.zeros_like(student_BTC)
        total = student_BTC.new_zeros(())
        for row, told_T in enumerate(told_BT):
            student_HTd, teacher_HTe = (split(side[row], heads) for side in (student_BTC, teacher_BTE))
            gradient_HTd = split(gradient_BTC[row], heads)
            width = BLOCK_BYTES // (student_BTC.element_size() * heads * len(told_T))
            told_N = told_T.nonzero()[:, 0]
            for tokens_Q in told_N.split(max(1, width)) if len(told_N) else ():
                seen_QK = sight.seen(row, tokens_Q)
                total += _block(student_HTd, teacher_HTe, gradient_HTd, tokens_Q, seen_QK)
        ctx.save_for_backward(gradient_BTC)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, factor: Tensor) -> tuple[Tensor | None, ...]:
        """What was kept, times the factor."""
        (gradient_BTC,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return gradient_BTC * factor, None, None, None, None


def split(channels_TC: Tensor, heads: int) -> Tensor:
    """[H, T, d], a view: the channels of a head are neighbours."""
    return channels_TC.unflatten(-1, (heads, -1)).transpose(0, 1)


def _block(
    student_HTd: Tensor, teacher_HTe: Tensor, gradient_HTd: Tensor, tokens_Q: Tensor, seen_QK: Tensor
) -> Tensor:
    """The sum over some tokens of the mean over heads; adds its gradient for the student's channels.

    The gradient of a row's KL for its scores S is R_student - R_teacher, and a score is a product of two
    tokens' channels, so that it flows to the one that sees and to the one that is seen.
    """
    heads, _, size = student_HTd.shape
    stop = seen_QK.shape[1]
    log_q, log_p = (_log_relations(side, tokens_Q, seen_QK) for side in (student_HTd, teacher_HTe))
    p_HQK = log_p.exp()
    # Where nothing is seen both are -inf, and their difference is no number.
    value = (p_HQK * (log_p - log_q).masked_fill(~seen_QK, 0)).sum() / heads
    inner_HQK = (log_q.exp_() - p_HQK) / (heads * math.sqrt(size))
    gradient_HTd[:, tokens_Q] += inner_HQK @ student_HTd[:, :stop]
    gradient_HTd[:, :stop] += inner_HQK.transpose(1, 2) @ student_HTd[:, tokens_Q]
    return value


def _log_relations(channels_HTd: Tensor, tokens_Q: Tensor, seen_QK: Tensor) -> Tensor:
    """Logarithms of the relations [H, Q, K] of some tokens; -inf to those that they do not see."""
    scores_HQK = channels_HTd[:, tokens_Q] @ channels_HTd[:, : seen_QK.shape[1]].transpose(1, 2)
    scores_HQK /= math.sqrt(channels_HTd.shape[-1])
    return scores_HQK.masked_fill_(~seen_QK, -torch.inf).log_softmax(-1)
