"""Which formula a norm follows, found by evaluating it."""

from __future__ import annotations

import copy
from enum import StrEnum

import torch
from torch import Tensor, nn

from cascade.models.configs import BUILD_ERRORS


class NormKind(StrEnum):
    """RMS: w * x / rms(x) (1910.07467, equation 4). RMS_PLUS_ONE: (1 + w) * x / rms(x), as in Gemma.
    LAYER: w * (x - mean) / std, with or without a bias (1607.06450, equation 3)."""

    RMS = "rms"
    RMS_PLUS_ONE = "rms_plus_one"
    LAYER = "layer"


def norm_kind(module: nn.Module, size: int) -> NormKind | None:
    """The kind of a norm over `size` entries, None for no known one; the module may be on the meta device."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        probe = copy.deepcopy(module).to_empty(device="cpu")
        for parameter in probe.parameters():
            nn.init.normal_(parameter, mean=0.5, std=0.2)
        # Large enough that no epsilon matters.
        values = 100 * torch.randn(2, 3, size) + 20
    try:
        with torch.no_grad():
            result = probe(values)
    except BUILD_ERRORS:
        # It takes more than what is to be normalised.
        return None
    return next((kind for kind in NormKind if same(result, normalised(kind, probe, values))), None)


def normalised(kind: NormKind, module: nn.Module, values: Tensor) -> Tensor:
    """What a norm of that kind makes of `values`, with the module's parameters and no epsilon."""
    gain, bias = module.get_parameter("weight"), getattr(module, "bias", None)
    if kind is NormKind.LAYER:
        centred = values - values.mean(-1, keepdim=True)
        result = centred * centred.square().mean(-1, keepdim=True).rsqrt() * gain
        return result if bias is None else result + bias
    scaled = values * values.square().mean(-1, keepdim=True).rsqrt()
    return scaled * (gain + 1 if kind is NormKind.RMS_PLUS_ONE else gain)


def same(left: object, right: Tensor) -> bool:
    """Equal up to float32 rounding."""
    return (
        isinstance(left, Tensor)
        and left.shape == right.shape
        and torch.allclose(left.float(), right.float(), rtol=1e-3, atol=1e-3)
    )
