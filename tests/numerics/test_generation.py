"""Sampled continuations: with the cache as without it, by the right distribution, document by document."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from cascade.data.packing import document_positions
from cascade.distillation.states import final_states, head_of
from cascade.generation import sampling
from cascade.generation.sampling import continued, draws, picked
from tests.architectures import ARCHITECTURES, tiny
from tests.tiny import make_model

END, PROMPT, NEW = 256, 7, 9
POSITIONS = (3, 8, 11, 20)


def prompts() -> Tensor:
    """One text; two documents; one that has just ended; three documents, the last of one token."""
    ids = torch.randint(256, (4, PROMPT), generator=torch.Generator().manual_seed(1))
    ids[1, 3] = ids[2, -1] = END
    ids[3, [2, 5]] = END
    return ids


@torch.no_grad()
def by_whole_passes(
    model: PreTrainedModel, ids: Tensor, chosen: Tensor, temperature: float, end: int | None
) -> Tensor:
    """Every token from a forward pass over all tokens before it, each document by itself."""
    rows = []
    for row, numbers in zip(ids, chosen, strict=True):
        for number in numbers:
            begin = 0
            if end is not None:
                borders = (row == end).nonzero().flatten().tolist()
                begin = borders[-1] + 1 if borders else 0
            if begin == len(row):
                row = torch.cat([row, row.new_tensor([end])])
                continue
            logits = model(row[None, begin:], use_cache=False).logits[:, -1].double()
            scaled = logits / temperature if temperature else logits
            sums = scaled.softmax(-1)[0].cumsum(0)
            token = int((sums <= number).sum()) if temperature else int(logits.argmax())
            row = torch.cat([row, row.new_tensor([token])])
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("end", [END, None])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_cache_changes_no_token(name: str, end: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "CACHED_TOKENS", 3 * (PROMPT + NEW))
    model, chosen = tiny(name), draws(0, POSITIONS, NEW)
    settings = {"temperature": 0.9, "vocabulary": head_of(model).vocabulary, "end_of_text": end}
    found = continued(model, prompts(), chosen, **settings)
    assert found is not None
    assert torch.equal(found, by_whole_passes(model, prompts(), chosen, 0.9, end))
    assert torch.equal(found[:, :PROMPT], prompts())
    if end is not None:
        assert (found[2, PROMPT:] == END).all()


def test_documents_are_apart_as_in_training() -> None:
    """The likeliest tokens of the states that training computes over the row that was written."""
    model = tiny("gpt_oss")
    found = continued(
        model, prompts(), draws(0, POSITIONS, NEW), temperature=0, vocabulary=258, end_of_text=END
    )
    assert found is not None
    with torch.no_grad():
        states = final_states(model, found, document_positions(found, END))
    likeliest = head_of(model).logits(states).argmax(-1)[:, PROMPT - 1 : -1]
    going_on = found[:, PROMPT - 1 : -1] != END
    assert going_on.sum() > 2 * NEW
    assert torch.equal(found[:, PROMPT:][going_on], likeliest[going_on])


def test_a_document_that_ends_is_followed_by_nothing_else() -> None:
    """A model that always says end of text."""
    model = make_model(tie_word_embeddings=False)
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    one, half = torch.zeros(4, 1, dtype=torch.float64), torch.full((4, NEW), 256.5 / 258).double()
    first = continued(model, prompts(), one, temperature=1, vocabulary=258, end_of_text=END)
    assert first is not None
    assert first[:, -1].tolist() == [0, 0, END, 0]
    ended = continued(model, prompts(), half, temperature=1, vocabulary=258, end_of_text=END)
    assert ended is not None
    assert (ended[:, PROMPT:] == END).all()


def test_frequencies_are_the_probabilities_at_the_temperature() -> None:
    logits = torch.tensor([2.0, 0.0, -torch.inf, 1.0, -3.0])
    count = 40_000
    chosen = draws(5, range(count), 1)[:, 0]
    for temperature in (1.0, 0.5, 3.0):
        tokens = picked(logits.expand(count, -1), chosen, temperature)
        expected = (logits.double() / temperature).softmax(-1)
        found = tokens.bincount(minlength=5) / count
        spread = (expected * (1 - expected) / count).sqrt()
        assert ((found - expected).abs() <= 4 * spread).all()
        assert not found[2]


@pytest.mark.parametrize("draw", [0.0, 1 - 2.0**-53])
def test_the_ends_of_the_interval_pick_possible_tokens(draw: float) -> None:
    logits = torch.tensor([[-torch.inf, 1.0, 2.0, -torch.inf]])
    token = picked(logits, torch.tensor([draw], dtype=torch.float64), 1.0)
    assert token.tolist() == [1 if draw == 0 else 2]


@pytest.mark.parametrize("temperature", [1e-6, 1e-300])
def test_near_zero_the_likeliest_token_is_picked(temperature: float) -> None:
    logits, chosen = torch.tensor([[3.0, 30.0, -30.0]]), torch.tensor([0.9], dtype=torch.float64)
    assert picked(logits, chosen, temperature).tolist() == picked(logits, chosen, 0).tolist() == [1]


def test_logits_that_are_not_numbers_pick_some_token() -> None:
    token = picked(torch.full((1, 4), torch.nan), torch.tensor([0.5], dtype=torch.float64), 1.0)
    assert 0 <= token.item() < 4


def test_a_row_is_drawn_by_seed_and_position_alone() -> None:
    together = draws(3, [10, 11, 12], 4)
    assert torch.equal(together[1], draws(3, [11], 4)[0])
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(together[1], draws(4, [11], 4)[0])
    assert ((together >= 0) & (together < 1)).all()


def test_no_entry_beyond_the_vocabulary_is_written_and_the_mode_stays() -> None:
    model = tiny("llama").train()
    found = continued(model, prompts(), draws(0, POSITIONS, NEW), temperature=50, vocabulary=20)
    assert found is not None
    assert found[:, PROMPT:].max() < 20
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_in_training_writes_without_dropout() -> None:
    model = tiny("gpt2", resid_pdrop=0.5)
    settings = {"temperature": 1.0, "vocabulary": 258}
    found, expected = (
        continued(model.train(mode), prompts(), draws(0, POSITIONS, NEW), **settings)
        for mode in (True, False)
    )
    assert found is not None
    assert expected is not None
    assert torch.equal(found, expected)


def test_a_request_to_stop_is_heard_between_tokens() -> None:
    asked = iter([False, False, True])
    found = continued(
        tiny("llama"),
        prompts(),
        draws(0, POSITIONS, NEW),
        temperature=1,
        vocabulary=258,
        should_stop=lambda: next(asked),
    )
    assert found is None
