"""Every parameter as rows, one for each unit of an axis, so that torch-pruning's importance can score them.

torch-pruning's own graph hangs on grouped queries and does not see through fused projections or stacked
experts; the anatomy does. What it says belongs to one unit becomes one row of a Linear, and all Linears with
the units of one axis are one group, which torch-pruning's scorers take as if its graph had found it.

Legend: n units, m entries of a unit along its dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
import torch_pruning
from torch import Tensor, nn

from cascade.architecture import Sizes
from cascade.models.anatomy import Dimensions
from cascade.models.decoder import Decoder
from cascade.models.entries import Chosen, Entries, positions_of
from cascade.planning.axes import Axis
from cascade.pruning.selection import score_shapes

Scorer = Callable[[torch_pruning.dependency.Group], Tensor]
GROUP = (Entries.QUERIES, Entries.KEYS, Entries.HEADS, Entries.QKV_BLOCKS, Entries.QKV_GROUPS)
# Which kinds of dimensions have entries of an axis's units. The keys of a group belong to all of its heads
# alike; where they are fused with the queries they are added to each, and the order within a group stays.
ENTRIES: dict[Axis, tuple[Entries, ...]] = {
    Axis.HIDDEN: (Entries.HIDDEN,),
    Axis.FFN: (Entries.FFN, Entries.FFN_HALVES, Entries.FFN_PAIRS),
    Axis.KV_GROUPS: GROUP,
    Axis.HEADS_PER_GROUP: tuple(entries for entries in GROUP if entries is not Entries.KEYS),
    Axis.EXPERTS: (Entries.EXPERTS,),
}


def group_scores(decoder: Decoder, scorer: Scorer) -> dict[Axis, Tensor]:
    """Scores of every axis that the decoder has, as `score_shapes` says; its anatomy must be a proven one."""
    shapes = score_shapes(decoder.architecture)
    scores = {Axis.LAYERS: scorer(layer_group(decoder))}
    for axis in ENTRIES:
        if axis.size(decoder.architecture) > 1:
            groups = [scorer(group) for group in axis_groups(decoder, axis)]
            scores[axis] = torch.stack(groups).reshape(shapes[axis])
    return scores


def axis_groups(decoder: Decoder, axis: Axis) -> Iterable[torch_pruning.dependency.Group]:
    """One group for the whole network of hidden channels, one for each layer of anything else."""
    sizes = decoder.architecture
    positions = {entries: unit_positions(axis, entries, sizes) for entries in ENTRIES[axis]}
    everything = [(parameter, at, layer) for _, parameter, at, layer in decoder.parameters()]
    for index in [None] if axis is Axis.HIDDEN else range(sizes.layers):
        own = [(parameter, at) for parameter, at, layer in everything if index is None or layer == index]
        yield group_of(
            tuple(
                None if values is None else units_first(values, at, place, positions[entries])
                for values in (parameter, parameter.grad)
            )
            for parameter, at in own
            for place, entries in enumerate(at)
            if entries in positions
        )


def layer_group(decoder: Decoder) -> torch_pruning.dependency.Group:
    """Whole layers as units: every parameter of a layer is one row."""
    columns = [[layer.get_parameter(name) for layer in decoder.layers] for name in decoder.anatomy.layer]
    return group_of((stacked(column), stacked([p.grad for p in column])) for column in columns)


def stacked(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """[n, entries], None without gradients."""
    rows = [tensor.detach().flatten() for tensor in tensors if tensor is not None]
    return torch.stack(rows) if rows else None


def unit_positions(axis: Axis, entries: Entries, sizes: Sizes) -> Tensor:
    """Where the entries of each unit lie along a dimension: [n, m]."""
    none, every = torch.arange(0), torch.arange(sizes.heads_per_group)[None]
    nothing = Chosen(hidden=none, ffn=none, kv_groups=none, heads_per_group=every[:0], experts=none)
    found = []
    for unit in range(axis.size(sizes) if axis is not Axis.HEADS_PER_GROUP else sizes.heads):
        one = torch.tensor([unit])
        chosen = {
            Axis.HIDDEN: replace(nothing, hidden=one),
            Axis.FFN: replace(nothing, ffn=one),
            Axis.KV_GROUPS: replace(nothing, kv_groups=one, heads_per_group=every),
            Axis.HEADS_PER_GROUP: replace(
                nothing,
                kv_groups=one // sizes.heads_per_group,
                heads_per_group=one[None] % sizes.heads_per_group,
            ),
            Axis.EXPERTS: replace(nothing, experts=one),
        }[axis]
        found.append(positions_of(entries, chosen, sizes))
    return torch.stack(found)


def units_first(values: Tensor, dimensions: Dimensions, place: int, positions: Tensor) -> Tensor:
    """`values` as rows, one for each unit along dimension `place`; neurons of experts expert by expert."""
    units = values.detach().index_select(place, positions.flatten().to(values.device))
    units = units.unflatten(place, tuple(positions.shape))
    if Entries.EXPERTS in dimensions and dimensions[place] in ENTRIES[Axis.FFN]:
        return units.movedim(place, 1).flatten(0, 1).flatten(1)
    return units.movedim(place, 0).flatten(1)


def group_of(rows: Iterable[tuple[Tensor | None, ...]]) -> torch_pruning.dependency.Group:
    """Weights [n, ...] and their gradients as one group of coupled Linears with n outputs each."""
    group, how = torch_pruning.dependency.Group(), torch_pruning.prune_linear_out_channels
    for weight, gradient in rows:
        if weight is None:
            continue
        linear = nn.Linear(1, 1, bias=False, device="meta")
        linear.weight = nn.Parameter(weight.float(), requires_grad=False)
        linear.weight.grad = None if gradient is None else gradient.float()
        node = torch_pruning.dependency.Node(linear, grad_fn=None)
        every = list(range(len(weight)))
        group.add_dep(torch_pruning.dependency.Dependency(how, how, node, node), every)
        group[-1].root_idxs = every
    return group
