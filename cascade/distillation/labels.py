"""The corpus as its own teacher: the text's next token with probability one.

The forward KL from it is the cross-entropy, so fine-tuning and the control without a teacher are distillation
like any other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cascade.data.corpus import Corpus
from cascade.distillation.signals import Part, batch_ids
from cascade.distillation.targets import SparseTargets


class CorpusTeacher:
    """Answers with the corpus itself. vocabulary: V of the student's LM head."""

    waited = 0.0

    def __init__(self, corpus: Corpus, vocabulary: int) -> None:
        self.corpus, self.vocabulary = corpus, vocabulary

    def targets(self, part: Part, rows: Sequence[int]) -> SparseTargets:
        """See `Teacher.targets`."""
        ids_BT = batch_ids(self.corpus, part, rows, torch.device("cpu"))
        labels_N1 = ids_BT[:, 1:].flatten()[:, None]
        certain_N1 = torch.ones(labels_N1.shape)
        return SparseTargets(labels_N1, certain_N1, torch.zeros(len(labels_N1)), self.vocabulary)
