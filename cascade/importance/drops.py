"""What the model loses when a block of layers is really dropped, measured from remembered streams.

Legend: B rows, T tokens, V vocabulary, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cascade.errors import InputError
from cascade.importance.method import LayerScore
from cascade.importance.streams import Streams, with_halves
from cascade.importance.tallies import HALVES
from cascade.models.decoder import Decoder

MOST_LOGITS = 2**27
"""At once, 512 MiB in float32. The whole model's logits and a cut one's are compared, so there are two."""


class DropProbe:
    """Rise of the cross-entropy and squared difference of the logits for blocks of the given lengths.

    To drop layers i..j-1 the stream before i is handed to layer j, so only layers j.. are run: on average
    half of the model for each block, and its head. All logits count, also of padded entries.
    """

    def __init__(self, decoder: Decoder, streams: Streams, lengths: Collection[int]) -> None:
        self.model, self.layers, self.streams = decoder.model, decoder.layers, streams
        places = len(self.layers) + 1
        self.blocks = [(i, i + length) for length in sorted(set(lengths)) for i in range(places - length)]
        shape, device = (len(HALVES), places, places), decoder.model.device
        self.rises = torch.full(shape, torch.nan, dtype=torch.float64, device=device)
        for i, j in self.blocks:
            self.rises[:, i, j] = 0
        self.squares = self.rises.clone()

    def add(self, rows_BT: Tensor, first: int) -> None:
        """The batch that the streams remember, of token ids int64; first: the number of its first row."""
        if not self.blocks:
            return
        at_once = max(
            1, MOST_LOGITS // (rows_BT.shape[1] * self.model.get_output_embeddings().weight.shape[0])
        )
        for start in range(0, len(rows_BT), at_once):
            own = slice(start, start + at_once)
            halves_B = torch.arange(first + start, first + start + len(rows_BT[own])) % len(HALVES)
            self._add_rows(rows_BT[own], self.streams.states[:, own], halves_B.to(rows_BT.device))

    def _add_rows(self, rows_BT: Tensor, states: Tensor, halves_B: Tensor) -> None:
        whole_BTV = self._logits(rows_BT, states[-1], len(self.layers))
        whole_B = summed_cross_entropy(whole_BTV, rows_BT)
        for i, j in self.blocks:
            logits_BTV = self._logits(rows_BT, states[i], j)
            rises_B = summed_cross_entropy(logits_BTV, rows_BT) - whole_B
            self.rises[:, i, j].index_add_(0, halves_B, rises_B)
            self.squares[:, i, j].index_add_(0, halves_B, summed_squares(logits_BTV, whole_BTV))

    def _logits(self, rows_BT: Tensor, stream_BTD: Tensor, place: int) -> Tensor:
        """Logits [B, T, V] in float32 of the layers from `place` on, which get `stream_BTD`."""
        with short_circuited(self.layers[:place], stream_BTD, self.streams.outputs):
            logits: Tensor = self.model(input_ids=rows_BT, use_cache=False).logits
        return logits.float()

    def statistics(self, length: int) -> dict[str, Tensor]:
        """Matrices [L+1, L+1], also by halves, as of `Streams`; NaN where nothing was asked for.

        Raises InputError where what was asked for is not finite.
        """
        if not self.blocks:
            return {}
        rows = self.streams.counted
        rises = with_halves(LayerScore.PERPLEXITY, self.rises, rows, length - 1)
        found = rises | with_halves(LayerScore.LOGIT_MSE, self.squares, rows, length)
        for i, j in self.blocks:
            if not all(matrix[..., i, j].isfinite().all() for matrix in found.values()):
                raise InputError(
                    "the logits without some layers are not finite",
                    value=f"layers {i} to {j - 1} of {len(self.layers)} dropped, {self.model.dtype}",
                    where="calibration",
                    remedy="load the model in float32, or choose a layer score that drops nothing",
                )
        return found


def summed_cross_entropy(logits_BTV: Tensor, rows_BT: Tensor) -> Tensor:
    """Of the tokens after the first of every row, in nats: float64 [B]."""
    rows = zip(logits_BTV, rows_BT, strict=True)
    sums = [functional.cross_entropy(logits[:-1], ids[1:], reduction="sum") for logits, ids in rows]
    return torch.stack(sums).double()


def summed_squares(logits_BTV: Tensor, whole_BTV: Tensor) -> Tensor:
    """Over a row's tokens, the mean squared difference over the vocabulary: float64 [B]."""
    means = [functional.mse_loss(*row) for row in zip(logits_BTV, whole_BTV, strict=True)]
    return torch.stack(means).double() * whole_BTV.shape[1]


@contextmanager
def short_circuited(layers: Sequence[nn.Module], stream: Tensor, outputs: int) -> Iterator[None]:
    """Inside, the layers compute nothing and all put out `stream`; outputs: as of `Streams`."""
    own = [vars(layer).get("forward") for layer in layers]
    try:
        for layer in layers:
            vars(layer)["forward"] = constant((stream, *[None] * (outputs - 1)) if outputs else stream)
        yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            if forward is None:
                vars(layer).pop("forward", None)
            else:
                vars(layer)["forward"] = forward


def constant(output: object) -> Callable[..., object]:
    """A forward that returns `output` whatever it is given."""

    def forward(*inputs: Any, **keywords: Any) -> object:
        return output

    return forward


def require_lengths(lengths: Collection[int], layers: int, tokens: int) -> None:
    """Raise InputError for blocks that the model does not have, and for rows without a next token."""
    for length in lengths:
        if not 1 <= length < layers:
            raise InputError(
                "a block of layers to drop must leave at least one and have at least one",
                value=f"{length} of {layers} layers",
                where="calibration",
                remedy=f"ask for lengths from 1 to {layers - 1}",
            )
    if lengths and tokens < 2:
        raise InputError(
            "rows of one token have no next token to predict",
            value=f"{tokens} token a row",
            where="calibration",
            remedy="pack the corpus into longer rows",
        )
