"""Documents become rows of tokens: split into two parts by hash, shuffled by hash, joined and cut.

Everything that decides about a document is a hash of its text, never its position: more documents may be
added later, or the same ones come in another order, and no document changes sides.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from cascade.data import PACKING
from cascade.errors import InputError
from cascade.report import SILENT, Report

DOCUMENTS_AT_ONCE = 1000
# What separates documents in pre-training. A chat model's own end-of-sequence token may instead end a turn,
# after which the model expects the next speaker and no new document; hence these names come first.
END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")


@dataclass(frozen=True)
class Tokenized:
    """One document as int32 token ids without special tokens, and the sha256 of its text.

    repeat: how many documents with the same text came before it.
    """

    digest: bytes
    repeat: int
    tokens: np.ndarray

    @property
    def share(self) -> float:
        """A uniform number in [0, 1) made of the hash alone: below the held-out share means held out."""
        return int.from_bytes(self.digest[:6]) / 2**48

    def order(self, seed: int) -> bytes:
        """The sorting key of the seeded order; copies of a document get places far from each other."""
        return hashlib.sha256(f"{seed} {self.digest.hex()} {self.repeat}".encode()).digest()


@dataclass(frozen=True)
class Packed:
    """Rows of T = `sequence_length` tokens: train int32 [N, T] and held_out int32 [M, T], no row empty.

    documents, tokens: counts (train, held-out) before the last, partial row of each part was dropped;
    tokens include one end-of-text token a document. separate: whoever reads a row keeps its documents apart.
    """

    train: Tensor
    held_out: Tensor
    seed: int
    end_of_text: int
    documents: tuple[int, int]
    tokens: tuple[int, int]
    separate: bool

    @property
    def sequence_length(self) -> int:
        """T, tokens of a row."""
        return self.train.shape[1]

    @property
    def identity(self) -> str:
        """Hex sha256 of both parts' rows, of how they are read, and of the seed that orders later epochs.

        Teacher signals and students that name the same identity saw the same tokens at the same places.
        """
        digest = hashlib.sha256(f"packing {PACKING} seed {self.seed}".encode())
        if self.separate:
            digest.update(f" documents end with {self.end_of_text}".encode())
        for rows in (self.train, self.held_out):
            digest.update(f" {tuple(rows.shape)} ".encode())
            digest.update(rows.numpy().astype("<i4", copy=False).data)
        return digest.hexdigest()

    def facts(self) -> dict[str, int | str]:
        """What a manifest says about the corpus."""
        return {
            "identity": self.identity,
            "sequence_length": self.sequence_length,
            "seed": self.seed,
            "end_of_text": self.end_of_text,
            "separate_documents": self.separate,
            "train_documents": self.documents[0],
            "held_out_documents": self.documents[1],
            "train_rows": self.train.shape[0],
            "held_out_rows": self.held_out.shape[0],
            "train_tokens": self.train.numel(),
            "held_out_tokens": self.held_out.numel(),
        }


def pack(
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    sequence_length: int,
    held_out: float,
    seed: int,
    separate: bool = True,
    report: Report = SILENT,
) -> Packed:
    """Tokenize the documents and pack each part into rows of `sequence_length` tokens.

    held_out: share (0 to 1) of the documents, by hash, kept out of training. The training part is ordered
    by hash and seed; the held-out part by hash alone, so that another seed is measured on the same rows.
    Each document is followed by the end-of-text token. separate: see `Packed`. Memory: 4 bytes a token.
    InputError: no documents, too little text for one row of training, or for one held-out row.
    """
    end_of_text = end_of_text_id(tokenizer)
    found = list(tokenize(documents, tokenizer, report))
    if not found:
        raise InputError(
            "the corpus is empty", where="corpus.sources", remedy="name a source with at least one document"
        )
    sides = [[d for d in found if d.share >= held_out], [d for d in found if d.share < held_out]]
    train, test = (join(side, s, end_of_text) for side, s in zip(sides, (seed, 0), strict=True))
    if test.size < sequence_length:
        raise too_little_held_out(found, sequence_length, held_out)
    if train.size < sequence_length:
        raise too_short(train.size, sequence_length)
    return Packed(
        cut(train, sequence_length),
        cut(test, sequence_length),
        seed,
        end_of_text,
        documents=(len(sides[0]), len(sides[1])),
        tokens=(train.size, test.size),
        separate=separate,
    )


def pack_watched(
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    sequence_length: int,
    separate: bool = True,
    report: Report = SILENT,
) -> Packed:
    """A corpus that nobody trains on: all rows are held out, in the order that `pack` gives those.

    InputError: too little text for one row.
    """
    end_of_text = end_of_text_id(tokenizer)
    found = list(tokenize(documents, tokenizer, report))
    rows, none = join(found, 0, end_of_text), join([], 0, end_of_text)
    if rows.size < sequence_length:
        raise InputError(
            f"the watched corpus is too short: {rows.size} tokens do not fill one sequence of "
            f"{sequence_length}",
            where="watch.sources",
            remedy="add text to `watch.sources`, or lower `corpus.sequence_length`",
        )
    return Packed(
        cut(none, sequence_length),
        cut(rows, sequence_length),
        0,
        end_of_text,
        documents=(0, len(found)),
        tokens=(0, rows.size),
        separate=separate,
    )


def end_of_text_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the token that ends a document; InputError if the tokenizer has none."""
    vocabulary = tokenizer.get_vocab()
    for name in (*END_OF_TEXT, tokenizer.eos_token):
        if name in vocabulary:
            return int(vocabulary[name])
    raise InputError(
        "the parent's tokenizer has no end-of-text token, so documents cannot be told apart",
        value=type(tokenizer).__name__,
        where="parent",
        remedy="set `eos_token` in the parent's tokenizer_config.json",
    )


def tokenize(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, report: Report
) -> Iterator[Tokenized]:
    """Tokenize in batches; the name of a special token inside a document stays ordinary text."""
    stream, repeats = iter(documents), Counter[bytes]()
    done = tokens = 0
    while batch := list(islice(stream, DOCUMENTS_AT_ONCE)):
        rows = tokenizer(
            batch,
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            verbose=False,
        )["input_ids"]
        for text, ids in zip(batch, rows, strict=True):
            digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
            yield Tokenized(digest, repeats[digest], np.asarray(ids, dtype=np.int32))
            repeats[digest] += 1
        done, tokens = done + len(batch), tokens + sum(map(len, rows))
        # The stream does not say how long it is.
        report.progress(done, done, "documents", tokens=tokens)


def join(side: list[Tokenized], seed: int, end_of_text: int) -> np.ndarray:
    """All tokens of one part in its seeded order, each document followed by end of text: int32 [tokens]."""
    end = np.array([end_of_text], dtype=np.int32)
    ordered = sorted(side, key=lambda document: document.order(seed))
    return np.concatenate([end[:0], *(part for document in ordered for part in (document.tokens, end))])


def cut(tokens: np.ndarray, sequence_length: int) -> Tensor:
    """Whole rows int32 [N, T]; the last, partial row is dropped."""
    rows = tokens.size // sequence_length
    return torch.from_numpy(tokens[: rows * sequence_length].reshape(rows, sequence_length))


def document_positions(ids_BT: Tensor, end_of_text: int) -> Tensor:
    """Position [B, T], int64, of every token in its document, whose last token is end of text.

    A row's first token is taken for a beginning.
    """
    place_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device).expand_as(ids_BT)
    begins_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    begins_BT[:, 1:] = ids_BT[:, :-1] == end_of_text
    return place_BT - torch.where(begins_BT, place_BT, 0).cummax(1).values


def too_short(tokens: int, sequence_length: int) -> InputError:
    """The error for a training part of less than one row."""
    return InputError(
        f"the corpus is too short: {tokens} training tokens do not fill one sequence of {sequence_length}",
        where="corpus",
        remedy="add text to `corpus.sources`, or lower `sequence_length` or `held_out`",
    )


def too_little_held_out(found: list[Tokenized], sequence_length: int, held_out: float) -> InputError:
    """The error for a held-out part of less than one row; names the share that gives one, if any does."""
    tokens = 0
    for document in sorted(found, key=lambda document: document.share):
        tokens += document.tokens.size + 1
        # Rounded up to whole thousandths, so that the number can be typed as it is printed.
        share = (math.floor(document.share * 1000) + 1) / 1000
        if tokens >= sequence_length:
            break
    left = sum(d.tokens.size + 1 for d in found if d.share >= share)
    if tokens < sequence_length or share >= 1 or left < sequence_length:
        total = sum(d.tokens.size + 1 for d in found)
        return InputError(
            f"the corpus is too short to hold anything out: {len(found)} documents with {total} tokens do "
            f"not give a sequence of {sequence_length} to both parts",
            value=held_out,
            where="corpus.held_out",
            remedy="add text to `corpus.sources`, or lower `sequence_length`",
        )
    return InputError(
        f"the held-out part is empty: its documents do not fill one sequence of {sequence_length} tokens",
        value=held_out,
        where="corpus.held_out",
        remedy=f"set `held_out` to {share:g} or more, add text, or lower `sequence_length`",
    )
