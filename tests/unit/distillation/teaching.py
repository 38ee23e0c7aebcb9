"""A tiny teacher, student and corpus, for every test of the step."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from cascade.data.corpus import Corpus
from tests.tiny import make_model

LENGTH = 16


def make_rows(train: int = 24, held_out: int = 3, length: int = LENGTH, seed: int = 0) -> Corpus:
    """Rows of bytes with structure to learn: each is a random walk with small steps."""
    draw = torch.Generator().manual_seed(seed)
    steps = torch.randint(1, 4, (train + held_out, length), generator=draw)
    rows = (torch.randint(256, (train + held_out, 1), generator=draw) + steps.cumsum(1)) % 256
    return Corpus(rows[:train].int(), rows[train:].int(), identity=f"walk-{seed}-{length}", seed=seed)


def make_teacher() -> PreTrainedModel:
    """Wider than the student, with the same vocabulary."""
    return make_model(seed=1, num_hidden_layers=2, hidden_size=48)


def make_student(seed: int = 2, **overrides: object) -> PreTrainedModel:
    """Two layers, tied, with gains and biases away from their constants."""
    return make_model(seed=seed, **{"num_hidden_layers": 2, "hidden_size": 32, **overrides})
