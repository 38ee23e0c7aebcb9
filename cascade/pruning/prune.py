"""Cut a model down to a planned architecture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cascade.architecture import Architecture
from cascade.errors import InputError
from cascade.models.decoder import Decoder, decoder_of
from cascade.pruning.compensation import least_squares
from cascade.pruning.folding import fold_heads
from cascade.pruning.principal import principal_basis
from cascade.pruning.proof import proof_of
from cascade.pruning.repair import Repair, can_fit
from cascade.pruning.rotation import rotated
from cascade.pruning.selection import Kept, KeptRecord, select
from cascade.pruning.surgery import cut
from cascade.report import SILENT, Report


@dataclass(frozen=True)
class Surgery:
    """What happens beside the cut. rotate: hidden channels become principal components first."""

    rotate: bool = False
    repair: Repair = Repair.NONE


PLAIN = Surgery()


def prune(
    model: PreTrainedModel,
    target: Architecture,
    scores: Mapping[str, Tensor],
    *,
    surgery: Surgery = PLAIN,
    rows: Tensor | None = None,
    report: Report = SILENT,
) -> tuple[PreTrainedModel, KeptRecord]:
    """Cut `model` down to `target`, keeping what scores best; `model` itself is not changed.

    scores: as `cascade.importance.scores` returns them for this model. rows: calibration tokens [N, T] that a
    rotation and least squares look at. The child is a stock model of the same class, type and device; with
    plain surgery its logits equal those of `model` with the removed units masked, up to rounding. Returns it
    and what it keeps (`Kept.record`; of rotated channels their rank). Raises InputError for a decoder that is
    not understood, for an axis on which a cut would not be exact, and for scores of another model.
    """
    decoder = proved(model)
    proof_of(decoder).require(decoder.architecture, target, model.config.model_type)
    kept = select(scores, decoder.architecture, target)
    if surgery.rotate and target.hidden < decoder.architecture.hidden:
        decoder, kept = turned(decoder, kept, required(rows), report)
    replaced: dict[str, Tensor] = {}
    if surgery.repair is Repair.LEAST_SQUARES and can_fit(decoder.architecture, target):
        replaced = least_squares(decoder, kept, required(rows), report=report)
    elif surgery.repair is Repair.FOLD_HEADS:
        replaced = fold_heads(decoder, kept, scores)
    return cut(decoder, target, kept, replaced), kept.record()


def turned(decoder: Decoder, kept: Kept, rows: Tensor, report: Report) -> tuple[Decoder, Kept]:
    """The same model over its principal components, of which the first ones stay."""
    basis, _ = principal_basis(decoder.model, rows, kept.layers.tolist(), report=report)
    return proved(rotated(decoder, basis)), replace(kept, hidden=torch.arange(len(kept.hidden)))


def proved(model: PreTrainedModel) -> Decoder:
    """The model's parts, with the order of fused projections that was proved to be the right one."""
    decoder = decoder_of(model)
    return replace(decoder, anatomy=proof_of(decoder).anatomy)


def required(rows: Tensor | None) -> Tensor:
    """Calibration rows, where the surgery needs them; raises InputError when there are none."""
    if rows is None or rows.numel() == 0:
        raise InputError(
            "this surgery looks at calibration tokens, and there are none",
            where="prune",
            remedy="give rows of token ids",
        )
    return rows
