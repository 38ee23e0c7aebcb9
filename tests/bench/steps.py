"""One optimiser step with stored signals beside one of plain cross-entropy: tokens per second and memory."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedModel

from cascade.data.corpus import Corpus
from cascade.distillation.fused import fused_distillation_loss
from cascade.distillation.loop import adamw
from cascade.distillation.signals import Part, Teacher, batch_ids
from cascade.distillation.states import final_states, head_of
from tests.bench import memory

PLAIN = "cross-entropy"


@dataclass
class Figures:
    """Of the steps of one kind: seconds, and bytes of the largest resident size during each."""

    seconds: list[float] = field(default_factory=list)
    peak: list[int] = field(default_factory=list)


def alternate(
    student: PreTrainedModel, corpus: Corpus, teachers: dict[str, Teacher], steps: int
) -> dict[str, Figures]:
    """So many steps of every kind in turn, after one of each that does not count, of one row each."""
    optimizer = adamw(student.float().train(), weight_decay=0.1)
    kinds: dict[str, Callable[[int], None]] = {PLAIN: lambda row: plain(student, corpus, row)}
    for name, teacher in teachers.items():
        kinds[name] = lambda row, teacher=teacher: distilled(student, corpus, teacher, row)  # type: ignore[misc]
    figures = {name: Figures() for name in kinds}
    for step in range(steps + 1):
        for name, backward in kinds.items():
            trim()
            memory.reset_peak()
            began = time.perf_counter()
            backward(step)
            clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if step:
                figures[name].seconds.append(time.perf_counter() - began)
                figures[name].peak.append(memory.peak())
    return figures


def plain(student: PreTrainedModel, corpus: Corpus, row: int) -> None:
    """As any trainer does it: the model's logits and torch's loss."""
    ids_BT = batch_ids(corpus, Part.TRAIN, [row], torch.device("cpu"))
    logits_BTV = student(input_ids=ids_BT, use_cache=False).logits
    cross_entropy(logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten()).backward()


def distilled(student: PreTrainedModel, corpus: Corpus, teacher: Teacher, row: int) -> None:
    """As the loop does it, reading of the signals included."""
    ids_BT = batch_ids(corpus, Part.TRAIN, [row], torch.device("cpu"))
    targets = teacher.targets(Part.TRAIN, [row])
    student_ND = final_states(student, ids_BT)[:, :-1].flatten(0, 1)
    labels_N = ids_BT[:, 1:].flatten()
    fused_distillation_loss(student_ND, head_of(student), targets, labels_N).loss.backward()


def trim() -> None:
    """What the allocator keeps of the step before must not count for the next."""
    ctypes.CDLL(None).malloc_trim(0)


def step_rows(figures: dict[str, Figures], tokens: int, sizes: dict[str, str]) -> list[list[str]]:
    """A row a kind. Ratios: the median of those to the plain step of the same round."""
    base, found = figures[PLAIN], []
    for name, own in figures.items():
        pairs = zip(base.seconds, own.seconds, strict=True)
        speed = median(other / mine for other, mine in pairs)
        space = median(own.peak) / median(base.peak)
        met = "" if name == PLAIN else "met" if speed >= 0.95 and space <= 1.1 else "missed"
        found.append(
            [
                name,
                sizes.get(name, ""),
                f"{tokens / median(own.seconds):.0f}",
                f"{speed:.3f}",
                f"{median(own.peak) / 2**20:,.0f}",
                f"{space:.2f}",
                met,
            ]
        )
    return found
