"""A second corpus that nobody trains on, measured now and then: over-fitting shows, the best weights stay.

B rows, T tokens, N targets, D hidden, V vocabulary, C targets of one chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from cascade.data.corpus import Corpus
from cascade.distillation.batches import batch_of
from cascade.distillation.fused import IGNORED, chunk_tokens
from cascade.distillation.settings import rows_of
from cascade.distillation.signals import Part
from cascade.distillation.states import device_of, final_states, head_of
from cascade.distillation.training_state import StepRecord
from cascade.errors import CascadeError

MEASUREMENTS = 10
BATCH_TOKENS = 1024
"""Tokens of one forward pass."""


def derived_every(steps: int) -> int:
    """Steps from one measurement to the next: ceil(steps / 10), so that a training has at most 10.

    Doubt: a choice of cost, not measured; ten passes over 8192 tokens are 2 % of a training of 1.4 M tokens.
    """
    return math.ceil(steps / MEASUREMENTS)


@dataclass(frozen=True)
class WatchSettings:
    """How a corpus is watched.

    tokens: of it that are measured, rounded up to whole rows, or all there are. every: steps from one
    measurement to the next; the last step is measured too. patience: measurements in a row no better than
    the best that end the training.
    """

    tokens: int
    every: int
    patience: int


@dataclass(frozen=True)
class Watch:
    """A corpus of which the held-out rows are measured, and how."""

    corpus: Corpus
    settings: WatchSettings

    @property
    def rows(self) -> int:
        """That are measured, the first ones."""
        return min(rows_of(self.settings.tokens, self.corpus.sequence_length), len(self.corpus.held_out))

    def due(self, finished: int, last: int) -> bool:
        """Whether to measure after so many steps of a training that ends after `last`."""
        return finished > 0 and (finished % self.settings.every == 0 or finished == last)

    def over(self, steps: Sequence[StepRecord]) -> bool:
        """Whether as many measurements in a row as it takes were no better than the best before them."""
        found = measured(steps)
        return bool(found) and len(found) - 1 - found.index(best_of(found)) >= self.settings.patience

    def record(self) -> dict[str, object]:
        """Plain JSON; two watches with equal records measure the same."""
        return {"corpus": self.corpus.identity, **asdict(self.settings)}

    @torch.no_grad()
    def measure(self, student: PreTrainedModel, should_stop: Callable[[], bool]) -> float | None:
        """Cross-entropy in nats a target; None if asked to stop. On a GPU the body runs in bfloat16 autocast.

        The student draws nothing here and is left as it was, so that measuring changes no training.
        Raises CascadeError for a cross-entropy that is not finite.
        """
        training, device = student.training, device_of(student)
        student.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        size = max(1, BATCH_TOKENS // self.corpus.sequence_length)
        for start in range(0, self.rows, size):
            sums += self._sums(student, range(start, min(start + size, self.rows)))
            if should_stop():
                return None
        student.train(training)
        mean = (sums[0] / sums[1]).item()
        if not math.isfinite(mean):
            raise CascadeError(
                "the watched cross-entropy is not finite",
                value=mean,
                where="the watched corpus",
                remedy="lower the learning rate; the snapshots kept are from before it",
            )
        return mean

    def _sums(self, student: PreTrainedModel, rows: Sequence[int]) -> torch.Tensor:
        """Of some rows [2]: the cross-entropies in nats, and the targets."""
        device, head = device_of(student), head_of(student)
        on_gpu = device.type == "cuda"
        batch = batch_of(self.corpus, Part.HELD_OUT, rows, device)
        kept = batch.labels != IGNORED
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
            states_BTD = final_states(student, batch.ids, batch.positions)[:, :-1]
        states_ND = states_BTD.to(head.weight.dtype).flatten(0, 1)[kept]
        labels_N = batch.labels[kept]
        total = torch.zeros((), dtype=torch.float64, device=device)
        chunk = chunk_tokens(head.vocabulary)
        for cut in (slice(at, at + chunk) for at in range(0, len(states_ND), chunk)):
            logits_CV = head.logits(states_ND[cut]).float()
            total += cross_entropy(logits_CV, labels_N[cut], reduction="none").sum(dtype=torch.float64)
        return torch.stack([total, kept.sum(dtype=torch.float64)])


def measured(steps: Sequence[StepRecord]) -> list[StepRecord]:
    """The steps after which the watched corpus was measured."""
    return [step for step in steps if step.watched_ce is not None]


def best_of(found: Sequence[StepRecord]) -> StepRecord:
    """Of steps that were measured, the first with the lowest cross-entropy."""
    return min(found, key=lambda step: (step.watched_ce, step.step))


def watch_facts(steps: Sequence[StepRecord], planned: int) -> dict[str, object]:
    """What a watch found out, as plain JSON. planned: steps if nothing ends it early; steps count from 0."""
    found = measured(steps)
    best = best_of(found)
    return {
        "stopped_early": len(steps) < planned,
        "measurements": len(found),
        "best_step": best.step,
        "best_tokens": best.tokens,
        "best_ce": best.watched_ce,
        "last_ce": found[-1].watched_ce,
    }
