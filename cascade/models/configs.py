"""Sizes in a config: which fields hold them, and a copy of a config with other sizes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from cascade.architecture import Sizes

# What a class raises when it is built or run with sizes that it does not take from its config.
BUILD_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    StrictDataclassError,
)

# The field first found is read; all of a row that a config has are written together. Names of fields, not of
# models: `PreTrainedConfig.attribute_map` already maps the older ones (n_embd, n_head, n_layer) onto these.
HIDDEN_FIELDS = ("hidden_size", "word_embed_proj_dim")
EXPERT_FIELDS = ("num_local_experts", "num_experts", "n_routed_experts")
ACTIVE_FIELDS = ("num_experts_per_tok", "experts_per_token")
FFN_FIELDS = ("moe_intermediate_size", "intermediate_size", "ffn_dim", "n_inner")
EPSILON_FIELDS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps")


@dataclass(frozen=True)
class Form:
    """How a class reads its sizes. ffn_field: the one that sets F. bound: D = G * q * h, so that a head
    size cannot be stated; otherwise `head_dim` is honoured."""

    ffn_field: str
    bound: bool


def present(config: PreTrainedConfig, fields: Sequence[str]) -> list[str]:
    """The fields among `fields` that the config has, whatever their value."""
    return [field for field in fields if hasattr(config, field)]


def stated(config: PreTrainedConfig, fields: Sequence[str]) -> int:
    """The first of `fields` that is set; 0 when none is."""
    return next((int(value) for field in fields if (value := getattr(config, field, None))), 0)


def read_sizes(config: PreTrainedConfig, form: Form) -> Sizes:
    """The sizes that a config describes to a class of this form."""
    heads = int(config.num_attention_heads)
    groups = int(getattr(config, "num_key_value_heads", None) or heads)
    return Sizes(
        layers=int(config.num_hidden_layers),
        hidden=int(config.hidden_size),
        # A config of GPT-2 may leave it empty: four times the hidden size (Radford et al., 2019).
        ffn=stated(config, (form.ffn_field,)) or 4 * int(config.hidden_size),
        kv_groups=groups,
        heads_per_group=heads // groups,
        head_size=head_size(config),
        experts=stated(config, EXPERT_FIELDS),
    )


def head_size(config: PreTrainedConfig) -> int:
    """h: stated, or D / H where the config does not state it."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def resized(config: PreTrainedConfig, sizes: Sizes, form: Form, layers: Sequence[int]) -> PreTrainedConfig:
    """A copy of `config` with other sizes; `layers` are the layers that stay, in order.

    Per-layer lists (`layer_types`, `no_rope_layers`, ...) keep the entries of those layers.
    """
    changed, depth = copy.deepcopy(config), config.num_hidden_layers
    for name, value in vars(config).items():
        if "layer" in name and isinstance(value, list | tuple) and len(value) == depth:
            setattr(changed, name, [value[layer] for layer in layers])
    changed.num_hidden_layers = len(layers)
    for field in present(config, HIDDEN_FIELDS):
        setattr(changed, field, sizes.hidden)
    setattr(changed, form.ffn_field, sizes.ffn)
    changed.num_attention_heads = sizes.heads
    if hasattr(config, "num_key_value_heads"):
        changed.num_key_value_heads = sizes.kv_groups
    if not form.bound:
        # Configs derive it from D and H where it is not stated, and both may have changed.
        changed.head_dim = sizes.head_size
    for field in present(config, EXPERT_FIELDS):
        setattr(changed, field, sizes.experts)
    return changed
