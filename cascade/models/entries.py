"""What the entries along one dimension of a parameter stand for, and which of them a choice of units keeps.

Legend: D hidden, F FFN size, G KV groups, q query heads a group, h head size, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from cascade.architecture import Sizes


class Entries(StrEnum):
    """A dimension's units and their order.

    FFN_HALVES holds all gates, then all ups; FFN_PAIRS gate and up of each neuron side by side.
    QKV_BLOCKS holds all queries, all keys, all values; QKV_GROUPS the three of each KV group together.
    QUERIES [Gqh] and KEYS [Gh] are ordered by group; HEADS has one entry for each query head.
    """

    FIXED = "fixed"
    HIDDEN = "hidden"
    FFN = "ffn"
    FFN_HALVES = "ffn_halves"
    FFN_PAIRS = "ffn_pairs"
    QUERIES = "queries"
    KEYS = "keys"
    QKV_BLOCKS = "qkv_blocks"
    QKV_GROUPS = "qkv_groups"
    HEADS = "heads"
    EXPERTS = "experts"


# Each as a sum of sizes of `Sizes`: the analytic count and the recognition by size both follow from it.
SUMS: dict[Entries, dict[str, int]] = {
    Entries.HIDDEN: {"hidden": 1},
    Entries.FFN: {"ffn": 1},
    Entries.FFN_HALVES: {"ffn": 2},
    Entries.FFN_PAIRS: {"ffn": 2},
    Entries.QUERIES: {"queries": 1},
    Entries.KEYS: {"keys": 1},
    Entries.QKV_BLOCKS: {"queries": 1, "keys": 2},
    Entries.QKV_GROUPS: {"queries": 1, "keys": 2},
    Entries.HEADS: {"heads": 1},
    Entries.EXPERTS: {"experts": 1},
}
# Two orders of one size: which it is, only a numerical proof tells.
OTHER_ORDER = {Entries.FFN_HALVES: Entries.FFN_PAIRS, Entries.QKV_BLOCKS: Entries.QKV_GROUPS}


def length(entries: Entries, sizes: Sizes) -> int:
    """How many entries there are at these sizes; FIXED has no length of its own."""
    return sum(count * sizes.factor(name) for name, count in SUMS[entries].items())


@dataclass(frozen=True)
class Chosen:
    """Units of one layer that stay, int64, ascending.

    hidden [D'], ffn [F'] or [E', F'] with experts, kv_groups [G'], heads_per_group [G', q'] (which query
    heads of each kept group, from 0), experts [E'].
    """

    hidden: Tensor
    ffn: Tensor
    kv_groups: Tensor
    heads_per_group: Tensor
    experts: Tensor

    def heads(self, sizes: Sizes) -> Tensor:
        """Numbers of the query heads in a layer of `sizes`."""
        return (self.kv_groups[:, None] * sizes.heads_per_group + self.heads_per_group).flatten()

    def queries(self, sizes: Sizes) -> Tensor:
        """Their entries among all queries."""
        return spread(self.heads(sizes), sizes.head_size)

    def keys(self, sizes: Sizes) -> Tensor:
        """The entries of the groups among all keys."""
        return spread(self.kv_groups, sizes.head_size)

    def grouped(self, sizes: Sizes) -> Tensor:
        """Entries where every group holds its queries, then its key and its value."""
        per_group = sizes.heads_per_group
        last = torch.tensor([per_group, per_group + 1], device=self.kv_groups.device)
        within = torch.cat([self.heads_per_group, last.expand(len(self.kv_groups), 2)], dim=1)
        return spread((self.kv_groups[:, None] * (per_group + 2) + within).flatten(), sizes.head_size)


def positions_of(entries: Entries, chosen: Chosen, sizes: Sizes) -> Tensor:
    """Positions that stay along a dimension of a layer of `sizes`: [n], or [E', n] where experts differ."""
    match entries:
        case Entries.HIDDEN:
            return chosen.hidden
        case Entries.FFN:
            return chosen.ffn
        case Entries.FFN_HALVES:
            return torch.cat([chosen.ffn, sizes.ffn + chosen.ffn], dim=-1)
        case Entries.FFN_PAIRS:
            return spread(chosen.ffn, 2)
        case Entries.QUERIES:
            return chosen.queries(sizes)
        case Entries.KEYS:
            return chosen.keys(sizes)
        case Entries.QKV_BLOCKS:
            keys = sizes.queries + chosen.keys(sizes)
            return torch.cat([chosen.queries(sizes), keys, sizes.keys + keys])
        case Entries.QKV_GROUPS:
            return chosen.grouped(sizes)
        case Entries.HEADS:
            return chosen.heads(sizes)
        case Entries.EXPERTS:
            return chosen.experts
        case Entries.FIXED:
            raise ValueError("fixed entries all stay")


def spread(blocks: Tensor, size: int) -> Tensor:
    """Positions of whole blocks of `size` entries: [..., n] to [..., n * size]."""
    return (blocks[..., None] * size + torch.arange(size, device=blocks.device)).flatten(-2)


def keep(parameter: Tensor, dimensions: tuple[Entries, ...], chosen: Chosen, sizes: Sizes) -> Tensor:
    """The entries of `parameter` that stay: a copy, or `parameter` itself when all do."""
    result = parameter
    if Entries.EXPERTS in dimensions:
        result = select(result, dimensions.index(Entries.EXPERTS), chosen.experts)
    for dimension, entries in enumerate(dimensions):
        if entries in (Entries.FIXED, Entries.EXPERTS):
            continue
        positions = positions_of(entries, chosen, sizes)
        if positions.ndim == 1:
            result = select(result, dimension, positions)
        else:
            # Experts come first in every stacked parameter; each keeps neurons of its own.
            pairs = zip(result, positions, strict=True)
            result = torch.stack([select(expert, dimension - 1, own) for expert, own in pairs])
    return result


def select(values: Tensor, dimension: int, positions: Tensor) -> Tensor:
    """`index_select`, without a copy when every entry stays."""
    return values if len(positions) == values.shape[dimension] else values.index_select(dimension, positions)
