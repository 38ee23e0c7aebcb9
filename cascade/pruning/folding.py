"""Minitron's folding of pruned heads into kept ones (2407.14679, section 2.3).

Of L heads ranked by importance K stay, and the i-th best becomes

    head_i <- head_i + (head_i - head_{2K-i+1})   for i in (K - (L-K), K], ranks from 1,

so the last that stays meets the first that goes, and so on outwards. The paper prints [K - (L-K), K], whose
first i would meet a head L + 1; that end is read as open. Where fewer than half stay (K < L/2), only i >= 1
exist: every kept head meets one, and what ranks below 2K is lost.

The paper says "head" and, with grouped queries, "the query heads": read as the rows of W_Q, W_K and W_V, or
of W_Q alone. Doubt: the output projection is not named and stays as it is, although what it reads changes,
and 2 head_i - head_j leads away from the head that is cut. Whether that helps was not measured. Biases are
folded like the rows they belong to. Gains of norms and attention sinks are no rows of a projection and stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cascade.architecture import Sizes
from cascade.errors import InputError
from cascade.importance.coupled import unit_positions
from cascade.models.anatomy import Anatomy, within
from cascade.models.decoder import Decoder
from cascade.models.entries import Entries
from cascade.planning.axes import Axis
from cascade.pruning.selection import Kept, best_of, rows

QUERIES = (Entries.QUERIES, Entries.QKV_BLOCKS, Entries.QKV_GROUPS)
EVERYTHING = (*QUERIES, Entries.KEYS)


@torch.no_grad()
def fold_heads(decoder: Decoder, kept: Kept, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Projections to heads with the pruned heads folded in, by full parameter name.

    decoder: of a proven anatomy, which knows the order in fused projections. kept: what `select` chose by
    `scores`. With grouped queries the heads of a kept KV group are ranked among themselves (axis
    heads_per_group), and queries are folded; with a group for each head (q = 1) all heads of a layer are
    (axis kv_groups), and queries, keys and values are folded. Values have the parent's shapes and types, as
    `cascade.pruning.surgery.cut` takes them; rows that are cut keep their old ones. Raises InputError for
    scores that are missing, of another shape, not finite, or that did not choose `kept`.
    """
    sizes = decoder.architecture
    stay = kept_heads(kept, sizes)
    axis = Axis.KV_GROUPS if sizes.heads_per_group == 1 else Axis.HEADS_PER_GROUP
    if stay.shape[-1] == axis.size(sizes):
        return {}
    into, out = partners(ranked_heads(kept, sizes, scores, axis, stay), stay.shape[-1])
    positions = head_positions(sizes, axis)
    places = {layer: place for place, layer in enumerate(kept.layers.tolist())}
    found: dict[str, Tensor] = {}
    for name, parameter, dimensions, layer in decoder.parameters():
        if layer not in places or not projects(decoder.anatomy, within(name, decoder.anatomy.stack)):
            continue
        heads = [heads[places[layer]].flatten() for heads in (into, out)]
        for at, entries in enumerate(dimensions):
            if entries in positions:
                ours, theirs = (positions[entries][head].flatten() for head in heads)
                found[name] = folded(parameter, at, ours, theirs)
    return found


def kept_heads(kept: Kept, sizes: Sizes) -> Tensor:
    """Numbers of the query heads that stay, by the sets they are ranked in: [L', G', q'] or [L', 1, G']."""
    if sizes.heads_per_group == 1:
        return kept.kv_groups[:, None]
    return kept.kv_groups[..., None] * sizes.heads_per_group + kept.heads_per_group


def ranked_heads(kept: Kept, sizes: Sizes, scores: Mapping[str, Tensor], axis: Axis, stay: Tensor) -> Tensor:
    """Numbers of all query heads in the sets of `stay`, the best first: [L', G', q] or [L', 1, G]."""
    smaller: dict[str, Any] = {axis.value: stay.shape[-1]}
    best_of(axis, scores, sizes, replace(sizes, **smaller))  # Refuses scores that rank nothing.
    given = scores[axis][kept.layers.to(scores[axis].device)].cpu()
    groups = kept.kv_groups.cpu()
    values = given[:, None] if axis is Axis.KV_GROUPS else rows(given, groups)
    ranked = torch.argsort(values, dim=-1, descending=True, stable=True)
    if axis is Axis.HEADS_PER_GROUP:
        ranked = ranked + groups[..., None] * sizes.heads_per_group
    if not torch.equal(ranked[..., : stay.shape[-1]].sort(dim=-1).values, stay.cpu()):
        raise InputError(
            "the heads that stay are not the best of these scores",
            value=f"{stay.shape[-1]} of {axis.size(sizes)}",
            where=f"importance scores, axis {axis}",
            remedy="fold with the scores that the heads were selected by",
        )
    return ranked


def partners(ranked: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The kept heads that are changed and the cut head that each meets, both [..., p], of ranked [..., n]."""
    first = max(0, 2 * count - ranked.shape[-1])
    return ranked[..., first:count], ranked[..., count : 2 * count - first].flip(-1)


def head_positions(sizes: Sizes, axis: Axis) -> dict[Entries, Tensor]:
    """Where the entries that are folded lie for each query head, by kind of dimension: [heads, m]."""
    if axis is Axis.KV_GROUPS:
        return {entries: unit_positions(axis, entries, sizes) for entries in EVERYTHING}
    # Of a head and its keys and values the queries come first, whatever the order of the dimension.
    return {entries: unit_positions(axis, entries, sizes)[:, : sizes.head_size] for entries in QUERIES}


def projects(anatomy: Anatomy, name: str) -> bool:
    """Whether a parameter of a layer may belong to a projection to heads: not to their reader, or a norm."""
    path = name.rpartition(".")[0]
    return path != anatomy.attention_reader and path not in anatomy.layer_norms


def folded(values: Tensor, at: int, ours: Tensor, theirs: Tensor) -> Tensor:
    """A copy with ours + (ours - theirs) at `ours` along dimension `at`, rounded once."""
    ours, theirs = ours.to(values.device), theirs.to(values.device)
    kept = values.index_select(at, ours).float()
    changed = kept + (kept - values.index_select(at, theirs).float())
    return values.index_copy(at, ours, changed.to(values.dtype))
