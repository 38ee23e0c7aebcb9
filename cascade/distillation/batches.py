"""Rows of the corpus as a forward pass takes them, with what is to be predicted.

B rows, T tokens. The target of a position is the next token, so those of a row are 0..T-2. The token after
an end of text begins another document, which nothing before it foretells: where documents are kept apart
it is no target, neither for a divergence nor for a cross-entropy, in training and in evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cascade.data.corpus import Corpus
from cascade.distillation.fused import IGNORED
from cascade.distillation.signals import Part, batch_ids


@dataclass(frozen=True)
class Batch:
    """ids [B, T]: int64. positions [B, T]: of tokens in their documents, or None where a row is one text.

    labels [B * (T - 1)]: the next tokens, row by row; `IGNORED` where there is no target.
    """

    ids: Tensor
    positions: Tensor | None
    labels: Tensor

    def beginning(self, tokens: int) -> Batch:
        """The first tokens of a batch of one row."""
        positions = None if self.positions is None else self.positions[:, :tokens]
        return Batch(self.ids[:, :tokens], positions, self.labels[: tokens - 1])


def batch_of(corpus: Corpus, part: Part, rows: Sequence[int], device: torch.device) -> Batch:
    """Some rows of a part."""
    ids_BT = batch_ids(corpus, part, rows, device)
    labels_BT = ids_BT[:, 1:]
    if corpus.end_of_text is not None:
        labels_BT = labels_BT.masked_fill(ids_BT[:, :-1] == corpus.end_of_text, IGNORED)
    return Batch(ids_BT, corpus.positions(ids_BT), labels_BT.flatten())


def count_targets(corpus: Corpus, part: Part, rows: Sequence[int]) -> int:
    """Tokens of some rows that are to be predicted."""
    if corpus.end_of_text is None:
        return len(rows) * (corpus.sequence_length - 1)
    ids_BT = batch_ids(corpus, part, rows, torch.device("cpu"))
    return int((ids_BT[:, :-1] != corpus.end_of_text).sum())
