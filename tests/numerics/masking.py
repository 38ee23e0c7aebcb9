"""The independent reference for a cut: the parent, whole, with the removed units silenced by hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

Kept = dict[str, list]


def keep_only(size: int, kept: list[int]) -> Tensor:
    """A mask [size] of ones at `kept`."""
    mask = torch.zeros(size)
    mask[kept] = 1
    return mask


def masks_output(mask: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    return lambda module, inputs, output: output * mask


def masks_input(mask: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    return lambda module, inputs: (inputs[0] * mask, *inputs[1:])


@contextmanager
def masked(model: PreTrainedModel, kept: Kept) -> Iterator[PreTrainedModel]:
    """Inside, `model` computes as if the removed units were not there.

    A removed channel is zero in the embeddings and in everything that is added to the residual stream, a
    removed neuron and a removed group's heads are zero before the projection that reads them, and a removed
    layer adds nothing.
    """
    config, handles = model.config, []
    hidden = keep_only(config.hidden_size, kept["hidden"])
    handles.append(model.get_input_embeddings().register_forward_hook(masks_output(hidden)))
    for index, layer in enumerate(model.get_decoder().layers):
        attention, ffn = layer.self_attn.o_proj, layer.mlp.down_proj
        stays = index in kept["layers"]
        stream = hidden * float(stays)
        for writer in (attention, ffn):
            handles.append(writer.register_forward_hook(masks_output(stream)))
        if stays:
            place = kept["layers"].index(index)
            neurons = keep_only(config.intermediate_size, kept["ffn"][place])
            groups = keep_only(config.num_key_value_heads, kept["kv_groups"][place])
            heads = groups.repeat_interleave(attention.in_features // config.num_key_value_heads)
            handles.append(ffn.register_forward_pre_hook(masks_input(neurons)))
            handles.append(attention.register_forward_pre_hook(masks_input(heads)))
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()
