"""The calibration pass: every axis is scored while the tokens stream through the model once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cascade.errors import InputError
from cascade.importance.probes import AttentionProbe, ExpertProbe, FfnProbe, HiddenProbe, Probe, StreamProbe
from cascade.models.decoder import Decoder, decoder_of
from cascade.report import SILENT, Report

Scores = dict[str, Tensor]


def calibrate(model: PreTrainedModel, rows: Tensor, *, batch: int = 4, report: Report = SILENT) -> Scores:
    """Score what each axis could lose; larger means keep.

    rows: token ids [N, T] of any integer type, without padding; batch: rows in one forward pass. Returns
    float32 tensors on the CPU by `Axis` value: layers [L], hidden [D], ffn [L, F], kv_groups [L, G],
    heads_per_group [L, G, q]; with experts ffn [L, E, F] and experts [L, E].

    Memory does not grow with N: the probes keep one sum per score. The LM head is not run. Raises
    InputError for no rows, and for activations that are not finite, naming the layer.
    """
    require_rows(rows)
    decoder = decoder_of(model)
    stream = StreamProbe(decoder)
    ffn = ExpertProbe(decoder) if decoder.anatomy.router else FfnProbe(decoder)
    probes: list[Probe] = [stream, HiddenProbe(decoder), ffn, AttentionProbe(decoder)]
    done = 0
    with attached(probes), evaluating(model):
        for batch_BT in rows.split(batch):
            decoder.model.base_model(input_ids=batch_BT.long().to(model.device), use_cache=False)
            require_finite(stream, decoder)
            done += batch_BT.numel()
            report.progress(done, rows.numel(), "tokens")
    found = [score for probe in probes for score in probe.scores(done).items()]
    return {axis.value: score.float().cpu() for axis, score in found}


def require_rows(rows: Tensor) -> None:
    """Raise InputError when there is nothing to calibrate on."""
    if rows.numel() == 0:
        raise InputError(
            "there are no tokens to calibrate on",
            value=f"rows of shape {tuple(rows.shape)}",
            where="calibration",
            remedy="add text to the corpus or raise `calibration_tokens`",
        )


def require_finite(stream: StreamProbe, decoder: Decoder) -> None:
    """Raise InputError that names the first layer whose output held an infinity or a NaN."""
    place = stream.first_broken()
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
def attached(probes: list[Probe]) -> Iterator[None]:
    """The probes' hooks are on inside and off afterwards, also after an error."""
    handles = [handle for probe in probes for handle in probe.attach()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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
