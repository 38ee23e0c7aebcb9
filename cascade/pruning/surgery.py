"""The cut itself: slice every parameter to the units that stay, and load them into a fresh model."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cascade.architecture import Architecture
from cascade.models.anatomy import within
from cascade.models.decoder import Decoder
from cascade.models.entries import keep
from cascade.pruning.child import build_child, child_config, require_shape
from cascade.pruning.rescaling import changes, keep_embedding_scale
from cascade.pruning.selection import Kept


def cut(decoder: Decoder, target: Architecture, kept: Kept) -> PreTrainedModel:
    """A stock model of the same class, type and device with the units in `kept`; `decoder` is not changed."""
    config = child_config(decoder, target, kept.layers.tolist())
    child = build_child(decoder.model, config, child_state(decoder, target, kept))
    keep_embedding_scale(decoder, require_shape(child, decoder.anatomy, target))
    return child


@torch.no_grad()
def child_state(decoder: Decoder, target: Architecture, kept: Kept) -> dict[str, Tensor]:
    """The child's parameters by name: what stays of each, scaled where a norm asks for it."""
    stack, device = decoder.anatomy.stack, decoder.model.device
    places = {layer: place for place, layer in enumerate(kept.layers.tolist())}
    chosen = [kept.of_layer(place, device) for place in range(target.layers)]
    in_layer, outside = changes(decoder, target)
    state: dict[str, Tensor] = {}
    for name, parameter, dimensions, layer in decoder.parameters():
        if layer is not None and layer not in places:
            continue
        place = 0 if layer is None else places[layer]
        own = within(name, stack)
        renamed = name if layer is None else f"{stack}.{place}.{own}"
        change = outside.get(name) if layer is None else in_layer.get(own)
        values = keep(parameter, dimensions, chosen[place], decoder.architecture)
        if change:
            values = change(values)
        state[renamed] = values.clone() if values is parameter else values
    return state
