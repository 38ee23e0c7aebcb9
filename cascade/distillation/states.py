"""Reading a causal language model as hidden states and a head, checked against its own logits.

B batch, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cascade.errors import InputError
from cascade.models.documents import documents_apart

HEAD_TOLERANCE = 1e-2
"""Largest accepted max|logits - states @ head^T| / max|logits|. Float32 lands near 1e-6 and
bfloat16 near 4e-3 (one rounding of the logits), while a soft cap or a scale is off by far more."""


@dataclass(frozen=True)
class Head:
    """What turns final states into logits: one linear map without a bias. weight: [V, D]."""

    weight: Tensor

    @property
    def vocabulary(self) -> int:
        """V."""
        return self.weight.shape[0]

    @property
    def width(self) -> int:
        """D."""
        return self.weight.shape[1]

    def to(self, device: torch.device, dtype: torch.dtype) -> Head:
        """On a device, in a type."""
        return Head(self.weight.to(device, dtype))

    def detach(self) -> Head:
        """Without gradients."""
        return Head(self.weight.detach())

    def logits(self, states: Tensor) -> Tensor:
        """[..., V] of states [..., D] of the weight's type."""
        return states @ self.weight.T


def final_states(model: PreTrainedModel, ids_BT: Tensor, positions_BT: Tensor | None = None) -> Tensor:
    """The last hidden states [B, T, D] after the final norm: what the LM head is applied to.

    positions_BT: of every token in its document, where a row holds several that must not see each other.
    """
    apart = {} if positions_BT is None else documents_apart(model, positions_BT)
    return model.base_model(input_ids=ids_BT, use_cache=False, **apart).last_hidden_state


def head_of(model: PreTrainedModel) -> Head:
    """The LM head; its weight is the embeddings' own tensor where the two are tied."""
    return Head(model.get_output_embeddings().weight)


@torch.no_grad()
def check_head(model: PreTrainedModel, ids_T: Tensor) -> None:
    """Refuse a model whose logits are more than one matrix product of its final states.

    ids_T: a few token ids. A soft cap (Gemma), a scale (Cohere, Granite) or a bias would silently
    change the objective, so the numbers are compared instead of a list of model names.
    Raises InputError.
    """
    ids_BT = ids_T[None].to(device_of(model))
    logits_BTV = model(input_ids=ids_BT, use_cache=False).logits.float()
    product_BTV = head_of(model).logits(final_states(model, ids_BT)).float()
    difference = (logits_BTV - product_BTV).abs().max() / logits_BTV.abs().max().clamp_min(1e-30)
    if not difference.item() <= HEAD_TOLERANCE:
        raise InputError(
            "the model's logits are not its final hidden states times its LM head",
            value=f"relative difference {difference.item():.3g}",
            where=f"the LM head of {model.config.model_type}",
            remedy="use a model whose LM head is one linear layer without bias, scale or soft cap",
        )


def device_of(model: PreTrainedModel) -> torch.device:
    """Where the model's parameters are."""
    return next(model.parameters()).device
