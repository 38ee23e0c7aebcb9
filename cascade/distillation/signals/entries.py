"""Codecs that keep entries of one kind: the likeliest, or drawn ones.

B rows, T tokens, N = B * (T - 1) tokens, C tokens of one chunk, E teacher hidden size, V vocabulary,
K entries of a token, n draws.
"""

from __future__ import annotations

from bisect import bisect_left
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
from cascade.distillation.targets import BucketTargets, SparseTargets

if TYPE_CHECKING:
    from cascade.distillation.signals.codecs import Stored

FLOOR = 1 / 256
"""Of a step: what an entry counts that was rounded to nothing, so that its logarithm is finite."""
MOST_DRAWS = 255
FITTED_TOKENS = 256
"""Tokens whose distributions say how many draws fit."""


class TopK:
    """The K likeliest entries; what all others have together is the rest to 1.

    Probabilities are rounded to steps of 1/65535 (`packing.rounded_shares`), without bias-free draws: the
    bucket makes the codec biased anyway.
    """

    name, whole, flat = "top_k", False, ()

    def __init__(self, vocabulary: int, token_bytes: int) -> None:
        self.vocabulary, self.limit = vocabulary, token_bytes
        self.id_bytes = id_bytes(vocabulary)
        self.kept = min(token_bytes // (self.id_bytes + VALUE_BYTES), vocabulary - 1)

    def settings(self) -> dict[str, Any]:
        """The bytes that were allowed."""
        return {"token_bytes": self.limit}

    def token_bytes(self) -> float:
        """Of K ids and probabilities."""
        return self.kept * (self.id_bytes + VALUE_BYTES)

    def fitted(self, states_BTE: Tensor, head: Head) -> TopK:
        """Itself."""
        return self

    def encode(self, states_BTE: Tensor, head: Head, rows: Sequence[int]) -> Stored:
        """`entries` [B, T-1, bytes], uint8: the ids, likeliest first, then their probabilities."""

        def keep(p_CV: Tensor, entropy_C: Tensor, chunk: slice) -> Tensor:
            top_CK, ids_CK = p_CV.topk(self.kept)
            sums_CK = top_CK.double().cumsum(1).clamp_max(1)
            shares_CK = rounded_shares(sums_CK, torch.full_like(sums_CK[:, 0], 0.5))
            return torch.cat([pack(ids_CK, self.id_bytes), pack(shares_CK, VALUE_BYTES)], 1)

        stored = torch.cat(by_chunk(states_BTE, head, keep))
        return {"entries": stored.unflatten(0, (len(states_BTE), -1))}

    def decode(self, stored: Sequence[Stored], head: Head) -> BucketTargets:
        """K probabilities and the bucket."""
        entries_N = torch.cat([row["entries"] for row in stored])
        split = self.kept * self.id_bytes
        ids_NK = unpack(entries_N[:, :split], self.id_bytes)
        shares_NK = unpack(entries_N[:, split:], VALUE_BYTES).clamp_min(FLOOR)
        return BucketTargets(ids_NK, (shares_NK / (STEPS + 1)).log().float(), self.vocabulary)


class Sampled:
    """Random sampling knowledge distillation (2503.16870): n draws from the teacher, counted.

    The weight of an entry is its share of the n draws. A draw is entry v with probability p_v, so
    E[weight_v] = n p_v / n = p_v; var[weight_v] = p_v (1 - p_v) / n. The paper draws from p^t as well and
    reweights; t = 1, which it recommends, needs no weights beside the counts.
    """

    name, whole, flat = "sampled", False, ("ids", "counts")

    def __init__(self, vocabulary: int, token_bytes: int, seed: int, draws: int = MOST_DRAWS) -> None:
        self.vocabulary, self.limit, self.seed, self.draws = vocabulary, token_bytes, seed, draws
        self.id_bytes = id_bytes(vocabulary)

    def settings(self) -> dict[str, Any]:
        """The bytes that were allowed, the seed, and n."""
        return {"token_bytes": self.limit, "seed": self.seed, "draws": self.draws}

    def token_bytes(self) -> float:
        """All allowed: for the entropy, the number of different entries, an id and a count of each."""
        return self.limit

    def fitted(self, states_BTE: Tensor, head: Head) -> Sampled:
        """With the most draws, up to 255, that take the bytes allowed, on average over some of the tokens.

        Of n draws sum_v [1 - (1 - p_v)^n] are expected to differ. Elsewhere in the corpus it may be some
        percent more or less.
        """
        stride = max(1, len(states_BTE) * states_BTE.shape[1] // FITTED_TOKENS)
        some_1TE = states_BTE.flatten(0, 1)[None, ::stride]
        room = (self.limit - VALUE_BYTES - COUNT_BYTES) / (self.id_bytes + COUNT_BYTES)

        def excess(draws: int) -> float:
            def keep(p_CV: Tensor, entropy_C: Tensor, chunk: slice) -> Tensor:
                return -torch.expm1(draws * torch.log1p(-p_CV.clamp_max(1 - 1e-6))).sum(1)

            return torch.cat(by_chunk(some_1TE, head, keep)).mean().item() - room

        draws = bisect_left(range(2, MOST_DRAWS + 1), 0.0, key=excess) + 1
        return Sampled(self.vocabulary, self.limit, self.seed, draws)

    def encode(self, states_BTE: Tensor, head: Head, rows: Sequence[int]) -> Stored:
        """All uint8: `entropy` [B, T-1, 2], `different` [B, T-1]; for all entries drawn, in their tokens'
        order, `ids` [entries, bytes of an id] and `counts` [entries]; and `sizes` [B], int64."""
        batch, tokens = len(states_BTE), states_BTE.shape[1] - 1
        draws_Nn = uniforms(self.seed, rows, tokens, self.draws).to(states_BTE.device)

        def keep(p_CV: Tensor, entropy_C: Tensor, chunk: slice) -> tuple[Tensor, ...]:
            drawn_Cn = found_in(p_CV.cumsum(1), draws_Nn[chunk]).sort(1).values
            first_Cn = torch.ones_like(drawn_Cn, dtype=torch.bool)
            first_Cn[:, 1:] = drawn_Cn[:, 1:] != drawn_Cn[:, :-1]
            places = first_Cn.flatten().nonzero().squeeze(1)
            counts = places.diff(append=places.new_tensor([first_Cn.numel()]))
            return pack_entropy(entropy_C), first_Cn.sum(1), drawn_Cn[first_Cn], counts

        entropy, count, ids, counts = map(torch.cat, zip(*by_chunk(states_BTE, head, keep), strict=True))
        return {
            "entropy": entropy.unflatten(0, (batch, tokens)),
            "different": count.to(torch.uint8).unflatten(0, (batch, tokens)),
            "sizes": count.unflatten(0, (batch, tokens)).sum(1),
            "ids": pack(ids[:, None], self.id_bytes),
            "counts": counts.to(torch.uint8),
        }

    def decode(self, stored: Sequence[Stored], head: Head) -> SparseTargets:
        """As many entries a token as the most that any token has; the others of a token are padding."""
        count_N = torch.cat([row["different"] for row in stored]).to(torch.int64)
        ids = unpack(torch.cat([row["ids"] for row in stored]), self.id_bytes)[:, 0]
        counts = torch.cat([row["counts"] for row in stored])
        filled_NK = torch.arange(int(count_N.max())) < count_N[:, None]
        ids_NK = torch.zeros(filled_NK.shape, dtype=torch.int64)
        weights_NK = torch.zeros(filled_NK.shape)
        ids_NK[filled_NK], weights_NK[filled_NK] = ids, counts.float() / self.draws
        entropy_N = unpack_entropy(torch.cat([row["entropy"] for row in stored]))
        return SparseTargets(ids_NK, weights_NK, entropy_N, self.vocabulary)
