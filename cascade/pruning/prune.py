"""Cut a model down to a planned architecture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor
from transformers import PreTrainedModel

from cascade.architecture import Architecture
from cascade.models.decoder import decoder_of
from cascade.pruning.proof import proof_of
from cascade.pruning.selection import KeptRecord, select
from cascade.pruning.surgery import cut


def prune(
    model: PreTrainedModel, target: Architecture, scores: Mapping[str, Tensor]
) -> tuple[PreTrainedModel, KeptRecord]:
    """Cut `model` down to `target`, keeping what scores best; `model` itself is not changed.

    scores: as `cascade.importance.calibrate` returns them for this model. The child is a stock model of the
    same class, type and device, whose logits equal those of `model` with the removed units masked, up to
    rounding. Returns it and what it keeps (`Kept.record`). Raises InputError for a decoder that is not
    understood, for an axis on which a cut would not be exact, and for scores of another model.
    """
    decoder = decoder_of(model)
    proof = proof_of(decoder)
    proof.require(decoder.architecture, target, model.config.model_type)
    kept = select(scores, decoder.architecture, target)
    return cut(replace(decoder, anatomy=proof.anatomy), target, kept), kept.record()
