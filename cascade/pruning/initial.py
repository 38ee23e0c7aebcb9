"""A model of planned sizes with random weights: a student from scratch."""

from __future__ import annotations

import copy

import torch
from transformers import PreTrainedModel

from cascade.architecture import Architecture
from cascade.models import configs
from cascade.models.decoder import Decoder
from cascade.pruning.child import require_shape


def random_model(like: Decoder, target: Architecture, seed: int) -> PreTrainedModel:
    """A stock model of the class of `like` in the sizes of `target`, drawn by the class's own initialisation.

    float32, on the CPU, in eval mode; the same seed gives the same weights, and the random state outside
    stays as it is. Raises CascadeError unless its shape is the target's.
    """
    config = configs.resized(like.model.config, target, like.anatomy.form, range(target.layers))
    config.tie_word_embeddings = target.tied
    config.name_or_path = ""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        model: PreTrainedModel = type(like.model)._from_config(config, dtype=torch.float32)
    model.generation_config = copy.deepcopy(like.model.generation_config)
    require_shape(model, like.anatomy, target)
    return model.eval()
