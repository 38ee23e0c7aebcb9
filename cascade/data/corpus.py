"""The packed corpus on disk, and the row that belongs to every position of a training run."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from cascade.data.packing import Packed, document_positions
from cascade.errors import InputError

TRAIN_FILE, HELD_OUT_FILE = "train.safetensors", "held_out.safetensors"
ROWS, ABOUT = "tokens", "corpus"


def write(packed: Packed, folder: Path) -> None:
    """Write train.safetensors and held_out.safetensors (`tokens`, int32 [rows, T]), always the same bytes."""
    # One metadata entry: safetensors does not promise an order for several.
    end_of_text = packed.end_of_text if packed.separate else None
    known = {"identity": packed.identity, "seed": packed.seed, "end_of_text": end_of_text}
    about = {ABOUT: json.dumps(known, sort_keys=True)}
    save_file({ROWS: packed.train}, folder / TRAIN_FILE, metadata=about)
    save_file({ROWS: packed.held_out}, folder / HELD_OUT_FILE, metadata=about)


@dataclass
class Corpus:
    """A packed corpus: train int32 [N, T] and held_out int32 [M, T], mapped from disk and read when touched.

    identity: see `Packed.identity`. seed: orders the second and later epochs. end_of_text: the last token of
    every document, where documents are kept apart; None where a row is read as one text.
    """

    train: Tensor
    held_out: Tensor
    identity: str
    seed: int
    end_of_text: int | None = None
    _epoch: int = field(default=0, init=False, repr=False)
    _order: np.ndarray | None = field(default=None, init=False, repr=False)

    @classmethod
    def open(cls, folder: Path) -> Corpus:
        """Map what `write` left in the folder; OSError or SafetensorError if it is not there."""
        train, about = read(folder / TRAIN_FILE)
        held_out, _ = read(folder / HELD_OUT_FILE)
        return cls(train, held_out, **about)

    @property
    def sequence_length(self) -> int:
        """T, tokens of a row."""
        return self.train.shape[1]

    def positions(self, ids_BT: Tensor) -> Tensor | None:
        """Of the tokens of some rows in their documents [B, T]; None where documents are not kept apart."""
        return None if self.end_of_text is None else document_positions(ids_BT, self.end_of_text)

    def row(self, position: int) -> int:
        """The training row at a position (from 0) that counts rows across epochs.

        Epoch 0 is the stored order. Epoch e is a permutation drawn from seed + e alone, so that a resumed
        run needs nothing but its position.
        """
        epoch, place = divmod(position, self.train.shape[0])
        if epoch == 0:
            return place
        if self._order is None or epoch != self._epoch:
            # RandomState: NumPy promises that this stream never changes, unlike that of its Generator.
            self._order = np.random.RandomState(self.seed + epoch).permutation(self.train.shape[0])
            self._epoch = epoch
        return int(self._order[place])


def require_tokens(
    rows: int, sequence_length: int, *, stage: str, tokens: int, epochs: int, part: str = "distill"
) -> None:
    """InputError if `epochs` passes over `rows` training rows are fewer tokens than a part of a stage asks
    for."""
    needed = math.ceil(math.ceil(tokens / sequence_length) / rows)
    if needed > epochs:
        raise InputError(
            f"the corpus is too short: it has {rows * sequence_length} training tokens, so {tokens} tokens "
            f"take {needed} epochs",
            value=f"tokens: {tokens}, epochs: {epochs}",
            where=f"stage {stage}, {part}",
            remedy=f"ask for the repetition with `epochs: {needed}`, train fewer tokens, or add text",
        )


def read(path: Path) -> tuple[Tensor, dict[str, Any]]:
    """The rows of one file, mapped from disk, and what `write` noted about the corpus."""
    with safe_open(path, framework="pt") as stream:
        return stream.get_tensor(ROWS), json.loads(stream.metadata()[ABOUT])
