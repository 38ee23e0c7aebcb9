"""Packing: hashes alone decide the part and the order; rows are exact; too little text is refused."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cascade.data.packing import Packed, end_of_text_id, pack
from cascade.errors import InputError
from cascade.report import Silent
from tests.tiny import make_tokenizer

TOKENIZER = make_tokenizer()
END = TOKENIZER.get_vocab()["<|endoftext|>"]
# Seven bytes and the end of text make one row of eight: a row is a document.
BASE = [f"doc{number:04d}" for number in range(60)]
TEXTS = st.lists(st.text("abcxyz", min_size=7, max_size=7), max_size=20)
FEW = settings(max_examples=20, deadline=None, derandomize=True)


def pack_rows(documents: Sequence[str], *, seed: int = 0, held_out: float = 0.3) -> Packed:
    return pack(documents, TOKENIZER, sequence_length=8, held_out=held_out, seed=seed)


def documents_in(rows: Tensor) -> list[str]:
    assert (rows[:, -1] == END).all()
    return [str(TOKENIZER.decode(row[:-1].tolist())) for row in rows]


@given(extra=TEXTS)
@FEW
def test_parts_never_overlap_and_nothing_is_lost_even_with_duplicates(extra: list[str]) -> None:
    documents = BASE + extra + extra
    packed = pack_rows(documents)
    train, held_out = documents_in(packed.train), documents_in(packed.held_out)
    assert not set(train) & set(held_out)
    assert sorted(train + held_out) == sorted(documents)


@given(extra=TEXTS, seed=st.integers(0, 2**31 - 1))
@FEW
def test_growing_the_corpus_moves_no_document_and_keeps_the_order_of_the_old_ones(
    extra: list[str], seed: int
) -> None:
    small, large = pack_rows(BASE, seed=seed), pack_rows([*extra, *BASE], seed=seed)
    for part in ("train", "held_out"):
        grown = [text for text in documents_in(getattr(large, part)) if text in BASE]
        assert grown == documents_in(getattr(small, part))


@given(order=st.permutations(BASE))
@FEW
def test_the_order_of_the_sources_does_not_matter(order: list[str]) -> None:
    packed, base = pack_rows(order), pack_rows(BASE)
    assert torch.equal(packed.train, base.train)
    assert packed.identity == base.identity


def test_the_seed_orders_the_training_part_and_leaves_the_held_out_part_alone() -> None:
    first, second = pack_rows(BASE, seed=1), pack_rows(BASE, seed=2)
    assert not torch.equal(first.train, second.train)
    assert sorted(documents_in(first.train)) == sorted(documents_in(second.train))
    assert documents_in(first.train) != sorted(documents_in(first.train))
    assert torch.equal(first.held_out, second.held_out)


def test_copies_of_a_document_are_spread_over_the_part_they_share() -> None:
    copied = documents_in(pack_rows(BASE).train)[0]
    places = [
        n for n, text in enumerate(documents_in(pack_rows([*BASE, *[copied] * 5]).train)) if text == copied
    ]
    assert len(places) == 6
    assert places[-1] - places[0] > 15


def test_a_smaller_held_out_share_only_moves_documents_to_training() -> None:
    small, large = (documents_in(pack_rows(BASE, held_out=share).held_out) for share in (0.1, 0.4))
    assert set(small) < set(large)
    assert len(large) == pytest.approx(0.4 * len(BASE), abs=10)


def test_the_identity_changes_with_every_token_and_with_the_seed() -> None:
    texts = [BASE, [*BASE[:-1], "doc9999"], [*BASE, BASE[0]]]
    identities = {pack_rows(documents, seed=seed).identity for documents in texts for seed in (0, 1)}
    assert len(identities) == 6
    other = pack(BASE, TOKENIZER, sequence_length=16, held_out=0.3, seed=0)
    assert other.identity not in identities


def test_rows_are_the_documents_tokens_with_end_of_text_and_the_partial_row_dropped() -> None:
    documents = [f"a longer document of its own, number {number}" for number in range(40)]
    packed = pack(documents, TOKENIZER, sequence_length=64, held_out=0.2, seed=0)
    assert (packed.train.dtype, packed.train.shape[1]) == (torch.int32, 64)
    *whole, last = "".join(spelled(packed.train)).split("|")
    assert len(whole) > 20
    assert set(whole) < set(documents)
    assert any(document.startswith(last) for document in documents)
    assert packed.train.numel() == packed.tokens[0] // 64 * 64
    assert packed.tokens[0] + packed.tokens[1] == sum(len(document) + 1 for document in documents)
    assert sum(packed.documents) == len(documents)


def spelled(rows: Tensor) -> list[str]:
    """The characters of a token stream, with a bar for every end of text."""
    return ["|" if token == END else str(TOKENIZER.decode([token])) for token in rows.flatten().tolist()]


def test_the_name_of_a_special_token_in_a_document_stays_text() -> None:
    document = "a<|endoftext|>b is text"
    packed = pack_rows([document, *BASE])
    assert sum(packed.tokens) == len(document) + 1 + 8 * len(BASE)
    assert int((packed.train == END).sum() + (packed.held_out == END).sum()) == len(BASE) + 1


def test_facts_describe_the_rows() -> None:
    packed = pack_rows(BASE, seed=5)
    facts = packed.facts()
    assert facts["identity"] == packed.identity
    assert (facts["seed"], facts["sequence_length"], facts["end_of_text"]) == (5, 8, END)
    assert facts["train_rows"] == len(packed.train)
    assert facts["held_out_tokens"] == packed.held_out.numel()


def test_end_of_text_is_the_pre_training_separator_and_not_the_end_of_a_chat_turn() -> None:
    chat = make_tokenizer()
    chat.add_special_tokens({"eos_token": "<|im_end|>"})
    assert end_of_text_id(chat) == END
    assert chat.eos_token_id != END


def test_a_tokenizer_without_end_of_text_is_refused() -> None:
    class Bare:
        eos_token = None

        def get_vocab(self) -> dict[str, int]:
            return {"a": 0}

    with pytest.raises(InputError, match="no end-of-text token"):
        end_of_text_id(Bare())  # type: ignore[arg-type]


def test_an_empty_corpus_is_refused() -> None:
    with pytest.raises(InputError, match="corpus is empty"):
        pack_rows([])


def test_an_empty_held_out_part_says_which_share_would_give_a_row() -> None:
    with pytest.raises(InputError, match="held-out part is empty") as caught:
        pack_rows(BASE, held_out=1e-6)
    share = re.search(r"`held_out` to ([0-9.]+) or more", caught.value.remedy)
    assert share
    assert len(pack_rows(BASE, held_out=float(share[1])).held_out) >= 1
    with pytest.raises(InputError):
        pack_rows(BASE, held_out=float(share[1]) - 0.002)


def test_a_corpus_too_short_for_two_parts_is_refused_without_an_impossible_remedy() -> None:
    for documents in (["one doc"], BASE[:2]):
        with pytest.raises(InputError, match="too short") as caught:
            pack(documents, TOKENIZER, sequence_length=64, held_out=0.1, seed=0)
        assert "set `held_out`" not in caught.value.remedy


def test_a_training_part_of_less_than_a_row_is_refused() -> None:
    with pytest.raises(InputError, match="do not fill one sequence of 8"):
        pack_rows(BASE, held_out=0.999999)


def test_progress_is_reported() -> None:
    class Heard(Silent):
        calls: tuple[object, ...] = ()

        def progress(self, done: int, total: int, unit: str, **figures: float) -> None:
            self.calls += ((done, unit, figures),)

    report = Heard()
    pack(BASE, TOKENIZER, sequence_length=8, held_out=0.3, seed=0, report=report)
    assert report.calls == ((60, "documents", {"tokens": 420}),)
