"""What keeps a narrower model exact where a class computes with its width: norms and scaled embeddings.

With the removed channels masked, the parent's RMSNorm divides by sqrt(s/D + e), where s is the sum of the
kept squares. The child's divides by sqrt(s/D' + e'), which is sqrt(D/D') times as much for e' = e * D/D' (set
in `child_config`); gains times sqrt(D/D') make up for it. Norms of q and k share that e' but are over n = h
entries of one head, or over all heads (n = Gqh or Gh, of which n' stay): there the gain is scaled by
sqrt(n/n') and what the norm reads by sqrt(D/D' * n'/n).

A LayerNorm also subtracts a mean, which no factor mends: its child takes mean and variance over the channels
that stay, and "masked" means just that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from cascade.architecture import Sizes
from cascade.models.anatomy import Dimensions
from cascade.models.decoder import Decoder
from cascade.models.entries import Entries, length
from cascade.models.norms import NormKind

Changes = dict[str, Callable[[Tensor], Tensor]]


def changes(decoder: Decoder, target: Sizes) -> tuple[Changes, Changes]:
    """What is done to a parameter after it is sliced: by name within a layer, and by full name outside."""
    anatomy, source = decoder.anatomy, decoder.architecture
    wider = source.hidden / target.hidden
    found: tuple[Changes, Changes] = ({}, {})
    both = ((anatomy.layer_norms, anatomy.layer), (anatomy.outer_norms, anatomy.outer))
    for place, (norms, dimensions) in enumerate(both):
        for path, kind in norms.items():
            if kind is NormKind.LAYER:
                continue
            (entries,) = dimensions[f"{path}.weight"]
            ratio = 1.0 if entries is Entries.FIXED else length(entries, source) / length(entries, target)
            found[place].update(scaled(f"{path}.weight", ratio**0.5, kind))
            if entries is not Entries.HIDDEN:
                for name in read_by(path, dimensions):
                    found[place].update(scaled(name, (wider / ratio) ** 0.5))
    return found


def read_by(norm: str, dimensions: Mapping[str, Dimensions]) -> list[str]:
    """The parameters of the projection that a norm of q or k reads, by the custom of their names."""
    path = norm.removesuffix("_norm") + "_proj"
    return [name for name in (f"{path}.weight", f"{path}.bias") if name in dimensions]


def scaled(name: str, factor: float, kind: NormKind = NormKind.RMS) -> Changes:
    """A parameter, or the gain of a norm of that kind, times `factor`; nothing for a factor of one."""
    return {} if factor == 1.0 else {name: lambda values: times(values, factor, kind)}


def times(values: Tensor, factor: float, kind: NormKind) -> Tensor:
    """Scaled in float32, because a gain in bfloat16 should be rounded once; Gemma's gain is 1 + w."""
    one = 1.0 if kind is NormKind.RMS_PLUS_ONE else 0.0
    return ((values.float() + one) * factor - one).to(values.dtype)


@torch.no_grad()
def keep_embedding_scale(parent: Decoder, child: Decoder) -> None:
    """Where a class scales embeddings by a function of D (Gemma: sqrt(D)), scale the child's the other way.

    A tied head is scaled with them; the final norm's gain takes that back.
    """
    factor = embedding_scale(parent.embeddings) / embedding_scale(child.embeddings)
    if abs(factor - 1) < 1e-6:
        return
    child.embeddings.weight.mul_(factor)
    if child.head.weight is child.embeddings.weight:
        for path, kind in child.anatomy.outer_norms.items():
            gain = child.model.get_submodule(path).get_parameter("weight")
            gain.copy_(times(gain, 1 / factor, kind))


def embedding_scale(embeddings: nn.Embedding) -> float:
    """What the module multiplies its rows with, measured on a few of them."""
    tokens = torch.arange(min(16, embeddings.num_embeddings), device=embeddings.weight.device)
    given, rows = embeddings(tokens).float(), embeddings.weight[tokens].float()
    size = torch.linalg.vector_norm(rows)
    return float(torch.linalg.vector_norm(given) / size) if size > 0 else 1.0
