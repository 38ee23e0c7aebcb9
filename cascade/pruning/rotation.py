"""The residual stream in another orthogonal basis: an equivalent model whose channels can be cut in order.

The hidden axis of Ministral 3 (2601.08584) is cut by one global rotation; that a decoder with
RMSNorms allows one is SliceGPT's computational invariance (2401.15024, theorem 1). With Q [D, D] orthogonal,

    norm(x Q) = norm(x) Q    for norm(x) = x / sqrt(mean(x^2) + e), because |x Q| = |x|,

so a stream that is written times Q and read times Q^T gives the same logits, once every gain g is in the
matrices W [n, D] that read the norm: W' = W diag(g) Q. Matrices and biases that write become Q^T W and b Q,
the embeddings E Q. Factors on the stream (Gemma's sqrt(D), granite's multipliers) commute with Q and stay.

The head reads through the final norm's gain and the embeddings do not, so W' = E diag(g) Q and E Q differ: a
model with tied embeddings comes out untied, V * D parameters larger.

With the principal components of `cascade.pruning.principal` as Q, the cut to the first D' channels is a
projection onto them, and `cascade.pruning.rescaling` keeps the scale that RMSNorms see, as in any cut.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cascade.errors import CascadeError, InputError
from cascade.models.anatomy import Dimensions, Misfit
from cascade.models.configs import BUILD_ERRORS
from cascade.models.decoder import Decoder, decoder_of, decoder_with
from cascade.models.entries import Entries
from cascade.models.norms import NormKind
from cascade.planning.shapes import untied
from cascade.pruning.child import child_config, empty_model
from cascade.pruning.proof import TOKENS, TOLERANCE, random_miniature
from cascade.pruning.wiring import Wiring, norms_by_path, read_along, wiring_of

ROWS = 4096
"""Rows of a matrix that are in float64 at a time: [4096, D] is 160 MiB at D = 5120."""
ORTHOGONAL = 1e-5
"""The largest |Q^T Q - I| that is taken for rounding: Q may have been stored in float32."""

_known: dict[tuple[type[PreTrainedModel], str], Wiring | Misfit] = {}


def rotated(decoder: Decoder, basis: Tensor) -> PreTrainedModel:
    """A model of the same class, types and device with the same logits, its stream multiplied by `basis`.

    basis: [D, D], orthogonal, of any floating type; column i is the new channel i in the old ones. Every
    parameter is computed in float64 and rounded once. Gains of hidden norms come out as one (zero where a
    class adds one), embeddings untied. `decoder` is not changed. The memory needed is that of the
    new model and of a few copies of one parameter. Raises InputError for a class that cannot be rotated
    exactly and for a basis that is none.
    """
    wiring = proved_wiring(decoder)
    if isinstance(wiring, Misfit):
        raise refusal(decoder, wiring.reason)
    require_basis(basis, decoder.architecture.hidden)
    return turned_model(decoder, basis, wiring)


def rotation_refusal(decoder: Decoder) -> str:
    """Why the class of `decoder` cannot be rotated exactly, or ""; found out once in a process."""
    found = proved_wiring(decoder)
    return found.reason if isinstance(found, Misfit) else ""


def refusal(decoder: Decoder, reason: str) -> InputError:
    """The error that says so to a person."""
    return InputError(
        f"this decoder cannot be rotated exactly: {reason}",
        value=decoder.model.config.model_type,
        where="prune.axes: hidden",
        remedy="choose hidden channels by their scores instead, or cut other axes",
    )


def proved_wiring(decoder: Decoder) -> Wiring | Misfit:
    """How the stream is read, once a random rotation of a random miniature has left its logits alone."""
    config = decoder.model.config
    key = (type(decoder.model), config.to_json_string(use_diff=False))
    if key not in _known:
        _known[key] = _prove(decoder)
    return _known[key]


def _prove(decoder: Decoder) -> Wiring | Misfit:
    small = decoder_with(random_miniature(decoder), decoder.anatomy)
    tokens = torch.arange(TOKENS)[None]
    try:
        wiring = wiring_of(small)
        if isinstance(wiring, Misfit):
            return wiring
        other = turned_model(small, random_basis(small.architecture.hidden), wiring)
        with torch.no_grad():
            expected = small.model(input_ids=tokens, use_cache=False).logits
            found = other(input_ids=tokens, use_cache=False).logits
    except (*BUILD_ERRORS, CascadeError) as error:
        return Misfit(f"a rotated miniature does not run ({' '.join(str(error).split())[:200]})")
    size, apart = max(1.0, expected.abs().max().item()), (found - expected).abs().max().item()
    if not apart <= TOLERANCE * size:
        return Misfit(f"a rotated miniature differs from itself by {apart:.2g} in logits up to {size:.2g}")
    return wiring


def random_basis(size: int, seed: int = 1) -> Tensor:
    """An orthogonal matrix [size, size] in float64 without structure."""
    draw = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=draw, dtype=torch.float64)).Q


def require_basis(basis: Tensor, hidden: int) -> None:
    """Raise InputError unless `basis` is orthogonal and [hidden, hidden]."""
    if tuple(basis.shape) != (hidden, hidden):
        problem, value = f"a basis of shape {(hidden, hidden)} is needed", str(tuple(basis.shape))
    else:
        wide = basis.double()
        apart = (wide.T @ wide - torch.eye(hidden, dtype=wide.dtype, device=wide.device)).abs().max().item()
        if apart <= ORTHOGONAL:
            return
        problem, value = "the basis is not orthogonal", f"|Q^T Q - I| up to {apart:.2g}"
    raise InputError(problem, value=value, where="rotation", remedy="take it from `principal_basis`")


@torch.no_grad()
def turned_model(decoder: Decoder, basis: Tensor, wiring: Wiring) -> PreTrainedModel:
    """`rotated` without a proof: what it proves."""
    model, stack = decoder.model, decoder.anatomy.stack
    target = untied(decoder.architecture)
    other = empty_model(model, child_config(decoder, target, range(target.layers)))
    wide = basis.to(model.device, torch.float64)
    norms = norms_by_path(decoder)
    for name, parameter, dimensions, _ in decoder_of(other).parameters():
        path, old = name.rpartition(".")[0], model.get_parameter(name)
        if path in norms:
            values = torch.full_like(old, 1.0 - added(norms[path][1]))
        elif Entries.HIDDEN in dimensions:
            read = read_along(name, other.get_submodule(path), dimensions)
            norm = norms.get(wiring.norm_of(path, stack))
            values = turned(old, dimensions, wide, read, own_gain(*norm) if norm else None)
        else:
            values = old.clone()
        # One at a time, in the type that the old one has.
        parameter.data = values
    other.generation_config = copy.deepcopy(model.generation_config)
    return other


def own_gain(norm: nn.Module, kind: NormKind) -> Tensor:
    """What a norm multiplies channels with, [D] in float64."""
    return norm.get_parameter("weight").double() + added(kind)


def added(kind: NormKind) -> float:
    """What a norm of that kind adds to its weight for a gain."""
    return 1.0 if kind is NormKind.RMS_PLUS_ONE else 0.0


def turned(
    values: Tensor, dimensions: Dimensions, basis: Tensor, read: int | None, gain: Tensor | None
) -> Tensor:
    """A parameter with its dimensions of hidden channels multiplied by `basis`; each rounds once to its type.

    read: the dimension along which it reads what a norm with `gain` puts out; None for no such one.
    """
    result = values
    for dimension, entries in enumerate(dimensions):
        if entries is Entries.HIDDEN:
            scaled = gain[:, None] * basis if gain is not None and dimension == read else basis
            result = times_basis(result, dimension, scaled)
    return result


def times_basis(values: Tensor, dimension: int, basis: Tensor) -> Tensor:
    """`values` [.., D, ..] times `basis` [D, D] along one dimension, contiguous, in the type of `values`."""
    moved = values.movedim(dimension, -1)
    rows = moved.reshape(-1, len(basis))
    result = torch.empty_like(rows)
    for old, new in zip(rows.split(ROWS), result.split(ROWS), strict=True):
        new.copy_(old.double() @ basis)
    return result.view(moved.shape).movedim(-1, dimension).contiguous()
