"""What a teacher says about N tokens.

N tokens, E teacher hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cascade.distillation.states import Head

Index = slice | Tensor


class Targets(Protocol):
    """The teacher's next-token distributions of N tokens, in the form in which its codec keeps them."""

    @property
    def vocabulary(self) -> int:
        """V."""

    def __len__(self) -> int:
        """N."""

    def __getitem__(self, index: Index) -> Targets:
        """Those of some of the tokens."""

    def to(self, device: torch.device, dtype: torch.dtype) -> Targets:
        """On a device; what is projected there in that type."""

    def logits(self) -> Tensor:
        """[N, V], in the type of what is projected; up to a constant for each token."""


@dataclass(frozen=True)
class StateTargets:
    """Whole distributions: the softmax of the head's logits of the teacher's final states [N, E]."""

    states: Tensor
    head: Head

    @property
    def vocabulary(self) -> int:
        """V."""
        return self.head.vocabulary

    def __len__(self) -> int:
        """N."""
        return len(self.states)

    def __getitem__(self, index: Index) -> StateTargets:
        """Those of some of the tokens."""
        return StateTargets(self.states[index], self.head)

    def to(self, device: torch.device, dtype: torch.dtype) -> StateTargets:
        """On a device; states and head in that type."""
        return StateTargets(self.states.to(device, dtype), self.head.to(device, dtype))

    def logits(self) -> Tensor:
        """[N, V], in the states' type."""
        return self.head.logits(self.states)
