"""A fresh stock model from a shrunk config: what every cut ends with."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from cascade.architecture import Architecture
from cascade.errors import CascadeError
from cascade.models import configs
from cascade.models.anatomy import Anatomy
from cascade.models.decoder import Decoder, decoder_with
from cascade.models.norms import NormKind


def child_config(decoder: Decoder, target: Architecture, layers: Sequence[int]) -> PreTrainedConfig:
    """A copy of the parent's config with the sizes of `target`; `layers` are the parent's layers that stay.

    RMSNorm's epsilon is scaled by D / D', see `cascade.pruning.rescaling`.
    """
    parent = decoder.model.config
    child = configs.resized(parent, target, decoder.anatomy.form, layers)
    if has_rms_norms(decoder.anatomy):
        for field in configs.present(parent, configs.EPSILON_FIELDS):
            setattr(child, field, getattr(parent, field) * decoder.architecture.hidden / target.hidden)
    child.tie_word_embeddings = target.tied
    child.name_or_path = ""
    return child


def has_rms_norms(anatomy: Anatomy) -> bool:
    """Whether the norms of the class are RMSNorms."""
    return any(kind is not NormKind.LAYER for kind in anatomy.outer_norms.values())


def empty_model(like: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """A model of the class, type and device of `like` in eval mode, its weights allocated but not set."""
    with no_init_weights(), like.device:
        model: PreTrainedModel = type(like)._from_config(config, dtype=like.dtype)
    return model.eval()


def build_child(
    parent: PreTrainedModel, config: PreTrainedConfig, state: Mapping[str, Tensor]
) -> PreTrainedModel:
    """A fresh model of the parent's class with exactly the tensors of `state`, one for each parameter.

    Tied embeddings are one tensor again: slicing re-creates parameters, and two copies would drift apart
    with the first optimiser step. Raises CascadeError for a parameter that `state` lacks or has too much.
    """
    child = empty_model(parent, config)
    child.load_state_dict(state, strict=False, assign=True)
    child.tie_weights()
    names = {name for name, _ in child.named_parameters()}
    if names != set(state):
        raise CascadeError(
            "the cut does not fill the child",
            value=", ".join(sorted(names ^ set(state))[:3]),
            where="pruning",
            remedy="report this as a bug, with the parent's config.json",
        )
    child.generation_config = copy.deepcopy(parent.generation_config)
    return child


def require_shape(child: PreTrainedModel, anatomy: Anatomy, target: Architecture) -> Decoder:
    """The child's parts; raises CascadeError unless its shape, count and tying are those of the plan."""
    decoder = decoder_with(child, anatomy)
    counted = sum(parameter.numel() for parameter in child.parameters())
    if decoder.architecture != target or counted != target.parameters:
        raise CascadeError(
            "the pruned model is not what was planned",
            value=f"{counted} parameters, {decoder.architecture}",
            where=f"planned: {target.parameters}, {target}",
            remedy="report this as a bug, with the parent's config.json",
        )
    return decoder
