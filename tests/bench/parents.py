"""The parent and the text that benchmarks measure on."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cascade.data.corpus import Corpus
from cascade.data.packing import pack
from cascade.data.sources import EMBEDDED, Source, documents
from cascade.models.sources import load_model, load_tokenizer, resolve_parent

SEQUENCE = 512
HELD_OUT = 0.1
"""Share of the documents; larger than the recipe's, because the texts are small."""


@dataclass(frozen=True)
class Text:
    """A packed text. note: where it is from and which part of it is for what."""

    corpus: Corpus
    note: str


def load_parent(reference: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """In float32, for inference."""
    with tempfile.TemporaryDirectory() as cache:
        source = resolve_parent(reference, cache=Path(cache))
        return load_model(source, torch.float32), load_tokenizer(source)


def read_text(
    path: str, tokenizer: PreTrainedTokenizerBase, *, seed: int = 0, sequence_length: int = SEQUENCE
) -> Text:
    """A file's text, or the embedded one for "", split into a training and a held-out part by document.

    seed: orders the training part; the held-out part is the same for every seed.
    """
    packed = pack(
        documents_of(path), tokenizer, sequence_length=sequence_length, held_out=HELD_OUT, seed=seed
    )
    name = Path(path).name if path else "embedded (docs of Python's standard library)"
    train, held_out = packed.documents
    note = (
        f"text: {name}, packed to {sequence_length} and split by the hash of each document (of a large file: "
        f"of each piece of about 8 kB): {train} documents with {packed.train.numel():,} tokens for "
        f"calibration and training, {held_out} with {packed.held_out.numel():,} for evaluation"
    )
    return Text(Corpus(packed.train, packed.held_out, packed.identity, seed, packed.end_of_text), note)


@lru_cache(1)
def documents_of(path: str) -> tuple[str, ...]:
    """All of them: read once for all seeds."""
    return tuple(documents(Source(path or EMBEDDED)))
