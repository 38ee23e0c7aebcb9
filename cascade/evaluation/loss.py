"""The cross-entropy alone, which asks no teacher, without [B, T, V] in memory.

N tokens, D hidden size, V vocabulary, C tokens of one chunk.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from cascade.data.corpus import Corpus
from cascade.distillation.batches import batch_of
from cascade.distillation.fused import IGNORED, chunk_tokens
from cascade.distillation.signals import Part
from cascade.distillation.states import device_of, final_states, head_of
from cascade.evaluation.metrics import BATCH_TOKENS
from cascade.report import SILENT, Report


@torch.no_grad()
def cross_entropy(
    model: PreTrainedModel, corpus: Corpus, part: Part, rows: Sequence[int], *, report: Report = SILENT
) -> float:
    """Nats a target over one or more rows of a part; the sum is float64. The model is left for inference."""
    model.eval()
    head, device = head_of(model), device_of(model)
    loss, targets = torch.zeros((), dtype=torch.float64, device=device), 0
    size = max(1, BATCH_TOKENS // corpus.sequence_length)
    for start in range(0, len(rows), size):
        some = rows[start : start + size]
        batch = batch_of(corpus, part, some, device)
        states_ND = final_states(model, batch.ids, batch.positions)[:, :-1].flatten(0, 1)
        for at in range(0, len(states_ND), chunk := chunk_tokens(head.vocabulary)):
            logits_CV = head.logits(states_ND[at : at + chunk]).float()
            labels_C = batch.labels[at : at + chunk]
            loss += functional.cross_entropy(logits_CV, labels_C, ignore_index=IGNORED, reduction="sum")
        targets += int((batch.labels != IGNORED).sum())
        report.progress(
            (start + len(some)) * corpus.sequence_length, len(rows) * corpus.sequence_length, "tokens"
        )
    return loss.item() / targets
