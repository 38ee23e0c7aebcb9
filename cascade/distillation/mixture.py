"""Several teachers at once: the weighted mean of their distributions.

N tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cascade.distillation.signals import Part, Teacher
from cascade.distillation.targets import Index, Targets
from cascade.errors import InputError


@dataclass(frozen=True)
class MixedTargets:
    """p = sum_i w_i p_i. members: of the same tokens and vocabulary; weights: they sum to 1."""

    members: tuple[Targets, ...]
    weights: tuple[float, ...]

    @property
    def vocabulary(self) -> int:
        """V."""
        return self.members[0].vocabulary

    def __len__(self) -> int:
        """N."""
        return len(self.members[0])

    def __getitem__(self, index: Index) -> MixedTargets:
        """Those of some of the tokens."""
        return MixedTargets(tuple(member[index] for member in self.members), self.weights)

    def to(self, device: torch.device, dtype: torch.dtype) -> MixedTargets:
        """On a device; what is projected there in that type."""
        return MixedTargets(tuple(member.to(device, dtype) for member in self.members), self.weights)

    def logits(self) -> Tensor:
        """[N, V]: log p, float32 or wider; one member's logits are held beside the sum."""
        mixed_NV: Tensor | None = None
        for member, weight in zip(self.members, self.weights, strict=True):
            logits_NV = member.logits()
            wide = torch.promote_types(logits_NV.dtype, torch.float32)
            log_NV = logits_NV.to(wide).log_softmax(-1).add_(math.log(weight))
            mixed_NV = log_NV if mixed_NV is None else torch.logaddexp(mixed_NV, log_NV)
        if mixed_NV is None:
            raise InputError("a mixture needs at least one teacher", where="teacher.models")
        return mixed_NV


class MixedTeacher:
    """Asks every member. Raises InputError for members of different vocabularies."""

    def __init__(self, members: Sequence[Teacher], weights: Sequence[float]) -> None:
        self.members, self.weights = tuple(members), tuple(weights)

    def targets(self, part: Part, rows: Sequence[int]) -> MixedTargets:
        """See `Teacher.targets`."""
        found = tuple(member.targets(part, rows) for member in self.members)
        sizes = [targets.vocabulary for targets in found]
        if len(set(sizes)) > 1:
            raise InputError(
                "the teachers of a mixture have different vocabularies",
                value=" and ".join(f"{size} entries" for size in sizes),
                where="teacher.models",
                remedy="mix models with the same tokenizer and the same padding of their embeddings",
            )
        return MixedTargets(found, self.weights)
