"""The codec that keeps the likeliest entries of a distribution exactly and a sample of the others.

B rows, T tokens, N = B * (T - 1) tokens, C tokens of one chunk, E teacher hidden size, V vocabulary,
H entries of a token's head, S entries drawn from its tail, K = H + S.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cascade.distillation.signals.chunks import by_chunk, found_in
from cascade.distillation.signals.packing import (
    COUNT_BYTES,
    STEPS,
    VALUE_BYTES,
    id_bytes,
    pack,
    pack_entropy,
    rounded_shares,
    uniforms,
    unpack,
    unpack_entropy,
)
from cascade.distillation.states import Head
from cascade.distillation.targets import SparseTargets

if TYPE_CHECKING:
    from cascade.distillation.signals.codecs import Stored

CLEARANCE = 1e-3
"""By how much an inclusion probability stays below 1, so that float32 sums never draw an entry twice."""
NOISE = 1e-6
"""By how much float32 probabilities of a vocabulary may miss 1; a tail's mass is not known better."""


class HeadAndTail:
    """The likeliest entries exactly and a sample of the others, without bias.

    A token's head are its H likeliest entries. Of the tail, with mass r, S entries are drawn by systematic
    sampling: the points (u + k) r / S for k = 0..S-1, one u from [0, 1), fall into the tail's running sums.
    They are r / S apart, so one of them meets entry v with probability p_v / (r / S), and no two do as long
    as that is at most 1. It gets the weight r / S: E[weight_v] = (S p_v / r) (r / S) = p_v. The rounding of r
    and of the head's probabilities is dithered, right on average and independent of u, so this holds for what
    is stored. All weights of a token sum to 1.

    Why this tail: of all estimates with S entries the squared error is least where inclusion is proportional
    to p (Barnes et al., 2402.14925), and then all drawn entries have one weight, which need not be stored: a
    drawn entry costs an id, an exact one an id and two bytes. The squared error is the sum over the tail of
    p_v (r / S - p_v), that is r^2 / S - sum p_v^2; each token takes the H for which it is least, among those
    that leave room for S draws and no p_v above r / S.
    """

    name, whole, flat = "head_and_tail", False, ()

    def __init__(self, vocabulary: int, token_bytes: int, seed: int) -> None:
        self.vocabulary, self.limit, self.seed = vocabulary, token_bytes, seed
        self.id_bytes = id_bytes(vocabulary)
        self.splits = self._splits(token_bytes - VALUE_BYTES - COUNT_BYTES)

    def _splits(self, room: int) -> list[int]:
        """S by H: draws beside a head of 0, 1, ... entries; one beside the largest, which always can be."""
        exact = self.id_bytes + VALUE_BYTES
        largest = (room - self.id_bytes) // exact
        return [(room - size * exact) // self.id_bytes for size in range(largest)] + [1]

    def settings(self) -> dict[str, Any]:
        """The bytes that were allowed, and the seed."""
        return {"token_bytes": self.limit, "seed": self.seed}

    def token_bytes(self) -> float:
        """Of the largest record; all have this size."""
        return VALUE_BYTES + COUNT_BYTES + self._record_bytes()

    def _record_bytes(self) -> int:
        exact = self.id_bytes + VALUE_BYTES
        return max(size * exact + draws * self.id_bytes for size, draws in enumerate(self.splits))

    def fitted(self, states_BTE: Tensor, head: Head) -> HeadAndTail:
        """Itself."""
        return self

    def encode(self, states_BTE: Tensor, head: Head, rows: Sequence[int]) -> Stored:
        """All uint8: `entropy` [B, T-1, 2], `head` [B, T-1], which is H, and `entries` [B, T-1, bytes]: ids
        of the head, likeliest first, those of the tail, then the head's probabilities; zeros fill up."""
        batch, tokens = len(states_BTE), states_BTE.shape[1] - 1
        draws_N2 = uniforms(self.seed, rows, tokens, 2).to(states_BTE.device)

        def keep(p_CV: Tensor, entropy_C: Tensor, chunk: slice) -> tuple[Tensor, ...]:
            size_C, entries_C = self._entries(p_CV, draws_N2[chunk])
            return pack_entropy(entropy_C), size_C.to(torch.uint8), entries_C

        names = ("entropy", "head", "entries")
        parts = map(torch.cat, zip(*by_chunk(states_BTE, head, keep), strict=True))
        return {name: part.unflatten(0, (batch, tokens)) for name, part in zip(names, parts, strict=True)}

    def _entries(self, p_CV: Tensor, draws_C2: Tensor) -> tuple[Tensor, Tensor]:
        """H [C] and the records [C, bytes] of distributions, which are overwritten."""
        top_CH, ids_CH = p_CV.topk(len(self.splits))
        size_C = self._head_sizes(top_CH.double())
        in_head_CH = torch.arange(len(self.splits), device=p_CV.device) < size_C[:, None]
        # What is left is the tail.
        sums_CV = p_CV.scatter_(1, ids_CH, top_CH.masked_fill(in_head_CH, 0)).cumsum(1)
        draws_C = torch.tensor(self.splits, device=p_CV.device)[size_C]
        points_S = torch.arange(max(self.splits), device=p_CV.device)
        tail_CS = found_in(sums_CV, (draws_C2[:, :1] + points_S) / draws_C[:, None])
        head_CH = top_CH.double().masked_fill(~in_head_CH, 0).cumsum(1)
        whole_C1 = head_CH[:, -1:] + sums_CV[:, -1:]
        shares_CH = rounded_shares(head_CH / whole_C1, draws_C2[:, 1])
        records_C = torch.zeros(len(p_CV), self._record_bytes(), dtype=torch.uint8, device=p_CV.device)
        for size, draws in enumerate(self.splits):
            some = (size_C == size).nonzero().squeeze(1)
            ids = pack(torch.cat([ids_CH[some, :size], tail_CS[some, :draws]], 1), self.id_bytes)
            record = torch.cat([ids, pack(shares_CH[some, :size], VALUE_BYTES)], 1)
            records_C[some, : record.shape[1]] = record
        return size_C, records_C

    def _head_sizes(self, top_CH: Tensor) -> Tensor:
        """H [C] with the least squared error, for the likeliest probabilities [C, len(splits)], falling."""
        before_CH = top_CH.cumsum(1) - top_CH
        rest_CH = (1 - before_CH).clamp_min(0)
        draws_H = torch.tensor(self.splits, device=top_CH.device)
        # Up to the constant sum of all p^2.
        error_CH = rest_CH**2 / draws_H + top_CH.square().cumsum(1) - top_CH.square()
        drawable_CH = top_CH * draws_H <= (1 - CLEARANCE) * (rest_CH - NOISE)
        drawable_CH[:, -1] = True
        return error_CH.masked_fill(~drawable_CH, torch.inf).argmin(1)

    def decode(self, stored: Sequence[Stored], head: Head) -> SparseTargets:
        """As many entries as the split with the most; the others of a token are padding."""
        size_N = torch.cat([row["head"] for row in stored])
        entries_N = torch.cat([row["entries"] for row in stored])
        most = max(size + draws for size, draws in enumerate(self.splits))
        ids_NK = torch.zeros(len(size_N), most, dtype=torch.int64)
        weights_NK = torch.zeros(len(size_N), most)
        for size, draws in enumerate(self.splits):
            some = (size_N == size).nonzero().squeeze(1)
            entries, count = entries_N[some], size + draws
            split = count * self.id_bytes
            shares = unpack(entries[:, split : split + size * VALUE_BYTES], VALUE_BYTES)
            tail = (STEPS - shares.sum(1, keepdim=True)) / draws
            ids_NK[some, :count] = unpack(entries[:, :split], self.id_bytes)
            weights_NK[some, :size] = shares.float() / STEPS
            weights_NK[some, size:count] = tail / STEPS
        entropy_N = unpack_entropy(torch.cat([row["entropy"] for row in stored]))
        return SparseTargets(ids_NK, weights_NK, entropy_N, self.vocabulary)
