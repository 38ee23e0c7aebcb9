"""A document in a packed row is read as if it were alone, by every architecture that the README lists."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from cascade.data.packing import document_positions
from cascade.distillation.states import final_states, head_of
from tests.architectures import ARCHITECTURES, tiny
from tests.tiny import make_model

END, LENGTH = 256, 40
# Three documents, then an empty one, then a border where the row ends: with a batch of more than one.
BORDERS = ((11, 30), (5, 6), (39,))
# Without torch's fused attention in transformers.
EAGER_ONLY = ("gemma2", "gpt_oss")


def packed_rows() -> Tensor:
    rows_BT = torch.randint(250, (len(BORDERS), LENGTH), generator=torch.Generator().manual_seed(0))
    for row_T, borders in zip(rows_BT, BORDERS, strict=True):
        row_T[list(borders)] = END
    return rows_BT


def spans(borders: tuple[int, ...]) -> list[slice]:
    edges = [0, *(border + 1 for border in borders), LENGTH]
    return [slice(begin, end) for begin, end in pairwise(edges) if begin < end]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_of_a_packed_document_are_those_of_the_document_alone(name: str, attention: str) -> None:
    if attention == "sdpa" and name in EAGER_ONLY:
        pytest.skip("transformers has no fused attention for it")
    model, rows_BT = tiny(name), packed_rows()
    model.set_attn_implementation(attention)
    with torch.no_grad():
        logits = head_of(model).logits(final_states(model, rows_BT, document_positions(rows_BT, END)))
        scale = logits.abs().max().item()
        for row, borders in enumerate(BORDERS):
            for span in spans(borders):
                alone = head_of(model).logits(final_states(model, rows_BT[row : row + 1, span]))[0]
                torch.testing.assert_close(logits[row, span], alone, rtol=0, atol=1e-5 * scale)


def test_gradients_stay_within_a_document() -> None:
    model, rows_BT = make_model(), packed_rows()
    positions_BT = document_positions(rows_BT, END)
    final_states(model, rows_BT, positions_BT)[0, 12:31].sum().backward()
    seen = model.get_input_embeddings().weight.grad.any(-1).nonzero().flatten().tolist()
    assert set(seen) == set(rows_BT[0, 12:31].tolist())


def test_a_row_of_one_document_is_an_ordinary_row() -> None:
    model, rows_BT = make_model(), packed_rows()[2:]
    with torch.no_grad():
        apart = final_states(model, rows_BT, document_positions(rows_BT, END))
        torch.testing.assert_close(apart, final_states(model, rows_BT), rtol=0, atol=0)


def test_positions_start_again_after_every_end_of_text() -> None:
    rows_BT = torch.tensor([[5, END, END, 6, 7], [END, 1, 2, 3, END]])
    assert document_positions(rows_BT, END).tolist() == [[0, 1, 0, 0, 1], [0, 0, 1, 2, 3]]
