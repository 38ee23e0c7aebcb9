"""The corpus on disk is the packed one, bit for bit, and every training position has one row."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cascade.data.corpus import Corpus, require_tokens, write
from cascade.data.packing import pack
from cascade.errors import InputError
from tests.tiny import make_tokenizer

DOCUMENTS = [f"document number {number} of the corpus" for number in range(80)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus")
    write(pack(DOCUMENTS, make_tokenizer(), sequence_length=32, held_out=0.1, seed=3), path)
    return path


def test_what_is_opened_is_what_was_packed(folder: Path) -> None:
    packed = pack(DOCUMENTS, make_tokenizer(), sequence_length=32, held_out=0.1, seed=3)
    corpus = Corpus.open(folder)
    assert torch.equal(corpus.train, packed.train)
    assert torch.equal(corpus.held_out, packed.held_out)
    assert (corpus.identity, corpus.seed, corpus.sequence_length) == (packed.identity, 3, 32)


def test_the_same_corpus_is_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    write(pack(reversed(DOCUMENTS), make_tokenizer(), sequence_length=32, held_out=0.1, seed=3), tmp_path)
    for name in ("train.safetensors", "held_out.safetensors"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_epoch_zero_is_the_stored_order_and_every_epoch_visits_every_row_once(folder: Path) -> None:
    corpus = Corpus.open(folder)
    rows = len(corpus.train)
    epochs = [[corpus.row(epoch * rows + place) for place in range(rows)] for epoch in range(3)]
    assert epochs[0] == list(range(rows))
    assert all(sorted(epoch) == epochs[0] for epoch in epochs)
    assert epochs[1] != epochs[0]
    assert epochs[1] != epochs[2]


def test_a_resumed_run_finds_the_same_row_at_a_position(folder: Path) -> None:
    corpus = Corpus.open(folder)
    rows = len(corpus.train)
    forward = {position: corpus.row(position) for position in range(3 * rows)}
    for position in (2 * rows + 5, rows + 1, 7, 2 * rows):
        assert Corpus.open(folder).row(position) == corpus.row(position) == forward[position]


def test_tokens_beyond_the_corpus_take_epochs_that_must_be_asked_for() -> None:
    require_tokens(10, 32, stage="small", tokens=320, epochs=1)
    require_tokens(10, 32, stage="small", tokens=640, epochs=2)
    with pytest.raises(InputError, match="320 training tokens") as caught:
        require_tokens(10, 32, stage="small", tokens=641, epochs=2)
    assert "`epochs: 3`" in caught.value.remedy
    assert "stage small" in caught.value.where
