"""A tiny real parent and a tiny real corpus, both deterministic and made in under a second."""

from __future__ import annotations

import json
import random
from pathlib import Path

from cascade.models.random_parent import END_OF_TEXT, PAD, make_model, make_parent, make_tokenizer

__all__ = ["END_OF_TEXT", "PAD", "make_corpus", "make_model", "make_parent", "make_tokenizer"]

SUBJECTS = (
    "the river|a small house|the old teacher|her brother|the engine|a quiet city|the careful reader|winter"
)
VERBS = "carries|follows|remembers|changes|explains|meets|repairs|leaves|measures|answers"
OBJECTS = (
    "the bridge|a long letter|every question|the morning train|its own shape|a broken clock|the next page"
)
TAILS = (
    "before noon|without a word|as it always did|in the rain|for the third time|because it must|near the sea"
)


def make_corpus(path: Path, *, documents: int = 160, seed: int = 0) -> Path:
    """Write a .jsonl corpus with the field `text`: about 500 characters a document, 80 kB by default."""
    draw = random.Random(seed)
    with path.open("w", encoding="ascii") as stream:
        for _ in range(documents):
            stream.write(
                json.dumps({"text": " ".join(_sentence(draw) for _ in range(draw.randint(5, 14)))}) + "\n"
            )
    return path


def _sentence(draw: random.Random) -> str:
    parts = (draw.choice(words.split("|")) for words in (SUBJECTS, VERBS, OBJECTS, TAILS))
    return " ".join(parts).capitalize() + f" in {draw.randint(1800, 2020)}."
