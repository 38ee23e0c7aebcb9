"""The principal components of the residual stream, as its norms read it: the basis for a rotation.

Ministral 3 (2601.08584) fits ONE rotation for the whole network on the concatenated inputs of the attention
and FFN norms. A cut to D' components projects every x that a norm reads onto them, and the squared error
summed over all those x is smallest for the eigenvectors of E[x x^T] with the largest eigenvalues.

That is the moment about zero, not about the mean. An RMSNorm subtracts no mean and the cut puts none back, so
the error of the projection is the one about zero; the paper says PCA, which commonly subtracts it. Two more
doubts, neither measured here: a norm divides each token by its size, but here large tokens (attention sinks:
2402.17762) count by their squares; and the layers that will be dropped still run, though they are not read.
A model that was cut in depth first can be given instead, with all of its layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cascade.errors import InputError
from cascade.importance.calibration import require_rows
from cascade.importance.passes import run_over
from cascade.models.decoder import Decoder, decoder_of
from cascade.models.entries import Entries
from cascade.report import SILENT, Report


class SecondMoment:
    """Sum of x x^T [D, D] in float64 over the vectors that the norms of some layers read."""

    def __init__(self, decoder: Decoder, layers: Sequence[int]) -> None:
        anatomy, hidden = decoder.anatomy, decoder.architecture.hidden
        paths = [path for path in anatomy.layer_norms if anatomy.layer[f"{path}.weight"] == (Entries.HIDDEN,)]
        self.norms = [decoder.layers[layer].get_submodule(path) for layer in layers for path in paths]
        self.total = torch.zeros(hidden, hidden, dtype=torch.float64, device=decoder.model.device)
        self.count = 0

    def attach(self, stack: ExitStack) -> None:
        """Hook into every norm, for as long as `stack` is open."""
        for norm in self.norms:
            stack.callback(norm.register_forward_pre_hook(self._read).remove)

    def _read(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        vectors_ND = inputs[0].flatten(0, -2).double()
        self.total.addmm_(vectors_ND.T, vectors_ND)
        self.count += len(vectors_ND)

    def mean(self) -> Tensor:
        """E[x x^T] over all vectors of all norms."""
        return self.total / self.count


def principal_basis(
    model: PreTrainedModel, rows: Tensor, layers: Sequence[int], *, batch: int = 4, report: Report = SILENT
) -> tuple[Tensor, Tensor]:
    """Eigenvectors and eigenvalues of the second moment of what the hidden norms of `layers` read.

    rows: token ids [N, T] of any integer type, without padding; layers: those that will stay; batch: rows in
    one forward pass. Returns the basis [D, D], columns in falling order of their eigenvalue, each with its
    largest entry positive, and the eigenvalues [D], both float64 on the CPU. Memory is that of [D, D].

    The eigenvalues are the hidden scores of the model that `rotated` makes with the basis: `prune` then keeps
    its first channels. What `calibrate` says of other axes holds for that model too. The final norm is not
    read, and the LM head not run. Raises InputError for no rows, for layers that are none of the model's, and
    for activations that are not finite, naming the layer.
    """
    require_rows(rows)
    decoder = decoder_of(model)
    require_layers(layers, len(decoder.layers))
    moment = SecondMoment(decoder, layers)
    with ExitStack() as stack:
        moment.attach(stack)
        run_over(decoder, rows, batch=batch, progress=partial(report.progress, unit="tokens"))
    return components(moment.mean().cpu())


def components(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors as columns and eigenvalues of a second moment [D, D], the largest first.

    An eigenvector's sign is free; its largest entry is made positive, so that a fit can be repeated.
    """
    values, vectors = torch.linalg.eigh(moment)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * largest.sign(), values


def require_layers(layers: Sequence[int], count: int) -> None:
    """Raise InputError unless `layers` are some of 0 .. count - 1, each once."""
    if not layers or len(set(layers)) < len(layers) or not set(layers) <= set(range(count)):
        raise InputError(
            f"layers to fit a rotation on must be some of 0 to {count - 1}, each once",
            value=list(layers),
            where="principal components",
            remedy="give the layers that stay",
        )
