"""From scores to the indices that stay: per network for layers and channels, per layer for the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cascade.architecture import Architecture
from cascade.errors import InputError
from cascade.planning.axes import Axis

KeptRecord = dict[str, list[int] | list[list[int]]]


@dataclass(frozen=True)
class Kept:
    """Indices into the parent that a child keeps, all ascending.

    layers [L'] and hidden [D'] count through the parent; ffn [L'][F'] and kv_groups [L'][G'] have one list
    for each KEPT layer, in the child's order.
    """

    layers: list[int]
    hidden: list[int]
    ffn: list[list[int]]
    kv_groups: list[list[int]]

    def record(self) -> KeptRecord:
        """Plain JSON by `Axis` value."""
        return {
            Axis.LAYERS.value: self.layers,
            Axis.HIDDEN.value: self.hidden,
            Axis.FFN.value: self.ffn,
            Axis.KV_GROUPS.value: self.kv_groups,
        }


def select(scores: Mapping[str, Tensor], source: Architecture, target: Architecture) -> Kept:
    """The best-scored units on every axis.

    scores by `Axis` value: layers [L], hidden [D], ffn [L, F], kv_groups [L, G], as `calibrate` returns them
    for a model of shape `source`. Raises InputError for scores of another shape or that are not finite.
    """
    expected = {
        Axis.LAYERS: (source.layers,),
        Axis.HIDDEN: (source.hidden,),
        Axis.FFN: (source.layers, source.ffn),
        Axis.KV_GROUPS: (source.layers, source.kv_groups),
    }
    for axis, shape in expected.items():
        check_scores(axis, scores.get(axis), shape)
    layers = best(scores[Axis.LAYERS], target.layers)
    return Kept(
        layers=layers,
        hidden=best(scores[Axis.HIDDEN], target.hidden),
        ffn=[best(scores[Axis.FFN][layer], target.ffn) for layer in layers],
        kv_groups=[best(scores[Axis.KV_GROUPS][layer], target.kv_groups) for layer in layers],
    )


def check_scores(axis: Axis, scores: Tensor | None, shape: tuple[int, ...]) -> None:
    """Raise InputError unless `scores` are finite and of the expected shape."""
    remedy = "calibrate on the model that is pruned"
    where = f"importance scores, axis {axis}"
    found = None if scores is None else tuple(scores.shape)
    if scores is None or found != shape:
        raise InputError(f"scores of shape {shape} are needed", value=found, where=where, remedy=remedy)
    if not scores.isfinite().all():
        raise InputError("scores are not finite", value=scores.sum().item(), where=where, remedy=remedy)


def best(scores: Tensor, count: int) -> list[int]:
    """Indices of the `count` largest of [n] scores, ascending; among equals the lower index stays."""
    order = torch.argsort(scores, descending=True, stable=True)
    return sorted(order[:count].tolist())
