"""Tiny parents whose norms depend visibly on what they are taken over, and tokens to compare them on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.architectures import tiny

# A large epsilon, so that folding it wrongly is far outside the tolerance.
EPSILON = {"rms_norm_eps": 0.05, "layer_norm_eps": 0.05, "layer_norm_epsilon": 0.05, "norm_epsilon": 0.05}


def parent(name: str, **overrides: Any) -> PreTrainedModel:
    """The tiny model of an architecture with a large epsilon in its norms."""
    known = tiny(name).config.to_dict()
    return tiny(name, **{field: value for field, value in EPSILON.items() if field in known}, **overrides)


def tokens() -> Tensor:
    """Two rows, always the same."""
    return torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(2))
