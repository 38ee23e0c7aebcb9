"""The corpus as its own teacher: the text's next token with probability one.

N tokens, V vocabulary. The forward KL from it is the cross-entropy, so fine-tuning and the control without a
teacher are distillation like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cascade.data.corpus import Corpus
from cascade.distillation.signals import Part, batch_ids
from cascade.distillation.targets import Index

# exp(-1e4) is zero in every floating-point type, and unlike minus infinity it may be multiplied by zero.
NEVER = -1e4


@dataclass(frozen=True)
class LabelTargets:
    """All probability on one token each. labels [N]: int64."""

    labels: Tensor
    vocabulary: int
    dtype: torch.dtype = torch.float32

    def __len__(self) -> int:
        """N."""
        return len(self.labels)

    def __getitem__(self, index: Index) -> LabelTargets:
        """Those of some of the tokens."""
        return LabelTargets(self.labels[index], self.vocabulary, self.dtype)

    def to(self, device: torch.device, dtype: torch.dtype) -> LabelTargets:
        """On a device; the logits will have that type."""
        return LabelTargets(self.labels.to(device), self.vocabulary, dtype)

    def logits(self) -> Tensor:
        """[N, V]: 0 for the label, what no softmax sees for all others."""
        shape = (len(self.labels), self.vocabulary)
        logits_NV = torch.full(shape, NEVER, dtype=self.dtype, device=self.labels.device)
        return logits_NV.scatter_(1, self.labels[:, None], 0.0)


class CorpusTeacher:
    """Answers with the corpus itself. vocabulary: of the student's LM head."""

    def __init__(self, corpus: Corpus, vocabulary: int) -> None:
        self.corpus, self.vocabulary = corpus, vocabulary

    def targets(self, part: Part, rows: Sequence[int]) -> LabelTargets:
        """See `Teacher.targets`."""
        ids_BT = batch_ids(self.corpus, part, rows, torch.device("cpu"))
        return LabelTargets(ids_BT[:, 1:].flatten(), self.vocabulary)
