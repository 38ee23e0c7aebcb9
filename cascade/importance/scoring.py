"""From everything that a calibration pass measured to the one-dimensional scores that decide."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cascade.errors import InputError
from cascade.importance.method import Scoring
from cascade.importance.streams import layer_key
from cascade.planning.axes import Axis

WIDTHS = tuple(axis for axis in Axis if axis is not Axis.LAYERS)
ALWAYS = tuple(axis for axis in WIDTHS if axis is not Axis.EXPERTS)


def scores_of(statistics: Mapping[str, Tensor], scoring: Scoring, dropped: int) -> dict[str, Tensor]:
    """Scores by `Axis` value in the shapes of `score_shapes`, larger means keep.

    statistics: as `calibrate` measured them, or flat scores of another method, which stay as they are.
    dropped: how many layers the target has less; at 0 there are no scores of layers, as none goes.
    Raises InputError for a statistic that was not measured.
    """
    if any(axis.value in statistics for axis in Axis):
        return dict(statistics)
    found = {axis.value: measured(statistics, width_key(axis, scoring)) for axis in ALWAYS}
    if (key := width_key(Axis.EXPERTS, scoring)) in statistics:
        found[Axis.EXPERTS.value] = statistics[key]
    if dropped:
        found[Axis.LAYERS.value] = layer_scores(statistics, scoring, dropped)
    return found


def layer_scores(statistics: Mapping[str, Tensor], scoring: Scoring, dropped: int) -> Tensor:
    """[L]: each layer's own score; or 0 for the block of `dropped` that matters least (of equals the first),
    1 for the other layers."""
    key = layer_key(scoring.layers)
    matrix = measured(statistics, key)
    layers = len(matrix) - 1
    if not 0 < dropped < layers:
        raise InputError(
            "so many layers cannot be dropped",
            value=f"{dropped} of {layers}",
            where="importance scores, axis layers",
            remedy="use the statistics of the model that is pruned",
        )
    length = dropped if scoring.contiguous else 1
    scores = matrix.diagonal(length)
    if not scores.isfinite().all():
        raise not_measured(key, f"dropping blocks of {length}")
    if not scoring.contiguous:
        return scores.clone()
    start = int(scores.argmin())
    result = torch.ones(layers)
    result[start : start + dropped] = 0
    return result


def width_key(axis: Axis, scoring: Scoring) -> str:
    """The name of the statistic that decides on an axis other than the layers."""
    return f"{axis}.probability" if axis is Axis.EXPERTS else f"{axis}.{scoring.aggregation}"


def measured(statistics: Mapping[str, Tensor], key: str) -> Tensor:
    """The statistic of that name; raises InputError if there is none."""
    if key not in statistics:
        raise not_measured(key, ", ".join(sorted(statistics)) or "nothing")
    return statistics[key]


def not_measured(key: str, value: str) -> InputError:
    """The refusal to decide by what is not there."""
    return InputError(
        f"the importance statistic {key} was not measured",
        value=value,
        where="importance statistics",
        remedy="calibrate again, with the `drops` that `Scoring.drops` names",
    )
