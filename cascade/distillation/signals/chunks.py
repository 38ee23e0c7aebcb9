"""A teacher's distributions a chunk at a time, and draws from them.

B rows, T tokens, N = B * (T - 1) tokens, C tokens of one chunk, E teacher hidden size, V vocabulary, S draws.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from cascade.distillation.fused import chunk_tokens
from cascade.distillation.states import Head

Kept = TypeVar("Kept")


def by_chunk(states_BTE: Tensor, head: Head, keep: Callable[[Tensor, Tensor, slice], Kept]) -> list[Kept]:
    """What `keep` makes of each chunk of the N tokens: of p [C, V], float32, which it may overwrite, and
    of the entropies [C], nats."""
    states_NE = states_BTE[:, :-1].flatten(0, 1)
    size, found = chunk_tokens(head.vocabulary), []
    for chunk in (slice(start, start + size) for start in range(0, len(states_NE), size)):
        log_CV = head.logits(states_NE[chunk]).float().log_softmax(-1)
        p_CV = log_CV.exp()
        found.append(keep(p_CV, -torch.linalg.vecdot(p_CV, log_CV), chunk))
    return found


def found_in(sums_CV: Tensor, shares_CS: Tensor) -> Tensor:
    """The entries [C, S] into which shares of the last running sum fall; those have mass, if any has."""
    total_C1 = sums_CV[:, -1:]
    points_CS = (shares_CS * total_C1).to(sums_CV.dtype)
    points_CS = torch.minimum(points_CS, torch.nextafter(total_C1, torch.zeros_like(total_C1)))
    return torch.searchsorted(sums_CV, points_CS, right=True).clamp_max(sums_CV.shape[1] - 1)
