"""The teacher behind one question, answered by a live model or from signals stored once for the family.

B rows, T tokens, E teacher hidden size.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from cascade.data.corpus import Corpus
from cascade.distillation.signals.codecs import SIZES, BfloatStates, Codec, Stored, make_codec
from cascade.distillation.signals.reading import Folder, Shards
from cascade.distillation.states import Head, all_states, device_of, final_states, head_of, of_targets
from cascade.distillation.targets import StateTargets, Targets
from cascade.errors import CascadeError, InputError

RECORD = "signals.json"


class Part(StrEnum):
    """The two parts of a corpus."""

    TRAIN = "train"
    HELD_OUT = "held_out"


class Teacher(Protocol):
    """Whoever answers for the distributions that a student is to match.

    waited: seconds that questions have waited so far for signals to arrive from a store.
    """

    @property
    def waited(self) -> float: ...

    def targets(self, part: Part, rows: Sequence[int]) -> Targets:
        """Of the positions 0..T-2 of some rows of a part, row by row: B * (T - 1) tokens."""


@runtime_checkable
class LiveTeacher(Teacher, Protocol):
    """One that can answer for any text, not only for what was stored."""

    def over(self, corpus: Corpus) -> LiveTeacher:
        """The same teacher for the rows of another corpus."""


def batch_ids(corpus: Corpus, part: Part, rows: Sequence[int], device: torch.device) -> Tensor:
    """Token ids [B, T], int64, of some rows of a part."""
    source = corpus.train if part is Part.TRAIN else corpus.held_out
    return source[list(rows)].to(device, torch.int64)


class OnlineTeacher:
    """Runs the teacher for every question: costs a forward pass each time, stores nothing.

    places: modules inside it whose outputs its answers hold too.
    """

    waited = 0.0

    def __init__(self, model: PreTrainedModel, corpus: Corpus, places: Sequence[nn.Module] = ()) -> None:
        self.model, self.corpus, self.places = model.eval(), corpus, tuple(places)
        self.head = head_of(model).detach()

    def over(self, corpus: Corpus) -> OnlineTeacher:
        """See `LiveTeacher.over`."""
        return OnlineTeacher(self.model, corpus, self.places)

    def targets(self, part: Part, rows: Sequence[int]) -> StateTargets:
        """See `Teacher.targets`."""
        if not self.places:
            return StateTargets(of_targets(self.states(part, rows)), self.head)
        ids_BT = batch_ids(self.corpus, part, rows, device_of(self.model))
        with torch.no_grad():
            states_BTE, inner = all_states(self.model, ids_BT, self.places, self.corpus.positions(ids_BT))
        states_NE, *inner_N = (of_targets(found).float() for found in (states_BTE, *inner))
        return StateTargets(states_NE, self.head, tuple(inner_N))

    @torch.no_grad()
    def states(self, part: Part, rows: Sequence[int]) -> Tensor:
        """Final hidden states [B, T, E], float32."""
        ids_BT = batch_ids(self.corpus, part, rows, device_of(self.model))
        return final_states(self.model, ids_BT, self.corpus.positions(ids_BT)).float()


class StoredTeacher:
    """Reads what `write_signals` wrote. head: the same teacher's, which is not stored twice.

    Held-out rows always have whole distributions; training rows what their codec keeps.
    Raises InputError when the signals belong to another packing, width or vocabulary, or to no known codec.
    """

    def __init__(self, shards: Shards | Path, head: Head, corpus_identity: str) -> None:
        self.shards = Folder(shards) if isinstance(shards, Path) else shards
        self.head = head.detach()
        path = self.shards.path(RECORD)
        record: dict[str, Any] = json.loads(path.read_text("utf-8"))
        settings = record.get("settings", {})
        expected = {"corpus": corpus_identity, "width": head.width, "vocabulary": head.vocabulary}
        for name, value in expected.items():
            # Records of older versions do not state the vocabulary.
            if record.get(name, value) != value:
                raise InputError(
                    f"the teacher's signals were made for another {name}",
                    value=f"{record[name]}, expected {value}",
                    where=str(path),
                    remedy="build the signals again for this corpus and teacher",
                )
        taught = make_codec(record["codec"], head.width, head.vocabulary, **settings)
        self.codecs: dict[Part, Codec] = {Part.TRAIN: taught, Part.HELD_OUT: BfloatStates(head.width)}
        self.rows: dict[str, int] = record["rows"]
        self.rows_per_shard = _rows_per_shard(record)

    @property
    def waited(self) -> float:
        """See `Teacher.waited`."""
        return self.shards.waited

    def whole(self, part: Part) -> bool:
        """Whether a part's targets are whole distributions."""
        return self.codecs[part].whole

    def targets(self, part: Part, rows: Sequence[int]) -> Targets:
        """See `Teacher.targets`. Raises CascadeError for a row that was not stored."""
        return self.codecs[part].decode([self._row(part, row) for row in rows], self.head)

    def _row(self, part: Part, row: int) -> Stored:
        if not 0 <= row < self.rows[part]:
            raise CascadeError(
                "the teacher's signals end before the row that is asked for",
                value=f"row {row} of {part}, {self.rows[part]} rows stored",
                where=str(self.shards.path(RECORD)),
                remedy="build the signals for at least the tokens of the longest stage",
            )
        shard, index = divmod(row, self.rows_per_shard[part])
        # Opened per question: the file is mapped, so only the row's pages are read, and no handle
        # outlives the call.
        with safe_open(self.shards.path(shard_name(part, shard)), framework="pt") as file:
            flat = self.codecs[part].flat
            entries = slice(0, 0)
            if flat:
                ends = file.get_tensor(SIZES).cumsum(0).tolist()
                entries = slice(ends[index - 1] if index else 0, ends[index])
            names = set(file.keys()) - {SIZES}
            return {name: file.get_slice(name)[entries if name in flat else index] for name in names}


def shard_name(part: str, shard: int) -> str:
    """A shard's file."""
    return f"{part}-{shard:05d}.safetensors"


def shards_of(record: Mapping[str, Any], rows: int) -> list[str]:
    """The files with the first training rows and all held-out rows, in the order of the rows."""
    counts, sizes = {Part.TRAIN: rows, Part.HELD_OUT: record["rows"][Part.HELD_OUT]}, _rows_per_shard(record)
    return [shard_name(part, shard) for part in Part for shard in range(-(-counts[part] // sizes[part]))]


def _rows_per_shard(record: Mapping[str, Any]) -> dict[Part, int]:
    """Of each part; older versions had one figure for both."""
    trained = record["rows_per_shard"]
    return {Part.TRAIN: trained, Part.HELD_OUT: record.get("held_out_rows_per_shard", trained)}
