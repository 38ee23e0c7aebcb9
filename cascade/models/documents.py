"""Several documents in one row of tokens: each is read as if it were alone.

B rows, T tokens. See `cascade.data.packing.document_positions`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.masking_utils import create_masks_for_generate

from cascade.data.corpus import Corpus
from cascade.errors import InputError

CHECKED_TOKENS = 16
LEAK = 1e-3
"""Largest accepted change of a document's states, as a share of the largest state, after a change in the
document before it. A masked token has a weight of exactly zero, so what is left is rounding."""


def documents_apart(model: PreTrainedModel, positions_BT: Tensor) -> dict[str, Any]:
    """The arguments of a forward pass in which no token sees another document.

    transformers finds the borders where positions start again. Not every class looks for them (OPT and
    gpt-oss do not), so the masks are made here, one for each kind of layer, by the same functions.
    """
    size = torch.empty(*positions_BT.shape, 1, dtype=model.dtype, device=positions_BT.device)
    masks = create_masks_for_generate(
        config=model.config,
        inputs_embeds=size,
        attention_mask=None,
        past_key_values=None,
        position_ids=positions_BT,
    )
    return {"position_ids": positions_BT, "attention_mask": masks}


@torch.no_grad()
def check_documents_apart(model: PreTrainedModel, corpus: Corpus) -> None:
    """Refuse a model in which a document can see the one before it, found by changing the first one.

    Nothing is asked of it where the corpus does not keep documents apart. Raises InputError.
    """
    if corpus.end_of_text is None:
        return
    border = CHECKED_TOKENS // 2
    count = model.config.get_text_config().vocab_size
    ids_T = (torch.arange(CHECKED_TOKENS) * 7 + corpus.train[0, 0].long()) % count
    ids_BT = ids_T.repeat(2, 1).to(next(model.parameters()).device)
    ids_BT[1, :border] = (ids_BT[1, :border] + 1) % count
    place_T = torch.arange(CHECKED_TOKENS, device=ids_BT.device)
    positions_BT = torch.where(place_T < border, place_T, place_T - border).repeat(2, 1)
    apart = documents_apart(model, positions_BT)
    states_BTD = model.base_model(input_ids=ids_BT, use_cache=False, **apart).last_hidden_state.float()
    leak = (states_BTD[0, border:] - states_BTD[1, border:]).abs().max() / states_BTD.abs().max()
    if not leak.item() <= LEAK:
        raise InputError(
            "this model lets a document see the one before it in a row",
            value=f"its states change by {leak.item():.2g} of the largest",
            where=f"the attention of {model.config.model_type}",
            remedy="set `corpus.separate_documents: false`, and a row is read as one text",
        )
