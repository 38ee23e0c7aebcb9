"""What a teacher says about N tokens.

N tokens, E teacher hidden size, V vocabulary, K kept entries of a token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from cascade.distillation.states import Head, Inner
from cascade.errors import InputError

Index = slice | Tensor

SLACK = 1e-6
"""Of the sum of a mixture's weights, which a person writes in decimals."""
PADDING = 1024
"""Most entries by which two vocabularies may differ and still be taken for one with other padding; 128
between the Qwen2.5 models (152064 and 151936). Whether the tokens are the same is for
`cascade.models.tokenizers.require_same_tokenizer` to say."""


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

    def narrowed(self, vocabulary: int) -> Targets:
        """Over the first entries alone; the others are removed from every distribution.

        Raises InputError where what is kept does not tell their probability.
        """


@runtime_checkable
class DenseTargets(Targets, Protocol):
    """Whole distributions, of which any objective and any temperature can be computed."""

    def logits(self, out: Tensor | None = None) -> Tensor:
        """[N, V], up to a constant for each token. out: [N, V], float32 or wider, is written and returned."""


@dataclass(frozen=True)
class StateTargets:
    """Whole distributions: the softmax of the head's logits of the teacher's final states [N, E].

    inner, each [N, ..]: of modules inside it, from a teacher that was asked for them.
    """

    states: Tensor
    head: Head
    inner: Inner = ()

    @property
    def vocabulary(self) -> int:
        """V."""
        return self.head.vocabulary

    def __len__(self) -> int:
        """N."""
        return len(self.states)

    def __getitem__(self, index: Index) -> StateTargets:
        """Those of some of the tokens."""
        inner = tuple(one[index] for one in self.inner)
        return StateTargets(self.states[index], self.head, inner)

    def to(self, device: torch.device, dtype: torch.dtype) -> StateTargets:
        """On a device; states and head in that type."""
        return replace(self, states=self.states.to(device, dtype), head=self.head.to(device, dtype))

    def narrowed(self, vocabulary: int) -> StateTargets:
        """Over the first entries alone."""
        return replace(self, head=self.head.narrowed(vocabulary))

    def logits(self, out: Tensor | None = None) -> Tensor:
        """[N, V], in the states' type unless written to `out`."""
        return self.head.logits(self.states, out)


@dataclass(frozen=True)
class MixedTargets:
    """A mixture of teachers: the weighted sum of their probabilities, not of their logits.

    parts: of the same tokens and vocabulary; weights: positive, summing to one. A temperature is applied to
    the mixture. Raises InputError otherwise.
    """

    parts: tuple[StateTargets, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        """Raises InputError for weights that are none, or teachers that do not fit together."""
        right = [weight > 0 for weight in self.weights]
        if len(right) != len(self.parts) or not all(right) or abs(sum(self.weights) - 1) > SLACK:
            raise InputError(
                "a mixture of teachers needs one positive weight for each, with the sum 1",
                value=f"{len(self.parts)} teachers, weights {', '.join(map(str, self.weights))}",
                where="the teachers",
                remedy="divide the weights by their sum",
            )
        if len({(len(part), part.vocabulary) for part in self.parts}) > 1:
            raise InputError(
                "the teachers of a mixture answer for different tokens or vocabularies",
                value=", ".join(f"{len(part)} x {part.vocabulary}" for part in self.parts),
                where="the teachers",
                remedy="narrow them to the vocabulary of their common tokenizer",
            )

    @property
    def vocabulary(self) -> int:
        """V."""
        return self.parts[0].vocabulary

    def __len__(self) -> int:
        """N."""
        return len(self.parts[0])

    def __getitem__(self, index: Index) -> MixedTargets:
        """Those of some of the tokens."""
        return MixedTargets(tuple(part[index] for part in self.parts), self.weights)

    def to(self, device: torch.device, dtype: torch.dtype) -> MixedTargets:
        """On a device; states and heads in that type."""
        return MixedTargets(tuple(part.to(device, dtype) for part in self.parts), self.weights)

    def narrowed(self, vocabulary: int) -> MixedTargets:
        """Over the first entries alone; each teacher's distribution is cut before they are mixed."""
        return MixedTargets(tuple(part.narrowed(vocabulary) for part in self.parts), self.weights)

    def logits(self, out: Tensor | None = None) -> Tensor:
        """[N, V]: logarithms of the mixture's probabilities, float32 or wider."""
        total_NV = _weighted(self.parts[0], self.weights[0])
        for part, weight in zip(self.parts[1:], self.weights[1:], strict=True):
            torch.logaddexp(total_NV, _weighted(part, weight), out=total_NV)
        return total_NV if out is None else out.copy_(total_NV)


def _weighted(part: StateTargets, weight: float) -> Tensor:
    """[N, V]: log(weight * probability)."""
    logits_NV = part.logits()
    wide = torch.promote_types(logits_NV.dtype, torch.float32)
    return logits_NV.to(wide).log_softmax(-1).add_(math.log(weight))


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

    def narrowed(self, vocabulary: int) -> BucketTargets:
        """Refused where it would remove entries: their share of the tail is not known."""
        return _kept(self, vocabulary)

    def log_buckets(self) -> Tensor:
        """[N, K + 1] logarithms of the K entries' and the tail's probabilities; each row sums to one."""
        kept_N = self.log_p.double().exp().sum(-1)
        tail_N = (1 - kept_N).clamp_min(torch.finfo(torch.float32).tiny).log().to(self.log_p.dtype)
        # Rounded entries may sum to more than one.
        return torch.cat([self.log_p, tail_N[:, None]], -1).log_softmax(-1)


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

    def narrowed(self, vocabulary: int) -> SparseTargets:
        """Refused where it would remove entries: an estimate of what stays is not unbiased."""
        return _kept(self, vocabulary)


Kept = TypeVar("Kept", BucketTargets, SparseTargets)


def _kept(targets: Kept, vocabulary: int) -> Kept:
    """The same, over no fewer entries."""
    if vocabulary < targets.vocabulary:
        raise InputError(
            "signals that keep some entries of each distribution cannot be narrowed to a smaller vocabulary",
            value=f"{targets.vocabulary} entries, to be narrowed to {vocabulary}",
            where="teacher.signals",
            remedy="use `signals: hidden`, or a teacher padded no further than the student",
        )
    return targets


def dense(targets: Targets) -> DenseTargets:
    """The same, as whole distributions; raises InputError where they are not kept."""
    if not isinstance(targets, DenseTargets):
        raise InputError(
            "this needs the teacher's whole distributions, and its signals keep some entries of each",
            value=type(targets).__name__,
            where="teacher.signals",
            remedy="use `signals: hidden`",
        )
    return targets


def aligned(targets: Targets, vocabulary: int) -> Targets:
    """The targets over the entries that a student with so many has; its own further ones are the caller's.

    Raises InputError where the two differ by more than padding.
    """
    if abs(targets.vocabulary - vocabulary) > PADDING:
        raise InputError(
            "student and teacher have different vocabularies",
            value=f"{vocabulary} and {targets.vocabulary} entries",
            where="the LM heads",
            remedy="distil from a teacher with the same tokenizer",
        )
    return targets.narrowed(min(vocabulary, targets.vocabulary))
