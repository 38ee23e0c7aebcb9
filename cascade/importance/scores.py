"""Score a model's axes by the method that a recipe names."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import torch
from torch import Tensor
from torch_pruning.pruner.importance import GroupMagnitudeImportance, GroupTaylorImportance
from transformers import PreTrainedModel

from cascade.errors import InputError
from cascade.importance.calibration import Calibration, calibrate, evaluating, require_rows
from cascade.importance.coupled import group_scores
from cascade.importance.method import Method
from cascade.models.decoder import Decoder, decoder_of
from cascade.planning.axes import Axis
from cascade.pruning.proof import proof_of
from cascade.pruning.selection import score_shapes
from cascade.report import SILENT, Report


def score(
    model: PreTrainedModel,
    rows: Tensor,
    method: Method,
    *,
    drops: Collection[int] = (),
    seed: int = 0,
    report: Report = SILENT,
) -> Calibration:
    """What every axis could lose by a method: pass the statistics on to `scores_of`.

    ACTIVATION has the statistics of `calibrate`; the others scores by `Axis` value, float32 on the CPU, in
    the shapes of `score_shapes`. rows: token ids [N, T]; only ACTIVATION and TAYLOR look at them. drops:
    block lengths of layers that ACTIVATION really drops. seed: of RANDOM. Raises InputError for no rows and
    for activations or gradients that are not finite.
    """
    if method is Method.ACTIVATION:
        return calibrate(model, rows, drops=drops, report=report)
    decoder = decoder_of(model)
    if method is Method.RANDOM:
        return Calibration(as_record(random_scores(decoder, seed)))
    decoder = replace(decoder, anatomy=proof_of(decoder).anatomy)
    if method is Method.MAGNITUDE:
        return Calibration(as_record(group_scores(decoder, GroupMagnitudeImportance(normalizer=None))))
    return Calibration(as_record(taylor_scores(decoder, rows, report)))


def as_record(scores: dict[Axis, Tensor]) -> dict[str, Tensor]:
    """By the axes' values, ready to be stored."""
    return {axis.value: values.float().cpu() for axis, values in scores.items()}


def random_scores(decoder: Decoder, seed: int) -> dict[Axis, Tensor]:
    """Uniform draws: the control that every other method has to beat."""
    draw = torch.Generator().manual_seed(seed)
    shapes = score_shapes(decoder.architecture)
    return {axis: torch.rand(shape, generator=draw) for axis, shape in shapes.items()}


def taylor_scores(decoder: Decoder, rows: Tensor, report: Report) -> dict[Axis, Tensor]:
    """Sum over a unit's weights of |weight * gradient|, the mean over the coupled parameters.

    First-order change of the mean cross-entropy (Molchanov et al., CVPR 2019, equation 8), by torch-pruning.

    Gradients are summed over the rows one at a time, so memory does not grow with N. At the end it is that of
    the model about four times: weights and gradients, and the two as float32 rows of the units of one axis.
    """
    require_rows(rows)
    model = decoder.model
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        model.requires_grad_(True)
        with evaluating(model), torch.enable_grad():
            for done, row_T in enumerate(rows, 1):
                ids = row_T.long().to(model.device)[None]
                (model(input_ids=ids, labels=ids, use_cache=False).loss / len(rows)).backward()
                report.progress(done * rows.shape[1], rows.numel(), "tokens")
        require_finite_gradients(decoder)
        return group_scores(decoder, GroupTaylorImportance(normalizer=None))
    finally:
        for parameter, before in wanted.items():
            parameter.grad = None
            parameter.requires_grad_(before)


def require_finite_gradients(decoder: Decoder) -> None:
    """Raise InputError that names the first parameter whose gradient is not finite."""
    for name, parameter, _, _ in decoder.parameters():
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            raise InputError(
                "the gradients of the calibration pass are not finite",
                value=name,
                where="calibration",
                remedy="load the model in float32, or check its weights: it is damaged or overflows",
            )
