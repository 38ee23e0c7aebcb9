"""The cut itself: slice every parameter to the units that stay, and load them into a fresh model.

Legend: D hidden, D' the child's hidden, F FFN size, G KV groups, q query heads a group, h head size.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cascade.architecture import Architecture
from cascade.models.decoder import Decoder, decoder_of
from cascade.pruning.child import build_child, child_config, require_shape
from cascade.pruning.coupling import Unit, couple, names_of
from cascade.pruning.selection import Kept, KeptRecord, select


def prune(
    model: PreTrainedModel, target: Architecture, scores: Mapping[str, Tensor]
) -> tuple[PreTrainedModel, KeptRecord]:
    """Cut `model` down to `target`, keeping what scores best; `model` itself is not changed.

    scores: as `cascade.importance.calibrate` returns them for this model. The child is a stock model of the
    same class, type and device, whose logits equal those of `model` with the removed units masked, up to
    rounding. Returns it and what it keeps (`Kept.record`). Raises InputError for a decoder that is not
    understood and for scores of another model.
    """
    decoder = decoder_of(model)
    kept = select(scores, decoder.architecture, target)
    config = child_config(model.config, target, kept.layers)
    child = build_child(model, config, child_state(decoder, target, kept))
    require_shape(child, target)
    return child, kept.record()


@torch.no_grad()
def child_state(decoder: Decoder, target: Architecture, kept: Kept) -> dict[str, Tensor]:
    """The child's state dict: every tensor that stays, sliced, under its name in the child."""
    coupling, factors = couple(decoder), norm_factors(decoder, target)
    stack = next(path for path, module in decoder.model.named_modules() if module is decoder.stack)
    position = {f"{stack}.{layer}.": place for place, layer in enumerate(kept.layers)}
    indices = [layer_indices(decoder, kept, place) for place in range(target.layers)]
    names = names_of(decoder.model)
    state: dict[str, Tensor] = {}
    for name, parameter in decoder.model.named_parameters(remove_duplicate=False):
        known = names[id(parameter)]
        prefix = next((prefix for prefix in position if name.startswith(prefix)), "")
        if not prefix and name.startswith(f"{stack}."):
            continue
        renamed = f"{stack}.{position[prefix]}.{name.removeprefix(prefix)}" if prefix else name
        if known != name:
            # The second name of a tied tensor: the same slice, not a copy of it.
            state[renamed] = state[known]
            continue
        chosen = indices[position.get(prefix, 0)]
        state[renamed] = keep_units(parameter, coupling.get(name, {}), chosen, factors.get(name, 1.0))
    return state


def layer_indices(decoder: Decoder, kept: Kept, place: int) -> dict[Unit, Tensor]:
    """The entries that stay in the child's layer `place`; the hidden channels are the same in every layer.

    KV group g owns the keys and values g*h .. (g+1)*h - 1 and the queries g*q*h .. (g+1)*q*h - 1.
    """
    shape, device = decoder.architecture, decoder.model.device
    groups = torch.tensor(kept.kv_groups[place], device=device)[:, None]
    keys = torch.arange(shape.head_size, device=device)
    queries = torch.arange(shape.heads_per_group * shape.head_size, device=device)
    return {
        Unit.HIDDEN: torch.tensor(kept.hidden, device=device),
        Unit.FFN: torch.tensor(kept.ffn[place], device=device),
        Unit.KEYS: (groups * len(keys) + keys).flatten(),
        Unit.QUERIES: (groups * len(queries) + queries).flatten(),
    }


def keep_units(
    parameter: Tensor, dimensions: Mapping[int, Unit], indices: Mapping[Unit, Tensor], factor: float
) -> Tensor:
    """A copy of `parameter` with the chosen entries along each dimension, times `factor`."""
    kept = parameter
    for dimension, unit in dimensions.items():
        if len(indices[unit]) < kept.shape[dimension]:
            kept = kept.index_select(dimension, indices[unit])
    # Scaled in float32: a gain in bfloat16 should be rounded once.
    if factor != 1.0:
        return (kept.float() * factor).to(parameter.dtype)
    return kept.clone() if kept is parameter else kept


def norm_factors(decoder: Decoder, target: Architecture) -> dict[str, float]:
    """What keeps every RMSNorm exact when only D' of D channels are left, by parameter name.

    With the removed channels masked, the parent divides by sqrt(s/D + e), where s is the sum of the kept
    squares. The child's norm divides by sqrt(s/D' + e'), which is sqrt(D/D') times as much for e' = e * D/D'
    (set in `child_config`); gains times sqrt(D/D') make up for it. The q and k norms share that e' but
    keep their size h: there it is the input that is scaled, as norm(c*x, c^2*e) = norm(x, e).
    """
    factor = (decoder.architecture.hidden / target.hidden) ** 0.5
    if factor == 1.0:
        return {}
    scaled: list[nn.Module] = [decoder.final_norm]
    for layer in decoder.layers:
        scaled += [layer.input_norm, layer.ffn_norm]
        scaled += [layer.q] if layer.q_norm else []
        scaled += [layer.k] if layer.k_norm else []
    chosen = {id(parameter) for module in scaled for parameter in module.parameters()}
    return {name: factor for name, parameter in decoder.model.named_parameters() if id(parameter) in chosen}
