"""Writing the teacher's signals: its one forward pass over the corpus, shard by shard.

T tokens, N tokens of the probed rows, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from cascade.data.corpus import Corpus
from cascade.distillation.signals.codecs import BfloatStates, Codec, Stored
from cascade.distillation.signals.fidelity import fidelity
from cascade.distillation.signals.teachers import RECORD, OnlineTeacher, Part, batch_ids, shard_name
from cascade.distillation.states import Head, check_head, device_of, head_of
from cascade.models.documents import check_documents_apart
from cascade.report import SILENT, Report
from cascade.storage.local import file_sha256
from cascade.storage.locations import Location

SHARD_BYTES = 64 * 2**20
"""Size of one shard: large enough for one request to an object store, small enough to be re-sent."""
BATCH_TOKENS = 1024
"""Tokens of one teacher forward pass; larger batches were no faster on 2 cores."""
FIDELITY_ROWS = 4
"""Rows on which the decoded signals are compared with the exact teacher."""


class FinishedShards:
    """Shards of an unfinished artifact, kept in the store until it is published.

    A shard is its file, then `<file>.json` with its digest and what it was made from: without an intact
    record it does not count.
    """

    def __init__(self, location: Location) -> None:
        self.location = location

    def take(self, path: Path, identity: dict[str, object]) -> bool:
        """Bring the shard with this file's name to `path`; False unless it is there, intact and the same."""
        try:
            known = json.loads((self.location / f"{path.name}.json").read_bytes())
            if not isinstance(known, dict) or known.get("identity") != identity:
                return False
            (self.location / path.name).download(path)
        except (FileNotFoundError, ValueError):
            return False
        return bool(file_sha256(path) == known.get("sha256"))

    def keep(self, path: Path, identity: dict[str, object]) -> None:
        """Store a shard that is finished."""
        (self.location / path.name).upload(path)
        content = {"sha256": file_sha256(path), "identity": identity}
        (self.location / f"{path.name}.json").write_bytes(json.dumps(content).encode())


def write_signals(
    model: PreTrainedModel,
    corpus: Corpus,
    folder: Path,
    rows: int,
    held_out_rows: int,
    *,
    codec: Codec | None = None,
    finished: FinishedShards | None = None,
    report: Report = SILENT,
) -> dict[str, object]:
    """Store what the teacher says of the first `rows` training rows and `held_out_rows` held-out rows.

    Training rows are stored in the codec (default: states in bfloat16), held-out rows always as states in
    bfloat16, because evaluation needs whole distributions. Shards are safetensors with the codec's tensors;
    `signals.json` is the returned record: codec and its settings, corpus identity, width, vocabulary, rows,
    the bytes of the files per token of each part, and what `fidelity` finds on a few rows.
    finished: where shards are kept once they are written, so that a second call computes only the others.
    Raises InputError when the logits are more than the head's product with the states.
    """
    folder.mkdir(parents=True, exist_ok=True)
    head, length = head_of(model), corpus.sequence_length
    exact = BfloatStates(head.width)
    counts = {Part.TRAIN: rows, Part.HELD_OUT: held_out_rows}
    teacher = OnlineTeacher(model, corpus)
    probe = Part.TRAIN if rows else Part.HELD_OUT
    probed = range(min(FIDELITY_ROWS, counts[probe]))
    check_head(model, batch_ids(corpus, probe, [0], device_of(model))[0])
    check_documents_apart(model, corpus)
    states_BTE, float_head = teacher.states(probe, probed), head.detach().to(device_of(model), torch.float32)
    taught = (codec or exact).fitted(states_BTE, float_head)
    codecs: dict[Part, Codec] = {Part.TRAIN: taught, Part.HELD_OUT: exact}
    record: dict[str, object] = {
        "codec": codecs[Part.TRAIN].name,
        "settings": codecs[Part.TRAIN].settings(),
        "corpus": corpus.identity,
        "width": head.width,
        "vocabulary": head.vocabulary,
        "rows": {part.value: count for part, count in counts.items()},
        "rows_per_shard": _rows_per_shard(codecs[Part.TRAIN], length),
        "held_out_rows_per_shard": _rows_per_shard(exact, length),
    }
    writer = _Writer(teacher, float_head, folder, finished, report, sum(counts.values()))
    stored = {part: writer.write(part, counts[part], codecs[part]) for part in Part}
    for name, part in (("bytes_per_token", Part.TRAIN), ("held_out_bytes_per_token", Part.HELD_OUT)):
        record[name] = round(stored[part] / max(1, counts[part] * length), 3)
    record |= fidelity(codecs[probe], states_BTE, float_head, probed)
    (folder / RECORD).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", "utf-8")
    return record


def _rows_per_shard(codec: Codec, length: int) -> int:
    return max(1, int(SHARD_BYTES // (codec.token_bytes() * length)))


class _Writer:
    """One pass over the rows. total: of rows, for the report."""

    def __init__(
        self,
        teacher: OnlineTeacher,
        head: Head,
        folder: Path,
        finished: FinishedShards | None,
        report: Report,
        total: int,
    ) -> None:
        self.teacher, self.head, self.folder = teacher, head, folder
        self.finished, self.report = finished, report
        self.length = teacher.corpus.sequence_length
        self.total, self.done = total * self.length, 0

    def write(self, part: Part, rows: int, codec: Codec) -> int:
        """Store the first rows of a part; the bytes of its files."""
        per_shard, size = _rows_per_shard(codec, self.length), 0
        for shard, start in enumerate(range(0, rows, per_shard)):
            path = self.folder / shard_name(part, shard)
            self._shard(part, range(start, min(start + per_shard, rows)), codec, path)
            size += path.stat().st_size
        return size

    def _shard(self, part: Part, rows: range, codec: Codec, path: Path) -> None:
        identity: dict[str, object] = {
            "codec": codec.name,
            "settings": codec.settings(),
            "corpus": self.teacher.corpus.identity,
            "rows": [rows.start, rows.stop],
        }
        if self.finished and self.finished.take(path, identity):
            self._tell(len(rows))
            return
        stored: list[Stored] = []
        for batch in _batches(rows, self.length):
            states_BTE = self.teacher.states(part, batch)
            encoded = codec.encode(states_BTE, self.head, batch)
            stored.append({name: tensor.cpu() for name, tensor in encoded.items()})
            self._tell(len(batch))
        save_file(_joined(stored), path)
        if self.finished:
            self.finished.keep(path, identity)

    def _tell(self, rows: int) -> None:
        self.done += rows * self.length
        self.report.progress(self.done, self.total, "tokens")


def _joined(stored: list[Stored]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in stored]) for name in stored[0]}


def _batches(rows: range, sequence_length: int) -> Iterator[range]:
    """Consecutive rows of about `BATCH_TOKENS` tokens."""
    size = max(1, BATCH_TOKENS // sequence_length)
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
