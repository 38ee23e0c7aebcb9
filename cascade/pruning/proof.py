"""Proof that a cut is exact, axis by axis, on a miniature of the model's own class.

The miniature has random weights. For every axis it is cut, and the child's logits are compared with those
of the miniature with the removed units masked: weights that read or write them are zero, a removed expert's
router logit is minus infinity, a removed layer returns its input. So a class that computes something else
than its sizes suggest is found out, whatever it is called; and of the two orders that a fused projection may
have, the one that passes is the right one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig, PreTrainedModel

from cascade.architecture import Architecture, Sizes
from cascade.errors import CascadeError, InputError
from cascade.models.anatomy import Anatomy, miniature
from cascade.models.configs import BUILD_ERRORS
from cascade.models.decoder import Decoder, decoder_with
from cascade.models.entries import OTHER_ORDER, Entries, positions_of
from cascade.models.norms import NormKind
from cascade.planning.axes import Axis
from cascade.pruning.selection import Kept, score_shapes, select
from cascade.pruning.surgery import cut

TOLERANCE = 1e-4
"""Of logits, relative to the largest of them: float32 rounding over two layers is about 1e-6."""
TOKENS = 8
# Masked by zeros. In fused projections they would have to be found by what is to be proved.
PLAIN = (Entries.HIDDEN, Entries.FFN, Entries.QUERIES, Entries.KEYS)


@dataclass(frozen=True)
class Proof:
    """anatomy: with the right order of fused projections. refused: why an axis cannot be cut exactly."""

    anatomy: Anatomy
    refused: dict[Axis, str] = field(default_factory=dict)

    def require(self, source: Sizes, target: Sizes, model_type: str) -> None:
        """Raise InputError unless every axis on which the two differ has passed."""
        for axis, reason in self.refused.items():
            if axis.size(source) != axis.size(target):
                raise InputError(
                    f"this decoder cannot be cut exactly on the axis {axis}: {reason}",
                    value=model_type,
                    where="prune.axes",
                    remedy=f"cut other axes: {self.others()}",
                )

    def others(self) -> str:
        """The axes that have passed, for a person."""
        return ", ".join(axis for axis in Axis if axis not in self.refused) or "there are none"


_known: dict[tuple[type[PreTrainedModel], str], Proof] = {}


def proof_of(decoder: Decoder) -> Proof:
    """What was proved of the class of `decoder`; done once in a process, in about a second."""
    config = decoder.model.config
    key = (type(decoder.model), config.to_json_string(use_diff=False))
    if key not in _known:
        _known[key] = _prove(decoder)
    return _known[key]


def _prove(decoder: Decoder) -> Proof:
    anatomy, refused = decoder.anatomy, dict[Axis, str]()
    small = random_miniature(decoder)
    for axis in Axis:
        source = decoder_with(small, anatomy).architecture
        target = smaller(source, axis)
        if target == source:
            refused[axis] = "it has only one of them" if axis.size(source) else "it has none"
            continue
        differences = []
        for candidate in orders(anatomy, axis):
            differences.append(difference(decoder_with(small, candidate), target))
            if not differences[-1]:
                anatomy = candidate
                break
        else:
            refused[axis] = differences[0]
    return Proof(anatomy, refused)


def random_miniature(decoder: Decoder, config: PreTrainedConfig | None = None) -> PreTrainedModel:
    """On the CPU, no gain or bias at its constant; the random state outside stays as it is.

    config: with other options than the decoder's own.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        model = miniature(type(decoder.model), config or decoder.model.config, decoder.anatomy.form).model
        for parameter in model.parameters():
            nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.2)
    return model.requires_grad_(False)


def smaller(source: Architecture, axis: Axis) -> Architecture:
    """A cut of the miniature on one axis, or on two where the class binds channels to heads."""
    sizes = {
        Axis.LAYERS: 1,
        Axis.HIDDEN: source.hidden - 2 * source.heads,
        Axis.FFN: source.ffn - 12,
        Axis.KV_GROUPS: source.kv_groups * 2 // 3,
        Axis.HEADS_PER_GROUP: max(1, source.heads_per_group - 1),
        Axis.EXPERTS: max(0, source.experts - 2),
    }
    if not source.counts.bound:
        return with_size(source, axis, sizes[axis])
    through = Axis.KV_GROUPS if axis is Axis.HIDDEN else axis
    target = with_size(source, through, sizes[through])
    return replace(target, hidden=target.queries)


def with_size(source: Architecture, axis: Axis, size: int) -> Architecture:
    """The same with another size on one axis."""
    changed: dict[str, Any] = {axis.value: size}
    return replace(source, **changed)


def orders(anatomy: Anatomy, axis: Axis) -> Iterator[Anatomy]:
    """The anatomy, then the same with the other order of what the axis may find fused."""
    yield anatomy
    for entries in OTHER_ORDER:
        ffn = entries is Entries.FFN_HALVES
        if anatomy.has(entries) and (axis is Axis.FFN) == ffn:
            yield anatomy.swapped(entries)


def difference(decoder: Decoder, target: Architecture) -> str:
    """How the cut model differs from the masked one, or "" if it does not."""
    source, tokens = decoder.architecture, torch.arange(TOKENS)[None]
    draw = torch.Generator().manual_seed(1)
    scores = {axis.value: torch.rand(shape, generator=draw) for axis, shape in score_shapes(source).items()}
    # The last layer stays, so that it gets another number.
    scores[Axis.LAYERS.value] = torch.arange(source.layers).float()
    kept = select(scores, source, target)
    try:
        with torch.no_grad():
            found = cut(decoder, target, kept)(input_ids=tokens, use_cache=False).logits
            with masked(decoder, kept) as model:
                expected = model(input_ids=tokens, use_cache=False).logits
            whole = decoder.model(input_ids=tokens, use_cache=False).logits
    except (*BUILD_ERRORS, CascadeError) as error:
        return f"the cut model does not run ({' '.join(str(error).split())[:200]})"
    size = max(1.0, whole.abs().max().item())
    apart = (found - expected).abs().max().item()
    if not apart <= TOLERANCE * size:
        return f"a cut miniature differs from a masked one by {apart:.2g} in logits up to {size:.2g}"
    moved = (whole - expected).abs().max().item()
    return "" if moved > 10 * TOLERANCE * size else "masking it changes nothing"


@contextmanager
def masked(decoder: Decoder, kept: Kept) -> Iterator[PreTrainedModel]:
    """A copy of the model that computes as if the removed units were not there."""
    model = copy.deepcopy(decoder.model)
    twin = decoder_with(model, decoder.anatomy)
    stays = {layer: place for place, layer in enumerate(kept.layers.tolist())}
    for _, parameter, dimensions, layer in twin.parameters():
        if layer is None or layer in stays:
            chosen = kept.of_layer(0 if layer is None else stays[layer], parameter.device)
            for dimension, entries in enumerate(dimensions):
                if entries in PLAIN:
                    silence(parameter, dimension, positions_of(entries, chosen, decoder.architecture))
    with ExitStack() as stack:
        for index, module in enumerate(twin.layers):
            if index not in stays:
                stack.callback(module.register_forward_hook(passes_through, with_kwargs=True).remove)
        if len(kept.hidden) < decoder.architecture.hidden:
            for norm, kind in twin.hidden_norms:
                if kind is NormKind.LAYER:
                    stack.callback(norm.register_forward_hook(over(kept.hidden)).remove)
        if decoder.anatomy.router:
            stack.enter_context(RemovedExperts(twin, kept))
        yield model


def silence(parameter: Tensor, dimension: int, positions: Tensor) -> None:
    """Zero all but `positions` along a dimension; [E, n] positions differ from expert to expert."""
    size = parameter.shape[dimension]
    if positions.shape[-1] == size:
        return
    mask = torch.zeros(*positions.shape[:-1], size).scatter(-1, positions, 1.0)
    shape = [1] * parameter.ndim
    shape[dimension] = size
    if positions.ndim == 2:
        shape[0] = parameter.shape[0]
    parameter.mul_(mask.view(shape))


def passes_through(
    module: nn.Module, inputs: tuple[Tensor, ...], keywords: dict[str, Any], output: object
) -> object:
    """A layer that is not there: its output is its input."""
    state = inputs[0] if inputs else keywords["hidden_states"]
    return (state, *output[1:]) if isinstance(output, tuple) else state


def over(channels: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    """A hook that takes a LayerNorm over some channels alone; the others come out as zero."""

    def normalise(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        gain, bias = module.get_parameter("weight"), getattr(module, "bias", None)
        epsilon: float = getattr(module, "eps", getattr(module, "variance_epsilon", 0.0))
        own_bias = None if bias is None else bias[channels]
        values = functional.layer_norm(
            inputs[0][..., channels], (len(channels),), gain[channels], own_bias, epsilon
        )
        return torch.zeros_like(output).index_copy(-1, channels, values)

    return normalise


class RemovedExperts(TorchFunctionMode):
    """Inside, routers see a logit of minus infinity for the experts that are not kept."""

    def __init__(self, decoder: Decoder, kept: Kept) -> None:
        super().__init__()
        self.gone: dict[int, Tensor] = {}
        for place, layer in enumerate(kept.layers.tolist()):
            router = decoder.layers[layer].get_submodule(decoder.anatomy.router)
            gone = torch.ones(decoder.architecture.experts, dtype=torch.bool)
            gone[kept.experts[place]] = False
            self.gone[id(router.get_parameter("weight"))] = gone

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Pass every call on; afterwards silence the logits of a router's product."""
        result = func(*args, **(kwargs or {}))
        if func is functional.linear and id(args[1]) in self.gone:
            return result.masked_fill(self.gone[id(args[1])], -torch.inf)
        return result
