"""The cut itself: slice every parameter to the units that stay, and load them into a fresh model."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cascade.architecture import Architecture
from cascade.errors import CascadeError
from cascade.models.anatomy import within
from cascade.models.decoder import Decoder
from cascade.models.entries import keep
from cascade.pruning.child import build_child, child_config, require_shape
from cascade.pruning.rescaling import changes, keep_embedding_scale
from cascade.pruning.selection import Kept

NOTHING: Mapping[str, Tensor] = MappingProxyType({})


def cut(
    decoder: Decoder, target: Architecture, kept: Kept, replaced: Mapping[str, Tensor] = NOTHING
) -> PreTrainedModel:
    """A stock model of the same class, type and device with the units in `kept`; `decoder` is not changed.

    replaced: by full name, parameters that are sliced instead of the decoder's own, in its shapes and types.
    Raises CascadeError for one that the decoder does not have.
    """
    config = child_config(decoder, target, kept.layers.tolist())
    child = build_child(decoder.model, config, child_state(decoder, target, kept, replaced))
    keep_embedding_scale(decoder, require_shape(child, decoder.anatomy, target))
    return child


@torch.no_grad()
def child_state(
    decoder: Decoder, target: Architecture, kept: Kept, replaced: Mapping[str, Tensor] = NOTHING
) -> dict[str, Tensor]:
    """The child's parameters by name: what stays of each, scaled where a norm asks for it."""
    require_fitting(decoder, replaced)
    stack, device = decoder.anatomy.stack, decoder.model.device
    places = {layer: place for place, layer in enumerate(kept.layers.tolist())}
    chosen = [kept.of_layer(place, device) for place in range(target.layers)]
    in_layer, outside = changes(decoder, target)
    state: dict[str, Tensor] = {}
    for name, own_values, dimensions, layer in decoder.parameters():
        if layer is not None and layer not in places:
            continue
        place = 0 if layer is None else places[layer]
        own = within(name, stack)
        renamed = name if layer is None else f"{stack}.{place}.{own}"
        change = outside.get(name) if layer is None else in_layer.get(own)
        parameter = replaced.get(name, own_values)
        values = keep(parameter, dimensions, chosen[place], decoder.architecture)
        if change:
            values = change(values)
        state[renamed] = values.clone() if values is parameter else values
    return state


def require_fitting(decoder: Decoder, replaced: Mapping[str, Tensor]) -> None:
    """Raise CascadeError unless every replaced tensor stands for a parameter of its name, shape and type."""
    own = {name: (tuple(p.shape), p.dtype) for name, p, _, _ in decoder.parameters()}
    for name, values in replaced.items():
        if own.get(name) != (tuple(values.shape), values.dtype):
            raise CascadeError(
                "a replaced parameter does not fit the model that is cut",
                value=f"{name}: {tuple(values.shape)}, {values.dtype}",
                where=f"the model's own: {own.get(name)}",
                remedy="report this as a bug, with the parent's config.json",
            )
