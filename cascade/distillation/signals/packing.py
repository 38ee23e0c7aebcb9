"""Numbers in few bytes, and draws that can be made again for any row alone.

N tokens, K entries of a token's distribution.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

STEPS = 65535
"""A probability is kept as a count of steps of 1/65535, in two bytes; those of a token sum to 65535."""
ENTROPY_STEPS = 4096
"""An entropy is kept in two bytes as a count of 1/4096 nats; the largest, of 8.9 million entries, is 16."""
VALUE_BYTES = 2
"""Of a probability, or of an entropy."""


COUNT_BYTES = 1
"""Of a number of entries or of draws, from 0 to 255."""


def id_bytes(vocabulary: int) -> int:
    """Bytes of a token id below `vocabulary`: 2 up to 65536 entries, else 3."""
    return 2 if vocabulary <= 2**16 else 3


def pack(values: Tensor, size: int) -> Tensor:
    """Integers [..., K] from 0 to 256^size - 1 as bytes [..., K * size], uint8, the lowest byte first."""
    shifts = 8 * torch.arange(size, device=values.device)
    return ((values[..., None] >> shifts) & 255).to(torch.uint8).flatten(-2)


def unpack(stored: Tensor, size: int) -> Tensor:
    """What `pack` took, int64."""
    shifts = 8 * torch.arange(size, device=stored.device)
    return (stored.unflatten(-1, (-1, size)).to(torch.int64) << shifts).sum(-1)


def pack_entropy(entropy_N: Tensor) -> Tensor:
    """Nats as two bytes [N, 2]: off by 1/8192 at most."""
    steps = (ENTROPY_STEPS * entropy_N.double()).round().clamp(0, 65535)
    return pack(steps.to(torch.int64)[:, None], VALUE_BYTES)


def unpack_entropy(stored_N2: Tensor) -> Tensor:
    """Nats [N], float32."""
    return unpack(stored_N2, VALUE_BYTES)[:, 0].float() / ENTROPY_STEPS


def rounded_shares(cumulative_NK: Tensor, dither_N: Tensor) -> Tensor:
    """Steps [N, K], int64, of shares given by their running sums [N, K] (float64, at most 1).

    The running sums are rounded, by floor(65535 * sum + dither), so that no shares sum to more than the
    whole. A share is off by less than one step. For a dither drawn evenly from [0, 1) every rounded running
    sum is right on average, because E[floor(x + u)] = x, and so is every share, their difference.
    """
    sums_NK = (STEPS * cumulative_NK + dither_N[:, None]).floor().to(torch.int64)
    return sums_NK.diff(dim=1, prepend=torch.zeros_like(sums_NK[:, :1]))


def uniforms(seed: int, rows: Sequence[int], tokens: int, count: int) -> Tensor:
    """Draws from [0, 1), float64 [rows * tokens, count], that depend on the seed and on each row alone."""
    # RandomState: NumPy promises that this stream never changes.
    drawn = [np.random.RandomState([seed, row]).random_sample((tokens, count)) for row in rows]
    return torch.from_numpy(np.concatenate(drawn))
