"""From scores to the indices that stay: per network for layers and channels, per layer for the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cascade.architecture import Sizes
from cascade.errors import InputError
from cascade.models.entries import Chosen
from cascade.planning.axes import Axis

KeptRecord = dict[str, Any]


@dataclass(frozen=True)
class Kept:
    """Indices into the parent that a child keeps, int64, all ascending.

    layers [L'] and hidden [D'] count through the parent. The rest has one row for each KEPT layer, in the
    child's order: ffn [L', F'], or [L', E', F'] with experts; kv_groups [L', G']; heads_per_group
    [L', G', q'], counted from 0 within each kept group; experts [L', E'].
    """

    layers: Tensor
    hidden: Tensor
    ffn: Tensor
    kv_groups: Tensor
    heads_per_group: Tensor
    experts: Tensor

    def record(self) -> KeptRecord:
        """Plain JSON by `Axis` value."""
        return {axis.value: getattr(self, axis.value).tolist() for axis in Axis}

    def of_layer(self, place: int, device: torch.device) -> Chosen:
        """What stays of the child's layer `place`."""
        return Chosen(
            hidden=self.hidden.to(device),
            ffn=self.ffn[place].to(device),
            kv_groups=self.kv_groups[place].to(device),
            heads_per_group=self.heads_per_group[place].to(device),
            experts=self.experts[place].to(device),
        )


def select(scores: Mapping[str, Tensor], source: Sizes, target: Sizes) -> Kept:
    """The best-scored units on every axis; an axis that is not cut needs no scores.

    scores by `Axis` value: layers [L], hidden [D], ffn [L, F] or [L, E, F], kv_groups [L, G], heads_per_group
    [L, G, q], experts [L, E], as `calibrate` returns them for a model of these sizes. Raises InputError for
    scores of another shape or that are not finite.
    """
    best = {axis: best_of(axis, scores, source, target) for axis in Axis}
    layers = best[Axis.LAYERS]
    groups, experts = best[Axis.KV_GROUPS][layers], best[Axis.EXPERTS][layers]
    ffn, heads = best[Axis.FFN][layers], best[Axis.HEADS_PER_GROUP][layers]
    if source.experts:
        ffn = rows(ffn, experts)
    return Kept(layers, best[Axis.HIDDEN], ffn, groups, rows(heads, groups), experts)


def score_shapes(source: Sizes) -> dict[Axis, tuple[int, ...]]:
    """The shape of the scores on every axis."""
    per_expert = (source.experts,) if source.experts else ()
    return {
        Axis.LAYERS: (source.layers,),
        Axis.HIDDEN: (source.hidden,),
        Axis.FFN: (source.layers, *per_expert, source.ffn),
        Axis.KV_GROUPS: (source.layers, source.kv_groups),
        Axis.HEADS_PER_GROUP: (source.layers, source.kv_groups, source.heads_per_group),
        Axis.EXPERTS: (source.layers, source.experts),
    }


def best_of(axis: Axis, scores: Mapping[str, Tensor], source: Sizes, target: Sizes) -> Tensor:
    """Indices of the largest scores along the last dimension, ascending; of equals the lower one stays."""
    shape, count = score_shapes(source)[axis], axis.size(target)
    if count == axis.size(source):
        return torch.arange(count).expand(*shape[:-1], count)
    given = scores.get(axis)
    found = None if given is None else tuple(given.shape)
    remedy, where = "calibrate on the model that is pruned", f"importance scores, axis {axis}"
    if given is None or found != shape:
        raise InputError(f"scores of shape {shape} are needed", value=found, where=where, remedy=remedy)
    if not given.isfinite().all():
        raise InputError("scores are not finite", value=given.sum().item(), where=where, remedy=remedy)
    order = torch.argsort(given, dim=-1, descending=True, stable=True)
    return order[..., :count].sort(dim=-1).values


def rows(values: Tensor, chosen: Tensor) -> Tensor:
    """values [L, n, m] at chosen [L, n']: [L, n', m]."""
    return values.gather(1, chosen[:, :, None].expand(-1, -1, values.shape[-1]))
