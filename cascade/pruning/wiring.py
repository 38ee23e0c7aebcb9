"""Which matrices read the residual stream, and which norm each of them reads it through.

No list of models: a miniature of the class runs once, and a module reads a norm if one of its inputs lies in
the memory of that norm's output. What that does not see, such as an output that is copied first or added to
the stream as well, `cascade.pruning.rotation` finds out by comparing logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from cascade.models.anatomy import Dimensions, Misfit, is_router, within
from cascade.models.decoder import Decoder, layer_index
from cascade.models.entries import Entries
from cascade.models.norms import NormKind

TOKENS = 8


@dataclass(frozen=True)
class Wiring:
    """The path of the norm that a module reads, by the module's path.

    layer: both paths within a layer, the same in every one; outer: both in full. A module that reads the
    stream itself is in neither.
    """

    layer: Mapping[str, str]
    outer: Mapping[str, str]

    def norm_of(self, module: str, stack: str) -> str:
        """Full path of the norm that the module at the full path `module` reads; "" for none."""
        layer = layer_index(module, stack)
        if layer is None:
            return self.outer.get(module, "")
        norm = self.layer.get(within(module, stack), "")
        return norm and f"{stack}.{layer}.{norm}"


def wiring_of(small: Decoder) -> Wiring | Misfit:
    """The wiring of a class, seen in a miniature of it, or why its stream cannot be turned."""
    norms = norms_by_path(small)
    problem = unturnable(small, norms)
    if problem:
        return Misfit(problem)
    read = readings(small, norms)
    several = [module for module, found in read.items() if len(found) > 1]
    if several:
        return Misfit(f"{several[0]} reads more than one norm")
    pairs = {module: next(iter(found)) for module, found in read.items()}
    idle = [path for path in norms if path not in pairs.values()]
    if idle:
        return Misfit(f"the output of {idle[0]} goes into no matrix that could take up its gain")
    return divided(pairs, small.anatomy.stack)


def norms_by_path(decoder: Decoder) -> dict[str, tuple[nn.Module, NormKind]]:
    """Every norm over hidden channels and its kind, by its full path."""
    paths = {module: path for path, module in decoder.model.named_modules()}
    return {paths[module]: (module, kind) for module, kind in decoder.hidden_norms}


def unturnable(decoder: Decoder, norms: Mapping[str, tuple[nn.Module, NormKind]]) -> str:
    """What the names and shapes alone tell against a rotation, or ""."""
    centred = [path for path, (_, kind) in norms.items() if kind is NormKind.LAYER]
    if centred:
        return f"{centred[0]} is a LayerNorm, which subtracts a mean over channels"
    if decoder.anatomy.form.bound:
        return "it binds hidden channels to heads, so that channels cannot be cut alone"
    for name, module, dimensions in stream_parameters(decoder):
        if name.rpartition(".")[0] in norms:
            continue
        plain = isinstance(module, nn.Linear | Conv1D | nn.Embedding)
        if not plain and Entries.EXPERTS not in dimensions:
            return f"{name} has an entry for each hidden channel and is neither a matrix nor its bias"
    return ""


def stream_parameters(decoder: Decoder) -> Iterator[tuple[str, nn.Module, Dimensions]]:
    """Full name, module and dimensions of every parameter with a dimension of hidden channels."""
    for name, _, dimensions, _ in decoder.parameters():
        if Entries.HIDDEN in dimensions:
            yield name, decoder.model.get_submodule(name.rpartition(".")[0]), dimensions


def read_along(name: str, module: nn.Module, dimensions: Dimensions) -> int | None:
    """The dimension along which a parameter takes hidden channels in; None for one that only puts them out.

    Stacked experts have no layout of their own to ask: what is fused with the FFN's gates reads.
    """
    if isinstance(module, nn.Linear | Conv1D):
        place = 0 if isinstance(module, Conv1D) else 1
        return place if len(dimensions) == 2 and dimensions[place] is Entries.HIDDEN else None
    fused = Entries.FFN_HALVES in dimensions or Entries.FFN_PAIRS in dimensions
    return dimensions.index(Entries.HIDDEN) if fused or is_router(name, dimensions) else None


@dataclass
class Watch:
    """Hooks that note which module is given which norm's output."""

    read: dict[str, set[str]] = field(default_factory=dict)
    # Outputs are kept, because memory that is freed would be used again at the same address.
    outputs: dict[int, tuple[str, Tensor]] = field(default_factory=dict)

    def norm(self, path: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        """A forward hook for the norm at `path`."""

        def put_out(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            self.outputs[output.untyped_storage().data_ptr()] = (path, output)

        return put_out

    def reader(self, path: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        """A forward pre-hook with keywords for the module at `path`."""

        def take_in(module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            for value in (*inputs, *keywords.values()):
                if isinstance(value, Tensor):
                    address = value.untyped_storage().data_ptr()
                    if address in self.outputs:
                        self.read.setdefault(path, set()).add(self.outputs[address][0])

        return take_in


def readings(decoder: Decoder, norms: Mapping[str, tuple[nn.Module, NormKind]]) -> dict[str, set[str]]:
    """Full paths of the norms that each module with a reading matrix is given, from one forward pass."""
    watch, model = Watch(), decoder.model
    names = {module: path for path, module in model.named_modules()}
    found = stream_parameters(decoder)
    readers = {module for name, module, at in found if read_along(name, module, at) is not None}
    with ExitStack() as stack:
        for path, (norm, _) in norms.items():
            stack.callback(norm.register_forward_hook(watch.norm(path)).remove)
        # A tied head owns no parameter by name, and reads all the same.
        for module in readers | {decoder.head}:
            hook = watch.reader(names[module])
            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        device = decoder.embeddings.weight.device
        model(input_ids=torch.arange(TOKENS, device=device)[None], use_cache=False)
    return watch.read


def divided(pairs: Mapping[str, str], stack: str) -> Wiring | Misfit:
    """Readers and their norms, both by full path, as the wiring of one layer and of what is outside."""
    layers: dict[int, dict[str, str]] = {}
    outer: dict[str, str] = {}
    for module, norm in pairs.items():
        layer = layer_index(module, stack)
        if layer != layer_index(norm, stack):
            return Misfit(f"{module} reads {norm}, which is in another layer")
        if layer is None:
            outer[module] = norm
        else:
            layers.setdefault(layer, {})[within(module, stack)] = within(norm, stack)
    first = layers.get(0, {})
    if any(layer != first for layer in layers.values()):
        return Misfit("its layers are wired in different ways")
    return Wiring(first, outer)
