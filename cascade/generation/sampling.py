"""Continuations that a model samples, with a cache of keys and values; the draws are fixed beforehand.

B rows, P tokens of a prompt, T tokens of a row, S tokens so far, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from cascade.data.packing import document_positions
from cascade.distillation.states import device_of, head_of
from cascade.models.documents import documents_apart

CACHED_TOKENS = 16_384
"""Tokens of the rows that are written at a time: 0.75 GB of keys and values in float32 for SmolLM2-135M. On a
GPU more may be faster: unmeasured."""


def draws(seed: int, positions: Sequence[int], tokens: int) -> Tensor:
    """Uniform numbers [B, tokens] in [0, 1), float64; a row's depend on the seed and its position alone."""
    # RandomState: NumPy promises that this stream never changes.
    rows = [np.random.RandomState([seed, position]).random_sample(tokens) for position in positions]
    return torch.from_numpy(np.stack(rows)) if rows else torch.empty(0, tokens, dtype=torch.float64)


def picked(logits_BV: Tensor, draws_B: Tensor, temperature: float) -> Tensor:
    """Token ids [B]: of softmax(logits / temperature) by inversion of its distribution function.

    At temperature 0 the likeliest token, of equals the first.
    """
    if temperature == 0:
        return logits_BV.argmax(-1)
    # In float64: float32 would lose the unlikely ones of 128256 entries in their sum, and overflow at a
    # temperature near zero.
    less_BV = logits_BV.double() - logits_BV.double().amax(-1, keepdim=True)
    mass_BV = (less_BV / temperature).softmax(-1).cumsum(-1)
    # The first entry whose sum lies above the point, so never one of probability zero.
    found_B1 = torch.searchsorted(mass_BV, draws_B[:, None] * mass_BV[:, -1:], right=True)
    # Logits that are not numbers lead nowhere; the loss that follows tells.
    return found_B1[:, 0].clamp_max(logits_BV.shape[-1] - 1)


@torch.no_grad()
def continued(
    model: PreTrainedModel,
    prompts_BP: Tensor,
    draws_BN: Tensor,
    *,
    temperature: float,
    vocabulary: int,
    end_of_text: int | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Tensor | None:
    """Rows [B, P + N], int64: the prompts, and after each what the model says by N draws.

    vocabulary: only the first so many entries are sampled. end_of_text: the last token of every document,
    where documents are kept apart: only the prompt's last one is seen, and once it has ended, in the prompt
    or after it, the row is filled up with this token. should_stop: asked before every token; then None. On
    a GPU in bfloat16 autocast. The model stays in its mode, training or not.
    """
    device, training = device_of(model), model.training
    size = max(1, CACHED_TOKENS // (prompts_BP.shape[1] + draws_BN.shape[1]))
    head, rows = head_of(model).detach().narrowed(vocabulary), []
    model.eval()
    try:
        for start in range(0, len(prompts_BP), size):
            writer = _Writer(model, prompts_BP[start : start + size].to(device), end_of_text)
            for draws_B in draws_BN[start : start + size].to(device).T:
                if should_stop():
                    return None
                with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                    logits_BV = head.logits(writer.states())
                writer.append(picked(logits_BV, draws_B, temperature))
            rows.append(writer.ids_BS)
    finally:
        model.train(training)
    length = prompts_BP.shape[1] + draws_BN.shape[1]
    return torch.cat(rows) if rows else prompts_BP.new_empty(0, length, device=device)


class _Writer:
    """Rows that grow by a token at a time. ids_BS: so far."""

    def __init__(self, model: PreTrainedModel, prompts_BP: Tensor, end_of_text: int | None) -> None:
        self.model, self.ids_BS, self.end_of_text = model, prompts_BP, end_of_text
        self.cache = DynamicCache(config=model.config)
        place_P = torch.arange(prompts_BP.shape[1], device=prompts_BP.device)
        self.positions_BS = place_P.expand_as(prompts_BP)
        self.seen_BS = torch.ones_like(prompts_BP)
        if end_of_text is not None:
            self.positions_BS = document_positions(prompts_BP, end_of_text)
            self.seen_BS = (place_P >= place_P[-1] - self.positions_BS[:, -1:]).long()

    def states(self) -> Tensor:
        """The final states [B, D] of the last token."""
        new = self.ids_BS.shape[1] - self.cache.get_seq_length()
        positions = self.positions_BS[:, -new:]
        if new > 1:
            # The prompt's documents are apart in full masks: a row of which nothing is seen has no softmax.
            how = documents_apart(self.model, positions)
        else:
            how = {"position_ids": positions, "attention_mask": self.seen_BS}
        ids = self.ids_BS[:, -new:]
        found = self.model.base_model(input_ids=ids, past_key_values=self.cache, use_cache=True, **how)
        states_BD: Tensor = found.last_hidden_state[:, -1]
        return states_BD

    def append(self, ids_B: Tensor) -> None:
        """Lengthen every row; one whose document has ended by its end of text."""
        if self.end_of_text is not None:
            ids_B = ids_B.masked_fill(self.ids_BS[:, -1] == self.end_of_text, self.end_of_text)
        self.ids_BS = torch.cat([self.ids_BS, ids_B[:, None]], 1)
        self.positions_BS = torch.cat([self.positions_BS, self.positions_BS[:, -1:] + 1], 1)
        self.seen_BS = torch.cat([self.seen_BS, torch.ones_like(ids_B)[:, None]], 1)
