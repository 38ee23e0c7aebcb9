"""The independent reference for a cut: the parent, whole, with the removed units silenced by hooks.

It knows modules by the names they have in transformers, while the product knows none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

Kept = dict[str, Any]
ATTENTION_OUT = re.compile(r"(attn|attention)\.(o_proj|out_proj|c_proj|dense)$")
FFN_OUT = re.compile(r"(mlp\.(down_proj|c_proj|dense_4h_to_h)|fc2)$")
QUERIES_OR_KEYS = re.compile(r"self_attn\.([qk])_proj$")
POSITIONS = re.compile(r"(wpe|embed_positions)$")
ROUTER = re.compile(r"mlp\.(gate|router)$")


def keep_only(size: int, kept: list[int]) -> Tensor:
    """A mask [size] of ones at `kept`."""
    mask = torch.zeros(size)
    mask[kept] = 1
    return mask


def masks_output(mask: Tensor) -> Callable[[nn.Module, Any, Any], Any]:
    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        return (output[0] * mask, *output[1:]) if isinstance(output, tuple) else output * mask

    return hook


def masks_input(mask: Tensor) -> Callable[[nn.Module, Any], Any]:
    return lambda module, inputs: (inputs[0] * mask, *inputs[1:])


def norm_over(channels: list[int]) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    """A LayerNorm's mean and variance are those of the channels that stay."""

    def hook(module: Any, inputs: Any, output: Tensor) -> Tensor:
        x = inputs[0][..., channels].double()
        epsilon = module.eps if hasattr(module, "eps") else module.variance_epsilon
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + epsilon).sqrt()
        result = torch.zeros_like(output)
        bias = getattr(module, "bias", None)
        result[..., channels] = (
            x * module.weight[channels] + (0 if bias is None else bias[channels])
        ).float()
        return result

    return hook


def skips(module: nn.Module, inputs: Any, keywords: Any, output: Any) -> Any:
    """A layer that is not there."""
    state = inputs[0] if inputs else keywords["hidden_states"]
    return (state, *output[1:]) if isinstance(output, tuple) else state


@contextmanager
def masked(model: PreTrainedModel, kept: Kept) -> Iterator[PreTrainedModel]:
    """Inside, `model` computes as if the removed units were not there.

    A removed channel is zero in the embeddings and in everything that is added to the residual stream, a
    removed neuron and a removed head are zero before the projection that reads them, a removed layer is
    passed by, and a removed expert is never chosen.
    """
    hidden = keep_only(model.config.hidden_size, kept["hidden"])
    (layers,) = [m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and n.count(".") <= 2]
    with ExitStack() as stack:

        def hook(module: nn.Module, function: Any, before: bool = False) -> None:
            register = module.register_forward_pre_hook if before else module.register_forward_hook
            stack.callback(register(function).remove)

        hook(model.get_input_embeddings(), masks_output(hidden))
        centred = [m for m in model.modules() if "LayerNorm" in type(m).__name__]
        if len(kept["hidden"]) < len(hidden):
            for norm in centred:
                hook(norm, norm_over(kept["hidden"]))
        for name, module in model.named_modules():
            if POSITIONS.search(name):
                hook(module, masks_output(hidden))
        for index, layer in enumerate(layers):
            if index not in kept["layers"]:
                stack.callback(layer.register_forward_hook(skips, with_kwargs=True).remove)
                continue
            place = kept["layers"].index(index)
            heads = head_masks(model, kept, place)
            for name, module in layer.named_modules():
                if ATTENTION_OUT.search(name):
                    hook(module, masks_input(heads["q"]), before=True)
                    hook(module, masks_output(hidden))
                elif FFN_OUT.search(name):
                    size = next(size for size in module.weight.shape if size != len(hidden))
                    hook(module, masks_input(keep_only(size, kept["ffn"][place])), before=True)
                    hook(module, masks_output(hidden))
                elif match := QUERIES_OR_KEYS.search(name):
                    # Some norms of queries and keys reach over all heads.
                    hook(module, masks_output(heads[match[1]]))
                elif ROUTER.search(name):
                    hook(layer.mlp, masks_output(hidden))
                    stack.enter_context(removed_experts(model, layer, module, kept, place))
        yield model


def head_masks(model: PreTrainedModel, kept: Kept, place: int) -> dict[str, Tensor]:
    """Masks of the entries of all query heads and of all keys in a kept layer."""
    config = model.config
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    queries, keys = torch.zeros(groups, heads // groups, size), torch.zeros(groups, size)
    for group, chosen in zip(kept["kv_groups"][place], kept["heads_per_group"][place], strict=True):
        queries[group, chosen] = 1
        keys[group] = 1
    return {"q": queries.flatten(), "k": keys.flatten()}


@contextmanager
def removed_experts(
    model: PreTrainedModel, layer: nn.Module, router: nn.Module, kept: Kept, place: int
) -> Iterator[None]:
    """Removed experts get a router logit of minus infinity; removed neurons of the others write nothing."""
    experts = keep_only(model.config.num_local_experts, kept["experts"][place])
    gone = torch.zeros_like(experts).masked_fill(experts == 0, -torch.inf)
    mixture = layer.mlp.experts
    down = mixture.down_proj.clone()
    neuron_dimension = 2 if router.__class__.__name__ != "GptOssTopKRouter" else 1
    with torch.no_grad():
        for expert, neurons in zip(kept["experts"][place], kept["ffn"][place], strict=True):
            mask = keep_only(down.shape[neuron_dimension], neurons)
            shape = [1, 1]
            shape[neuron_dimension - 1] = -1
            mixture.down_proj[expert] *= mask.view(shape)
    plain = torch.nn.functional.linear

    def biased(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        result = plain(x, weight, bias)
        return result + gone if weight is router.weight else result

    torch.nn.functional.linear = biased
    try:
        yield
    finally:
        torch.nn.functional.linear = plain
        with torch.no_grad():
            mixture.down_proj.copy_(down)
