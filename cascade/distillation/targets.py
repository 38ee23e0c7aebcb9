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


@dataclass(frozen=True)
class BucketTargets:
    """Exact probabilities of K entries a token and, as one more bucket, the mass of all others.

    ids [N, K]: int64, different within a token; log_p [N, K]: float32 logarithms of the probabilities.
    """

    ids: Tensor
    log_p: Tensor
    vocabulary: int

    def __len__(self) -> int:
        """N."""
        return len(self.ids)

    def __getitem__(self, index: Index) -> BucketTargets:
        """Those of some of the tokens."""
        return BucketTargets(self.ids[index], self.log_p[index], self.vocabulary)

    def to(self, device: torch.device, dtype: torch.dtype) -> BucketTargets:
        """On a device; probabilities stay float32."""
        return BucketTargets(self.ids.to(device), self.log_p.to(device), self.vocabulary)


@dataclass(frozen=True)
class SparseTargets:
    """An unbiased estimate of every probability, zero for all but K entries of a token.

    ids [N, K]: int64, different within a token but for padding; weights [N, K]: float32, E[weights] = p, zero
    where an entry is padding; entropy [N]: float32, the teacher's own in nats, so that the forward KL is
    -entropy - sum weights * log q without bias.
    """

    ids: Tensor
    weights: Tensor
    entropy: Tensor
    vocabulary: int

    def __len__(self) -> int:
        """N."""
        return len(self.ids)

    def __getitem__(self, index: Index) -> SparseTargets:
        """Those of some of the tokens."""
        return SparseTargets(self.ids[index], self.weights[index], self.entropy[index], self.vocabulary)

    def to(self, device: torch.device, dtype: torch.dtype) -> SparseTargets:
        """On a device; weights stay float32."""
        return SparseTargets(
            self.ids.to(device), self.weights.to(device), self.entropy.to(device), self.vocabulary
        )
