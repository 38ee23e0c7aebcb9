"""Where a training's rows come from: by default the corpus, in its order.

B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from cascade.data.corpus import Corpus
from cascade.distillation.batches import Batch, batch_of, count_targets
from cascade.distillation.fused import IGNORED
from cascade.distillation.signals import Part, Teacher
from cascade.distillation.targets import Targets


@dataclass(frozen=True)
class StepRows:
    """The rows of one step, and who answers for them.

    corpus: what they lie in; rows: which of its training rows; teacher: over this corpus. named: the rows of
    the original corpus that they are or that prompted them. prompts [B]: tokens of each row that the student
    was given before it went on by itself, 0 for a row of the corpus; only what it wrote is a target.
    """

    corpus: Corpus
    teacher: Teacher
    rows: Sequence[int]
    named: Sequence[int]
    prompts: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def part(self, start: int, stop: int, device: torch.device) -> tuple[Batch, Targets]:
        """Some of the rows with their labels, and what the teacher says of them."""
        some = self.rows[start:stop]
        batch = batch_of(self.corpus, Part.TRAIN, some, device)
        prompts_B = self.prompts[start:stop]
        if prompts_B.any():
            given_BT = self._given(prompts_B).to(device)
            batch = replace(batch, labels=batch.labels.masked_fill(given_BT.flatten(), IGNORED))
        return batch, self.teacher.targets(Part.TRAIN, some)

    @property
    def targets(self) -> int:
        """Tokens that are to be predicted."""
        return count_targets(self.corpus, Part.TRAIN, self.rows) - self._count(self._given(self.prompts))

    @property
    def own_targets(self) -> int:
        """Those of them that the student wrote."""
        if not self.prompts.any():
            return 0
        return self._count(~self._given(self.prompts) & (self.prompts > 0)[:, None])

    def _given(self, prompts_B: Tensor) -> Tensor:
        """Whether the next token [B, T - 1] is part of a prompt."""
        return torch.arange(1, self.corpus.sequence_length) < prompts_B[:, None]

    def _count(self, chosen_BT: Tensor) -> int:
        """Targets among the chosen next tokens."""
        if not chosen_BT.any():
            return 0
        labels = batch_of(self.corpus, Part.TRAIN, self.rows, torch.device("cpu")).labels
        return int((chosen_BT.flatten() & (labels != IGNORED)).sum())


class RowSource(Protocol):
    """Whoever has the rows of every position of a training."""

    def rows(self, positions: Sequence[int], should_stop: Callable[[], bool]) -> StepRows | None:
        """Those of one step; None if asked to stop before they are there."""

    def record(self) -> dict[str, object]:
        """What they depend on beside the corpus, as plain JSON."""


@dataclass(frozen=True)
class CorpusRows:
    """The corpus itself."""

    corpus: Corpus
    teacher: Teacher

    def rows(self, positions: Sequence[int], should_stop: Callable[[], bool]) -> StepRows:
        """See `RowSource.rows`."""
        rows = [self.corpus.row(position) for position in positions]
        return StepRows(self.corpus, self.teacher, rows, rows, torch.zeros(len(rows), dtype=torch.int64))

    def record(self) -> dict[str, object]:
        """See `RowSource.record`."""
        return {}
