"""Fine-tuning by low-rank additions to the layers' matrices (LoRA, 2106.09685), with the peft package.

peft is an optional dependency and is imported only here, only when it is asked for.
"""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

import torch
from transformers import PreTrainedModel

from cascade.errors import InputError

# Usual values; others were not compared. The additions are scaled by ALPHA / RANK.
RANK, ALPHA = 16, 32


def require_peft() -> None:
    """Raise InputError where the package is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise InputError(
            "the peft package is not installed",
            value="lora",
            where="teacher.correction",
            remedy="pip install 'cascade[lora]', or set `correction: full`",
        )


class LowRank:
    """Makes low-rank additions to every linear map of a model but its head the only parameters that learn.

    model: changed in place; it computes what it did until it is trained. seed: of the additions.
    """

    def __init__(self, model: PreTrainedModel, seed: int) -> None:
        require_peft()
        import peft

        # Orthogonal factors whose product is zero: with the usual start, one factor zero, the other would
        # have no gradient at the first step and could not be told from one that the loss never reaches.
        config = peft.LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules="all-linear", init_lora_weights="orthogonal"
        )
        with torch.random.fork_rng(), warnings.catch_warnings():
            # peft asks transformers 5 by names of transformers 4.
            warnings.simplefilter("ignore", FutureWarning)
            torch.manual_seed(seed)
            self.wrapped: Any = peft.get_peft_model(model, config)

    def merged(self) -> PreTrainedModel:
        """The model with its additions in its matrices, and a plain one again."""
        model: PreTrainedModel = self.wrapped.merge_and_unload()
        return model.requires_grad_(True)
