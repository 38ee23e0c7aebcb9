"""How far the stored signals are from the teacher, measured on a few rows.

C tokens of one chunk, K entries of a token, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cascade.distillation.fused import chunk_tokens
from cascade.distillation.signals.codecs import Codec, Decoded
from cascade.distillation.states import Head
from cascade.distillation.targets import BucketTargets, SparseTargets


@torch.no_grad()
def fidelity(codec: Codec, states_BTE: Tensor, head: Head, rows: Sequence[int]) -> dict[str, float]:
    """Means over the tokens of some rows, given by the teacher's states and head, float32.

    `decoded_kl`: KL(teacher || decoded) in nats a token, where the codec decodes to a distribution; that of
    `top_k` spreads the bucket evenly over the entries it stands for. Then also `rest`: the bucket's mass.
    `weights_rms`: of an unbiased codec, whose decoded weights are right only on average, the root of the mean
    squared distance between the weights of one drawing and the teacher's probabilities, summed over the
    vocabulary.
    """
    device = states_BTE.device
    encoded = {name: tensor.cpu() for name, tensor in codec.encode(states_BTE, head, rows).items()}
    targets = codec.decode(_rows_of(encoded, codec), head).to(device, torch.float32)
    exact_NE = states_BTE[:, :-1].flatten(0, 1)
    size, sums = chunk_tokens(head.vocabulary), torch.zeros(2, dtype=torch.float64)
    for chunk in (slice(start, start + size) for start in range(0, len(exact_NE), size)):
        log_CV = head.logits(exact_NE[chunk]).double().log_softmax(-1)
        sums += _distances(log_CV, targets[chunk]).cpu()
    first, second = (sums / len(exact_NE)).tolist()
    if isinstance(targets, SparseTargets):
        return {"weights_rms": first**0.5}
    return {"decoded_kl": first, **({"rest": second} if isinstance(targets, BucketTargets) else {})}


def _rows_of(encoded: dict[str, Tensor], codec: Codec) -> list[dict[str, Tensor]]:
    """Row by row, as a stored teacher reads them."""
    fixed = {name: tensor for name, tensor in encoded.items() if name not in codec.flat}
    count = len(next(iter(fixed.values())))
    ends = encoded["sizes"].cumsum(0).tolist() if codec.flat else [0] * count
    return [
        {name: tensor[row] for name, tensor in fixed.items()}
        | {name: encoded[name][ends[row - 1] if row else 0 : ends[row]] for name in codec.flat}
        for row in range(count)
    ]


def _distances(log_CV: Tensor, targets: Decoded) -> Tensor:
    """Sums [2] over the chunk: of the squared distance or the KL, and of the mass of the bucket."""
    p_CV = log_CV.exp()
    if isinstance(targets, SparseTargets):
        squares = p_CV.scatter_add(1, targets.ids, -targets.weights.double()).square().sum()
        return torch.stack([squares, torch.zeros_like(squares)])
    rest = torch.zeros((), dtype=torch.float64, device=log_CV.device)
    if isinstance(targets, BucketTargets):
        kept_CK = targets.log_p.double()
        rest_C1 = 1 - kept_CK.exp().sum(1, keepdim=True)
        even_C1 = (rest_C1 / (targets.vocabulary - kept_CK.shape[1])).log()
        decoded_CV = even_C1.expand_as(log_CV).scatter(1, targets.ids, kept_CK)
        rest = rest_C1.sum()
    else:
        decoded_CV = targets.logits().double().log_softmax(-1)
    return torch.stack([(p_CV * (log_CV - decoded_CV)).sum(), rest])
