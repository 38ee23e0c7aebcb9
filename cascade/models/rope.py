"""A config with other RoPE settings, where transformers 5 keeps them: `rope_parameters`, one for all layers
or one for each type of layer, and `max_position_embeddings`."""

from __future__ import annotations

import copy
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from cascade.errors import InputError
from cascade.models.positions import RopeSettings, RopeType

FULL_ATTENTION = "full_attention"
# Of Llama 3.1: wavelengths above original_length / LOW are scaled whole, those below original_length / HIGH
# not at all.
LOW, HIGH = 1.0, 4.0
# Kept scalings that say nothing about the length they reach, so that more positions change nothing else.
OPEN_ENDED = ("default", RopeType.LINEAR, RopeType.LLAMA3)


def extended_config(
    config: PreTrainedConfig, settings: RopeSettings, length: int, where: str = ""
) -> PreTrainedConfig:
    """A copy of `config` for rows of `length` tokens, with `max_position_embeddings` at least that.

    Where layers of different types have settings of their own, those of full attention change: others see
    no further than their window. Raises InputError, at `where`, for a decoder without RoPE, for rows that it
    cannot read as it is when nothing is stated, and for settings that do not reach so far.
    """
    changed = copy.deepcopy(config)
    own, limit = rope_of(changed, where), int(config.max_position_embeddings)
    if not settings.stated and length <= limit:
        return changed
    if not settings.stated:
        raise InputError(
            "rows are longer than the positions of the decoder",
            value=f"{length} tokens, max_position_embeddings {limit}",
            where=where,
            remedy="state its RoPE settings there: `theta`, or `type` (linear, yarn, llama3)",
        )
    if settings.theta is not None:
        own["rope_theta"] = settings.theta
    if settings.type is RopeType.NONE:
        positions = max(limit, length)
        require_open_end(own, limit, positions, where)
    else:
        positions = scale(own, settings, limit, length, where)
    changed.max_position_embeddings = positions
    require_understood(changed, where)
    return changed


def rope_of(config: PreTrainedConfig, where: str) -> dict[str, Any]:
    """The config's own settings, to be changed in place; raises InputError where there are none."""
    own = getattr(config, "rope_parameters", None)
    if own and any(isinstance(value, dict) for value in own.values()):
        own = own.get(FULL_ATTENTION)
    if not own or not getattr(config, "max_position_embeddings", None):
        raise InputError(
            "the decoder has no rotary positions (RoPE), so its context cannot be extended",
            value=config.model_type,
            where=where,
            remedy="leave `extend` out, or choose a parent with RoPE",
        )
    return own


def scale(own: dict[str, Any], settings: RopeSettings, limit: int, length: int, where: str) -> int:
    """Replace the scaling among a config's own settings; the positions that it reaches.

    factor: `length` / original length where it is not stated.
    """
    original = settings.original_length or own.get("original_max_position_embeddings") or limit
    factor = float(settings.factor or length / original)
    reach = round(factor * original)
    if factor <= 1 or reach < length:
        raise InputError(
            "the RoPE scaling does not reach the length of the rows",
            value=f"factor {factor:g} x original_length {original} = {reach} positions, {length} tokens",
            where=where,
            remedy="leave `factor` out, or state a greater one; without a `type` nothing is scaled",
        )
    positions = max(limit, reach)
    if settings.type is RopeType.YARN and positions / original != factor:
        # transformers warns at every load, and the gate lets no warning pass.
        raise InputError(
            "YaRN's factor must be the positions it reaches over those before",
            value=f"factor {factor:g}, original_length {original}, max_position_embeddings {positions}",
            where=where,
            remedy=f"state `factor: {positions / original:g}`, or another `original_length`",
        )
    kept: dict[str, Any] = {
        name: own[name] for name in ("rope_theta", "partial_rotary_factor") if name in own
    }
    own.clear()
    own |= {**kept, "rope_type": settings.type.value, "factor": factor}
    if settings.type is not RopeType.LINEAR:
        own["original_max_position_embeddings"] = original
    if settings.type is RopeType.LLAMA3:
        own |= {"low_freq_factor": LOW, "high_freq_factor": HIGH}
    return positions


def require_open_end(own: dict[str, Any], limit: int, positions: int, where: str) -> None:
    """Raise InputError if a scaling that is to be kept ends at the positions there are."""
    kept = own.get("rope_type", "default")
    if positions > limit and kept not in OPEN_ENDED:
        raise InputError(
            "the decoder's RoPE is scaled for the positions that it has, and for no more",
            value=f"rope_type {kept}, max_position_embeddings {limit}",
            where=where,
            remedy="state `type` (linear, yarn, llama3) too",
        )


def require_understood(config: PreTrainedConfig, where: str) -> None:
    """Raise InputError unless the config comes back from its file as it was written."""
    try:
        again = type(config).from_dict(config.to_dict())
        problem = ""
    except (KeyError, TypeError, ValueError, StrictDataclassError) as error:
        again, problem = config, " ".join(str(error).split())[:200]
    asked, found = config.rope_parameters, again.rope_parameters
    if problem or found != asked or again.max_position_embeddings != config.max_position_embeddings:
        raise InputError(
            "the decoder's class does not take these RoPE settings",
            value=problem or f"{asked} becomes {found}",
            where=f"{where}, {config.model_type}",
            remedy="state another `type`, or `theta` alone",
        )
