"""The axes along which a decoder is cut, and the sizes on each that stay friendly to hardware."""

from __future__ import annotations

import math
from enum import StrEnum

from cascade.architecture import Architecture, Sizes


class Axis(StrEnum):
    """One size of a homogeneous decoder; the value is its field in `Architecture`."""

    LAYERS = "layers"
    HIDDEN = "hidden"
    FFN = "ffn"
    KV_GROUPS = "kv_groups"
    HEADS_PER_GROUP = "heads_per_group"
    EXPERTS = "experts"

    def size(self, sizes: Sizes) -> int:
        """How many layers, channels, neurons, groups, query heads a group or experts there are."""
        return sizes.factor(self.value)


# What is cut unless a recipe says otherwise: what has a measured price in `cascade.planning.cost`.
DEFAULT_AXES = (Axis.LAYERS, Axis.HIDDEN, Axis.FFN, Axis.KV_GROUPS)


# Matrix sides in multiples of 64 fill the tiles of every GPU's matrix units (NVIDIA, "Matrix Multiplication
# Background User's Guide", section 3: 64 elements of fp16 on an A100). Small models get the largest power of
# two that leaves at least this many sizes to choose from, so that a budget can still be met closely.
FRIENDLY = 64
FFN_SIZES = 16
HIDDEN_SIZES = 8


def powers_down(largest: int) -> list[int]:
    """`largest`, a power of two, and its halves down to 1."""
    return [2**exponent for exponent in range(largest.bit_length() - 1, -1, -1)]


def ffn_step(ffn: int) -> int:
    """The multiple for FFN sizes of a family whose original has `ffn`: 64 from 1024 on, smaller below."""
    return next(step for step in powers_down(FRIENDLY) if step * FFN_SIZES <= ffn or step == 1)


def hidden_step(original: Architecture, heads: int) -> int:
    """The multiple for hidden sizes of a descendant of `original` with `heads` query heads.

    Stock Llama configs refuse a hidden size that the heads do not divide, even where the head size is given
    on its own (transformers 5, `LlamaConfig.validate_architecture`); an original that breaks the rule itself
    belongs to a family without it.
    """
    divisor = heads if original.hidden % original.heads == 0 else 1
    steps = [math.lcm(step, divisor) for step in powers_down(FRIENDLY)]
    return next((step for step in steps if step * HIDDEN_SIZES <= original.hidden), divisor)


def multiples(step: int, size: int) -> list[int]:
    """Legal sizes from large to small: `size` itself (nothing cut) and the multiples of `step` below it."""
    largest = (size - 1) // step * step
    return [size, *range(largest, 0, -step)]
