"""Which dimensions of which parameters must be cut together: torch-pruning's graph plus the rule for heads.

torch-pruning 1.6 hangs on grouped-query attention (its issues 516 and 527) and by default mixes rows of
different heads, so each attention block is replaced by one Linear(D, D) while the graph is traced:
it couples the residual stream through attention, and heads are our own index arithmetic. The graph
belongs to a narrow twin of the model, because what is coupled does not depend on the widths.

Legend: D hidden, F FFN size, G KV groups, q query heads a group, h head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from enum import StrEnum

import torch
import torch_pruning
from torch import Tensor, nn

from cascade.errors import CascadeError
from cascade.models.decoder import Decoder, find_parts
from cascade.pruning.child import child_config, empty_model


class Unit(StrEnum):
    """What the entries along a dimension stand for."""

    HIDDEN = "hidden"
    FFN = "ffn"
    QUERIES = "queries"
    KEYS = "keys"


Coupling = dict[str, dict[int, Unit]]


class StandIn(nn.Module):
    """Attention as the graph sees it: D channels in, D channels out, every one mixed with every other."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.mix = nn.Linear(hidden, hidden)

    def forward(self, hidden_states: Tensor, **_: object) -> tuple[Tensor, None]:
        """[B, T, D] to [B, T, D]; the second value is where attention returns its weights."""
        return self.mix(hidden_states), None


def couple(decoder: Decoder) -> Coupling:
    """For every parameter of `decoder`, by its name, what each dimension that can be cut stands for."""
    coupling = trace(decoder)
    names = names_of(decoder.model)
    for layer in decoder.layers:
        for linear, outputs, inputs in (
            (layer.q, Unit.QUERIES, Unit.HIDDEN),
            (layer.k, Unit.KEYS, Unit.HIDDEN),
            (layer.v, Unit.KEYS, Unit.HIDDEN),
            (layer.o, Unit.HIDDEN, Unit.QUERIES),
        ):
            coupling[names[id(linear.weight)]] = {0: outputs, 1: inputs}
            if linear.bias is not None:
                coupling[names[id(linear.bias)]] = {0: outputs}
    return coupling


@torch.enable_grad()
def trace(decoder: Decoder) -> Coupling:
    """The groups of the residual stream and of every FFN, found by torch-pruning on a narrow twin.

    Gradients are on because the graph follows autograd's.
    """
    twin = narrow_twin(decoder)
    blocks = replace_attention(twin)
    graph = torch_pruning.DependencyGraph().build_dependency(
        twin.model,
        example_inputs=torch.zeros(1, 2, dtype=torch.long, device=twin.model.device),
        forward_fn=lambda model, tokens: model(input_ids=tokens, use_cache=False).logits,
        verbose=False,
    )
    coupling: Coupling = {}
    stream = (twin.embeddings, torch_pruning.prune_embedding_out_channels, twin.embeddings.embedding_dim)
    collect(coupling, graph, stream, Unit.HIDDEN)
    for layer in twin.layers:
        neurons = (layer.gate, torch_pruning.prune_linear_out_channels, layer.gate.out_features)
        collect(coupling, graph, neurons, Unit.FFN)
    for block in blocks:
        # The proof that the stream runs through this block, and so through q, k, v and o.
        if coupling.pop(f"{block}.mix.weight", None) != {0: Unit.HIDDEN, 1: Unit.HIDDEN}:
            raise misunderstood(f"the residual stream does not run through {block}")
        del coupling[f"{block}.mix.bias"]
    return coupling


def narrow_twin(decoder: Decoder) -> Decoder:
    """A model with the parent's layers and names, but only a few channels wide; its weights are not set."""
    shape = decoder.architecture
    target = replace(shape, hidden=2 * shape.heads_per_group, ffn=2, kv_groups=1)
    config = child_config(decoder.model.config, target, range(shape.layers))
    return find_parts(empty_model(decoder.model, config))


def replace_attention(twin: Decoder) -> list[str]:
    """Put a stand-in for each attention block of `twin`; returns the blocks' paths."""
    paths = {id(module): path for path, module in twin.model.named_modules()}
    blocks = [paths[id(layer.attention)] for layer in twin.layers]
    for block in blocks:
        stand_in = StandIn(twin.embeddings.embedding_dim).to(twin.model.device, twin.model.dtype)
        twin.model.set_submodule(block, stand_in)
    return blocks


def collect(
    coupling: Coupling,
    graph: torch_pruning.DependencyGraph,
    root: tuple[nn.Module, Callable[..., nn.Module], int],
    unit: Unit,
) -> None:
    """Add every parameter dimension that is cut with `root`: a module, how it is cut, its size."""
    module, cut, size = root
    every = list(range(size))
    names = names_of(graph.model)
    for dependency, indices in graph.get_pruning_group(module, cut, idxs=every):
        target = dependency.target.module
        for parameter, dimension in cut_dimensions(
            target, graph.is_out_channel_pruning_fn(dependency.handler)
        ):
            if indices != every:
                raise misunderstood(f"channels change their order before {dependency.target.name}")
            coupling.setdefault(names[id(parameter)], {})[dimension] = unit


def names_of(model: nn.Module) -> dict[int, str]:
    """Names by the identity of the parameter; tied embeddings go by their first name."""
    return {id(parameter): name for name, parameter in model.named_parameters()}


def cut_dimensions(module: nn.Module | nn.Parameter, outputs: bool) -> list[tuple[Tensor, int]]:
    """The parameters that lose entries, and along which dimension, when `module` loses outputs or inputs."""
    if isinstance(module, nn.Parameter):
        return [(module, 0)]
    if isinstance(module, nn.Embedding):
        return [(module.weight, 1)]
    if isinstance(module, nn.Linear):
        biases = [(module.bias, 0)] if outputs and module.bias is not None else []
        return [(module.weight, 0 if outputs else 1), *biases]
    if any(True for _ in module.parameters()):
        raise misunderstood(f"{type(module).__name__} is cut with its neighbours")
    return []


def misunderstood(what: str) -> CascadeError:
    """The structure passed the check of the parts, but its graph says something else."""
    return CascadeError(
        f"the dependency graph does not fit a Llama-like decoder: {what}",
        where="pruning",
        remedy="report this as a bug, with the parent's config.json",
    )
