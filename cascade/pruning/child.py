"""A fresh stock model from a shrunk config: what every cut ends with."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from cascade.architecture import Architecture
from cascade.errors import CascadeError
from cascade.models.decoder import Decoder, find_parts


def child_config(config: PreTrainedConfig, target: Architecture, layers: Sequence[int]) -> PreTrainedConfig:
    """A copy of the parent's config with the sizes of `target`; `layers` are the parent's layers that stay.

    Per-layer lists (`layer_types`, `no_rope_layers`, ...) keep the entries of those layers. RMSNorm's
    epsilon is scaled by D / D', see `folded_gain` in `cascade.pruning.surgery`.
    """
    child = copy.deepcopy(config)
    for name, value in vars(config).items():
        if "layer" in name and isinstance(value, list | tuple) and len(value) == config.num_hidden_layers:
            setattr(child, name, [value[layer] for layer in layers])
    child.num_hidden_layers = target.layers
    child.rms_norm_eps = config.rms_norm_eps * config.hidden_size / target.hidden
    child.hidden_size = target.hidden
    child.intermediate_size = target.ffn
    child.num_attention_heads = target.heads
    child.num_key_value_heads = target.kv_groups
    # Configs derive it from the two sizes above where it is not stated, and both have changed.
    child.head_dim = target.head_size
    child.tie_word_embeddings = target.tied
    child.name_or_path = ""
    return child


def empty_model(like: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """A model of the class, type and device of `like` in eval mode, its weights allocated but not set."""
    with no_init_weights(), like.device:
        model: PreTrainedModel = type(like)._from_config(config, dtype=like.dtype)
    return model.eval()


def build_child(
    parent: PreTrainedModel, config: PreTrainedConfig, state: Mapping[str, Tensor]
) -> PreTrainedModel:
    """A fresh model of the parent's class with exactly the tensors of `state`.

    state: every entry of the parent's state dict, sliced. Tied embeddings are one tensor again: slicing
    re-creates parameters, and two copies would drift apart with the first optimiser step.
    """
    child = empty_model(parent, config)
    child.load_state_dict(state, strict=True, assign=True)
    child.tie_weights()
    child.generation_config = copy.deepcopy(parent.generation_config)
    return child


def require_shape(child: PreTrainedModel, target: Architecture) -> Decoder:
    """The child's parts; raises CascadeError unless its shape, count and tying are those of the plan."""
    decoder = find_parts(child)
    if decoder.architecture != target:
        raise CascadeError(
            "the pruned model is not what was planned",
            value=decoder.architecture,
            where=f"planned: {target}",
            remedy="report this as a bug, with the parent's config.json",
        )
    return decoder
