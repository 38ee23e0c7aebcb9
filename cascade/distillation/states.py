"""Reading a causal language model as hidden states and a head, checked against its own logits.

B batch, T tokens, N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from cascade.errors import InputError
from cascade.models.documents import documents_apart

HEAD_TOLERANCE = 1e-2
"""Largest accepted max|logits - head(states)| / max|logits|. Float32 lands near 1e-6 and bfloat16 near
4e-3 (one rounding of the logits), while a bias, a soft cap or a scale is off by far more."""

# Fields of configs, not names of models; `check_head` compares numbers with the model's own logits.
MULTIPLIERS = ("logit_scale", "lm_head_multiplier")
DIVISORS = ("logits_scaling",)
CAPS = ("final_logit_softcapping",)


@dataclass(frozen=True)
class Head:
    """What turns final states into logits: cap * tanh(scale * states @ weight^T / cap). weight: [V, D].

    cap: None where logits are not capped (Gemma 2, 2408.00118, section 2, has 30).
    """

    weight: Tensor
    scale: float = 1.0
    cap: float | None = None

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
        return replace(self, weight=self.weight.to(device, dtype))

    def detach(self) -> Head:
        """Without gradients."""
        return replace(self, weight=self.weight.detach())

    def narrowed(self, vocabulary: int) -> Head:
        """Of the first entries alone: the others' logits are -inf, so to say. Shares the weight's memory."""
        return replace(self, weight=self.weight[:vocabulary])

    def logits(self, states: Tensor, out: Tensor | None = None) -> Tensor:
        """[..., V] of states [..., D] of the weight's type.

        out: [N, V], float32 or wider, is written and returned; then states are [N, D] and no gradients flow.
        """
        if out is None:
            product = states @ self.weight.T
        elif out.dtype == states.dtype:
            product = torch.mm(states, self.weight.T, out=out)
        else:
            product = out.copy_(states @ self.weight.T)
        if self.scale != 1:
            product = product.mul_(self.scale) if out is not None else product * self.scale
        if self.cap is None:
            return product
        if out is not None:
            return product.div_(self.cap).tanh_().mul_(self.cap)
        return self.cap * torch.tanh(product / self.cap)


def final_states(model: PreTrainedModel, ids_BT: Tensor, positions_BT: Tensor | None = None) -> Tensor:
    """The last hidden states [B, T, D] after the final norm: what the LM head is applied to.

    positions_BT: of every token in its document, where a row holds several that must not see each other.
    """
    apart = {} if positions_BT is None else documents_apart(model, positions_BT)
    return model.base_model(input_ids=ids_BT, use_cache=False, **apart).last_hidden_state


Inner = tuple[Tensor, ...]
"""What chosen modules of a model put out, in their order."""


def all_states(
    model: PreTrainedModel,
    ids_BT: Tensor,
    places: Sequence[nn.Module],
    positions_BT: Tensor | None = None,
) -> tuple[Tensor, Inner]:
    """What `final_states` finds, and what the modules at `places` put out [B, T, ..], and nothing else.

    Of a layer that is the residual stream after it.
    """
    found: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, _arguments: object, output: Tensor | tuple[Tensor, ...]) -> None:
        found[module] = output if isinstance(output, Tensor) else output[0]

    # transformers would keep every layer's states.
    handles = [place.register_forward_hook(keep) for place in places]
    try:
        states_BTD = final_states(model, ids_BT, positions_BT)
    finally:
        for handle in handles:
            handle.remove()
    return states_BTD, tuple(found[place] for place in places)


def of_targets(states_BTD: Tensor) -> Tensor:
    """Those that a token is predicted from, row by row [B * (T - 1), ..]: of all but the last."""
    return states_BTD[:, :-1].flatten(0, 1)


def head_of(model: PreTrainedModel) -> Head:
    """The LM head; its weight is the embeddings' own tensor where the two are tied."""
    scale, cap = shape_of_logits(model.config)
    return Head(model.get_output_embeddings().weight, scale, cap)


def shape_of_logits(config: PreTrainedConfig) -> tuple[float, float | None]:
    """Scale and soft cap that a config states; 1 and None where it does not."""
    scale = 1.0
    for field in (*MULTIPLIERS, *DIVISORS):
        stated = getattr(config, field, None)
        if stated is not None:
            scale = scale / stated if field in DIVISORS else scale * stated
    caps = [cap for field in CAPS if (cap := getattr(config, field, None))]
    return scale, caps[0] if caps else None


@torch.no_grad()
def check_head(model: PreTrainedModel, ids_T: Tensor) -> None:
    """Refuse a model whose logits are not what `head_of` makes of its final states.

    ids_T: a few token ids. A bias, or a scale or cap that the config does not name as expected, would
    silently change the objective, so the numbers are compared instead of a list of model names.
    Raises InputError.
    """
    ids_BT = ids_T[None].to(device_of(model))
    logits_BTV = model(input_ids=ids_BT, use_cache=False).logits.float()
    head_BTV = head_of(model).logits(final_states(model, ids_BT)).float()
    difference = (logits_BTV - head_BTV).abs().max() / logits_BTV.abs().max().clamp_min(1e-30)
    if not difference.item() <= HEAD_TOLERANCE:
        raise InputError(
            "the model's logits are not its LM head's, applied to its final hidden states",
            value=f"relative difference {difference.item():.3g}",
            where=f"the LM head of {model.config.model_type}",
            remedy="use a model whose LM head is one linear layer without bias, with at most a scale and a "
            f"soft cap that its config states as one of {', '.join((*MULTIPLIERS, *DIVISORS, *CAPS))}",
        )


def device_of(model: PreTrainedModel) -> torch.device:
    """Where the model's parameters are."""
    return next(model.parameters()).device
