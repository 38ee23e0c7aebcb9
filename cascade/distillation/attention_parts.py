"""The modules of a layer that make its queries, keys and values, by the anatomy of its class.

B rows, T tokens. What they put out is taken as it is: before norms of heads and before rotary positions.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from cascade.architecture import Sizes
from cascade.errors import InputError
from cascade.models.anatomy import linear_modules
from cascade.models.decoder import Decoder
from cascade.models.entries import Entries
from cascade.pruning.proof import proof_of

FUSED = (Entries.QKV_BLOCKS, Entries.QKV_GROUPS)


@dataclass(frozen=True)
class AttentionParts:
    """modules: those of queries, keys and values, or one for all three, whose order `fused` then is."""

    modules: tuple[nn.Module, ...]
    fused: Entries | None
    sizes: Sizes

    @property
    def channels(self) -> tuple[int, int, int]:
        """Of all queries, all keys and all values of a token."""
        return self.sizes.queries, self.sizes.keys, self.sizes.keys

    def split(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [.., Gqh], keys and values [.., Gh] of the modules' outputs."""
        if self.fused is None:
            queries, keys, values = outputs
            return queries, keys, values
        (joined,) = outputs
        if self.fused is Entries.QKV_BLOCKS:
            queries, keys, values = joined.split(self.channels, dim=-1)
            return queries, keys, values
        groups = joined.unflatten(-1, (self.sizes.kv_groups, -1, self.sizes.head_size))
        queries, keys, values = groups.split((self.sizes.heads_per_group, 1, 1), dim=-2)
        return queries.flatten(-3), keys.flatten(-3), values.flatten(-3)


def attention_parts(decoder: Decoder, layer: int) -> AttentionParts:
    """Of one layer; raises InputError where they cannot be told from what else the layer has."""
    anatomy = proof_of(decoder).anatomy
    found: dict[Entries, list[str]] = {}
    modules = dict[str, nn.Module]()
    for path, module, inputs_first in linear_modules(decoder.layers[layer]):
        sides = anatomy.layer.get(f"{path}.weight", ())
        if path == anatomy.attention_reader or len(sides) != 2 or sides[not inputs_first] != Entries.HIDDEN:
            continue
        modules[path] = module
        found.setdefault(sides[bool(inputs_first)], []).append(path)
    paths, fused = chosen(found)
    if not paths:
        raise InputError(
            "its queries, keys and values cannot be told apart",
            value=decoder.model.config.model_type,
            where="distill.hidden_states",
            remedy="set `hidden_states: cosine`, mse or off",
        )
    return AttentionParts(tuple(modules[path] for path in paths), fused, decoder.architecture)


def chosen(found: dict[Entries, list[str]]) -> tuple[list[str], Entries | None]:
    """The paths of queries, keys and values, or of the one fused module and its order; none if unclear.

    Sizes tell queries from keys where they differ. What they cannot tell is told by the alphabet: in
    k_proj, q_proj, v_proj as in key, query, value. Within one class a wrong name would do no harm, because
    the same is compared with the same.
    """
    kinds = {entries: sorted(paths) for entries, paths in found.items()}
    queries, keys = kinds.get(Entries.QUERIES, []), kinds.get(Entries.KEYS, [])
    fused = [entries for entries in FUSED if entries in kinds]
    if fused and not (queries or keys):
        (order, *others), (path, *more) = fused, kinds[fused[0]]
        return ([], None) if others or more else ([path], order)
    if len(queries) == 3 and not (keys or fused):
        return [queries[1], queries[0], queries[2]], None
    if len(queries) == 1 and len(keys) == 2 and not fused:
        return [*queries, *keys], None
    return [], None
