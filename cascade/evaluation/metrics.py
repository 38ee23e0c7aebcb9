"""Held-out figures of a model and its distance to the parent, without [B, T, V] in memory.

N tokens, D student hidden size, E teacher hidden size, V vocabulary, C tokens of one chunk.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cascade.data.corpus import Corpus
from cascade.distillation.batches import batch_of
from cascade.distillation.fused import IGNORED, chunk_tokens
from cascade.distillation.signals import Part, Teacher, batch_ids
from cascade.distillation.states import check_head, device_of, final_states, head_of
from cascade.distillation.targets import aligned, dense
from cascade.errors import InputError
from cascade.models.documents import check_documents_apart
from cascade.report import SILENT, Report

BATCH_TOKENS = 1024
"""Tokens of one forward pass."""


@dataclass(frozen=True)
class Metrics:
    """held_out_ce, kl_to_parent = KL(parent || model): nats per target; top1_agreement: share of targets
    on which both rank the same token first; tokens_per_second: the model's forward pass and logits
    alone, on `BATCH_TOKENS` tokens at a time; tokens: targets measured."""

    held_out_ce: float
    kl_to_parent: float
    top1_agreement: float
    tokens_per_second: float
    tokens: int


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    teacher: Teacher,
    corpus: Corpus,
    rows: Sequence[int],
    *,
    report: Report = SILENT,
) -> Metrics:
    """Measure `model` on some held-out rows of the corpus. Sums are float64.

    Raises InputError for a model whose vocabulary or head does not fit, or for no rows.
    """
    if not rows:
        raise InputError(
            "an evaluation needs at least one held-out row",
            value=len(rows),
            where="corpus.held_out_tokens",
            remedy="raise it, or hold out a larger share of the corpus",
        )
    model.eval()
    vocabulary = head_of(model).vocabulary
    device = device_of(model)
    check_head(model, batch_ids(corpus, Part.HELD_OUT, rows[:1], device)[0])
    check_documents_apart(model, corpus)
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    chunk, seconds = chunk_tokens(vocabulary), 0.0
    size = max(1, BATCH_TOKENS // corpus.sequence_length)
    for start in range(0, len(rows), size):
        some = rows[start : start + size]
        batch = batch_of(corpus, Part.HELD_OUT, some, device)
        answers = aligned(teacher.targets(Part.HELD_OUT, some), vocabulary).to(device, torch.float32)
        began = _now(device)
        model_ND = final_states(model, batch.ids, batch.positions)[:, :-1].flatten(0, 1)
        seconds += _now(device) - began
        for cut in (slice(at, at + chunk) for at in range(0, len(model_ND), chunk)):
            began = _now(device)
            logits_CV = head_of(model).logits(model_ND[cut])
            seconds += _now(device) - began
            sums += _compare(logits_CV.float(), dense(answers[cut]).logits(), batch.labels[cut])
        done = (start + len(some)) * corpus.sequence_length
        report.progress(done, len(rows) * corpus.sequence_length, "tokens")
    targets = int(sums[3].item())
    ce, kl, agreed = (sums[:3] / targets).tolist()
    return Metrics(ce, kl, agreed, len(rows) * (corpus.sequence_length - 1) / seconds, targets)


def _compare(logits_CV: Tensor, parent_CV: Tensor, labels_C: Tensor) -> Tensor:
    """Sums [4] over a chunk's targets: cross-entropy, KL(parent || model), the same first choice, and 1.

    The parent's columns may be fewer: where the two are padded differently, the KL is over what both have.
    """
    kept = labels_C != IGNORED
    if not kept.all():
        logits_CV, parent_CV, labels_C = logits_CV[kept], parent_CV[kept], labels_C[kept]
    agreed = (logits_CV.argmax(-1) == parent_CV.argmax(-1)).sum(dtype=torch.float64)
    log_CV, log_parent_CV = logits_CV.log_softmax(-1), parent_CV.log_softmax(-1)
    ce = -log_CV.gather(1, labels_C[:, None]).sum(dtype=torch.float64)
    if (shared := parent_CV.shape[1]) < logits_CV.shape[1]:
        log_CV = logits_CV[:, :shared].log_softmax(-1)
    kl = (log_parent_CV.exp() * (log_parent_CV - log_CV)).sum(-1).sum(dtype=torch.float64)
    return torch.stack([ce, kl, agreed, kept.sum(dtype=torch.float64)])


def _now(device: torch.device) -> float:
    """Seconds, after the device has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
