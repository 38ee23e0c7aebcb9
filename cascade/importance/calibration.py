"""The calibration pass: every statistic of every axis is measured while the tokens stream through once."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cascade.errors import InputError
from cascade.importance.agreement import agreements
from cascade.importance.drops import DropProbe, require_lengths
from cascade.importance.experts import ExpertFfnProbe
from cascade.importance.probes import AttentionProbe, FfnProbe, HiddenProbe, Probe, RouterProbe
from cascade.importance.streams import Streams
from cascade.models.decoder import Decoder, decoder_of
from cascade.report import SILENT, Report


class Hooked(Protocol):
    """Whatever listens to a model's modules."""

    def attach(self) -> Sequence[AbstractContextManager[object]]:
        """What the caller enters, and leaves to have the model as it was."""


class Watching(Protocol):
    """Whatever saw the stream at every place."""

    def first_broken(self) -> int | None:
        """The first place that was not finite: 0 the embeddings, i the output of layer i - 1."""


@dataclass(frozen=True)
class Calibration:
    """What was measured, before `scores_of` decides by it.

    statistics: float32 on the CPU, ready for safetensors. agreement: by the name of a width statistic, the
    share of units on which the even and the odd rows agree (see `cascade.importance.agreement`); empty where
    there was one row only. tokens: that activations were measured on; 0 for methods that look at none.
    """

    statistics: dict[str, Tensor]
    agreement: dict[str, float] = field(default_factory=dict)
    tokens: int = 0


def calibrate(
    model: PreTrainedModel,
    rows: Tensor,
    *,
    drops: Collection[int] = (),
    batch: int = 4,
    report: Report = SILENT,
) -> Calibration:
    """Measure what each axis could lose; of every statistic larger means keep.

    rows: token ids [N, T] of any integer type, without padding; batch: rows in one forward pass; always
    one where there are experts. The statistics:

    - layers.block_influence, layers.norm_ratio [L+1, L+1]: entry (i, j), i < j, compares the stream before
      layer i with that before layer j, as if layers i..j-1 were dropped; NaN elsewhere;
    - layers.perplexity, layers.logit_mse [L+1, L+1]: the same from really dropping them, for the block
      lengths in `drops` (`Scoring.drops` says which are needed);
    - each of these as layers.S.halves [2, L+1, L+1] of the even and of the odd rows, where there are both;
    - hidden.A [D], ffn.A [L, F], kv_groups.A [L, G], heads_per_group.A [L, G, q] for every `Aggregation` A;
    - with experts experts.probability [L, E], and ffn.A [L, E, F].

    Memory does not grow with N: sums are kept, and the streams of one batch. The LM head is run only for
    `drops`. Raises InputError for no rows, for lengths that cannot be dropped, and for activations that are
    not finite, naming the layer.
    """
    require_rows(rows)
    decoder = decoder_of(model)
    length = rows.shape[1]
    require_lengths(drops, len(decoder.layers), length)
    streams, probes = Streams(decoder), width_probes(decoder)
    dropped = DropProbe(decoder, streams, drops)
    done = 0
    with evaluating(model):
        for batch_BT in rows.split(1 if decoder.anatomy.router else batch):
            ids_BT = batch_BT.long().to(model.device)
            measure(decoder, ids_BT, done, streams, probes)
            dropped.add(ids_BT, done)
            done += len(batch_BT)
            report.progress(done * length, rows.numel(), "tokens")
    tallies = [tally for probe in probes for tally in probe.tallies]
    found = streams.statistics(length) | dropped.statistics(length)
    for tally in tallies:
        found |= tally.statistics(length)
    stored = {name: values.float().cpu().contiguous() for name, values in found.items()}
    return Calibration(stored, agreements(tallies, length), rows.numel())


def width_probes(decoder: Decoder) -> list[Probe]:
    """Those that the model's structure has something for."""
    probes: list[Probe] = [HiddenProbe(decoder), AttentionProbe(decoder)]
    if decoder.anatomy.router:
        return [*probes, RouterProbe(decoder), ExpertFfnProbe(decoder)]
    return [*probes, FfnProbe(decoder)]


def measure(decoder: Decoder, ids_BT: Tensor, first: int, streams: Streams, probes: Sequence[Probe]) -> None:
    """One forward pass of the rows from number `first` on, without the LM head."""
    tallies = [tally for probe in probes for tally in probe.tallies]
    for tally in tallies:
        tally.begin(first, len(ids_BT))
    with attached([streams, *probes]):
        decoder.model.base_model(input_ids=ids_BT, use_cache=False)
    streams.end(first)
    require_finite(streams, decoder)
    for tally in tallies:
        tally.end()


def require_rows(rows: Tensor) -> None:
    """Raise InputError when there is nothing to calibrate on."""
    if rows.numel() == 0:
        raise InputError(
            "there are no tokens to calibrate on",
            value=f"rows of shape {tuple(rows.shape)}",
            where="calibration",
            remedy="add text to the corpus or raise `calibration_tokens`",
        )


def require_finite(streams: Watching, decoder: Decoder) -> None:
    """Raise InputError that names the first layer whose output held an infinity or a NaN."""
    place = streams.first_broken()
    if place is None:
        return
    name = "the embeddings" if place == 0 else f"layer {place - 1}"
    raise InputError(
        f"{name} of the model put out activations that are not finite",
        value=f"{name} of {len(decoder.layers)} layers, {decoder.model.dtype}",
        where="calibration",
        remedy="load it in float32, or check its weights: it is damaged or overflows in this precision",
    )


@contextmanager
def attached(hooked: Sequence[Hooked]) -> Iterator[None]:
    """The hooks are on inside and off afterwards, also after an error."""
    with ExitStack() as stack:
        for part in hooked:
            for handle in part.attach():
                stack.enter_context(handle)
        yield


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """No dropout and no gradients inside; the model's mode as it was afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
