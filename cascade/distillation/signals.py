"""The teacher behind one question, answered by a live model or from states stored once for the family.

B batch, T tokens, E teacher hidden size, V vocabulary. What is stored is the teacher's last hidden
state after its final norm: one product with the LM head gives back every logit, so any objective
can be computed, for 2E bytes per token instead of 2V.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from cascade.data.corpus import Corpus
from cascade.distillation.fused import fused_distillation_loss
from cascade.distillation.states import Head, check_head, device_of, final_states, head_of
from cascade.distillation.targets import StateTargets, Targets
from cascade.errors import CascadeError, InputError
from cascade.models.documents import check_documents_apart
from cascade.report import SILENT, Report

CODEC = "hidden-bfloat16"
RECORD = "signals.json"
SHARD_BYTES = 64 * 2**20
"""Size of one shard: large enough for one request to an object store, small enough to be re-sent."""
BATCH_TOKENS = 1024
"""Tokens of one teacher forward pass; larger batches were no faster on 2 cores."""
FIDELITY_ROWS = 4
"""Rows on which the decoded signals are compared with the exact teacher."""


class Part(StrEnum):
    """The two parts of a corpus."""

    TRAIN = "train"
    HELD_OUT = "held_out"


class Teacher(Protocol):
    """Whoever answers for the distributions that a student is to match."""

    def targets(self, part: Part, rows: Sequence[int]) -> Targets:
        """Of the positions 0..T-2 of some rows of a part, row by row: B * (T - 1) tokens."""


def batch_ids(corpus: Corpus, part: Part, rows: Sequence[int], device: torch.device) -> Tensor:
    """Token ids [B, T], int64, of some rows of a part."""
    source = corpus.train if part is Part.TRAIN else corpus.held_out
    return source[list(rows)].to(device, torch.int64)


class OnlineTeacher:
    """Runs the teacher for every question: costs a forward pass each time, stores nothing."""

    def __init__(self, model: PreTrainedModel, corpus: Corpus) -> None:
        self.model, self.corpus = model.eval(), corpus
        self.head = head_of(model).detach()

    def targets(self, part: Part, rows: Sequence[int]) -> StateTargets:
        """See `Teacher.targets`."""
        return StateTargets(self.states(part, rows)[:, :-1].flatten(0, 1), self.head)

    @torch.no_grad()
    def states(self, part: Part, rows: Sequence[int]) -> Tensor:
        """Final hidden states [B, T, E], float32."""
        ids_BT = batch_ids(self.corpus, part, rows, device_of(self.model))
        return final_states(self.model, ids_BT, self.corpus.positions(ids_BT)).float()


class StoredTeacher:
    """Reads what `write_signals` wrote. head: the same teacher's, which is not stored twice.

    Raises InputError when the signals belong to another packing, codec or width.
    """

    def __init__(self, folder: Path, head: Head, corpus_identity: str) -> None:
        record = json.loads((folder / RECORD).read_text("utf-8"))
        for name, expected in (("codec", CODEC), ("corpus", corpus_identity), ("width", head.width)):
            if record[name] != expected:
                raise InputError(
                    f"the teacher's signals were made for another {name}",
                    value=f"{record[name]}, expected {expected}",
                    where=str(folder / RECORD),
                    remedy="build the signals again for this corpus and teacher",
                )
        self.folder, self.head = folder, head.detach()
        self.rows: dict[str, int] = record["rows"]
        self.rows_per_shard: int = record["rows_per_shard"]

    def targets(self, part: Part, rows: Sequence[int]) -> StateTargets:
        """See `Teacher.targets`. Raises CascadeError for a row that was not stored."""
        states_BTE = torch.stack([self._row(part, row) for row in rows])
        states_NE = states_BTE[:, :-1].flatten(0, 1).to(self.head.weight.device, torch.float32)
        return StateTargets(states_NE, self.head)

    def _row(self, part: Part, row: int) -> Tensor:
        if not 0 <= row < self.rows[part]:
            raise CascadeError(
                "the teacher's signals end before the row that is asked for",
                value=f"row {row} of {part}, {self.rows[part]} rows stored",
                where=str(self.folder),
                remedy="build the signals for at least the tokens of the longest stage",
            )
        # Opened per question: the file is mapped, so only the row's pages are read, and no handle
        # outlives the call.
        shard, index = divmod(row, self.rows_per_shard)
        with safe_open(self.folder / _shard_name(part, shard), framework="pt") as file:
            return file.get_slice("hidden")[index]


def write_signals(
    model: PreTrainedModel,
    corpus: Corpus,
    folder: Path,
    rows: int,
    held_out_rows: int,
    *,
    report: Report = SILENT,
) -> dict[str, object]:
    """Store the teacher's final states of the first `rows` training rows and `held_out_rows` held-out rows.

    Shards are safetensors with one tensor `hidden` [rows, T, E] in bfloat16; `signals.json` is the
    returned record: codec, corpus identity, width, rows, bytes per token, and the KL in nats per
    token between the exact teacher and the decoded one, measured on a few held-out rows.
    Raises InputError when the logits are more than the head's product with the states.
    """
    folder.mkdir(parents=True, exist_ok=True)
    width, length = head_of(model).width, corpus.sequence_length
    counts = {Part.TRAIN: rows, Part.HELD_OUT: held_out_rows}
    teacher = OnlineTeacher(model, corpus)
    probe = Part.HELD_OUT if held_out_rows else Part.TRAIN
    check_head(model, batch_ids(corpus, probe, [0], device_of(model))[0])
    check_documents_apart(model, corpus)
    per_shard = max(1, SHARD_BYTES // (2 * width * length))
    done = 0
    for part, count in counts.items():
        for shard, start in enumerate(range(0, count, per_shard)):
            states = []
            for batch in _batches(range(start, min(start + per_shard, count)), length):
                states.append(teacher.states(part, batch).bfloat16().cpu())
                done += len(batch)
                report.progress(done * length, (rows + held_out_rows) * length, "tokens")
            save_file({"hidden": torch.cat(states)}, folder / _shard_name(part, shard))
    record: dict[str, object] = {
        "codec": CODEC,
        "corpus": corpus.identity,
        "width": width,
        "rows": {part.value: count for part, count in counts.items()},
        "rows_per_shard": per_shard,
        "bytes_per_token": 2 * width,
        "decoded_kl": _decoded_kl(teacher, probe, min(FIDELITY_ROWS, counts[probe])),
    }
    (folder / RECORD).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", "utf-8")
    return record


def _decoded_kl(teacher: OnlineTeacher, part: Part, rows: int) -> float:
    """KL(exact || decoded) in nats per token: what the codec costs before any training."""
    exact_NE = teacher.states(part, range(rows)).flatten(0, 1)
    labels_N = torch.zeros(len(exact_NE), dtype=torch.int64, device=exact_NE.device)
    head = teacher.head.to(exact_NE.device, torch.float32)
    terms = fused_distillation_loss(exact_NE.bfloat16().float(), head, StateTargets(exact_NE, head), labels_N)
    return terms.kl.item()


def _batches(rows: range, sequence_length: int) -> Iterator[range]:
    """Consecutive rows of about `BATCH_TOKENS` tokens."""
    size = max(1, BATCH_TOKENS // sequence_length)
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _shard_name(part: str, shard: int) -> str:
    return f"{part}-{shard:05d}.safetensors"
