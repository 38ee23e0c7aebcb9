"""The sizes of a decoder and the analytic counts that follow from them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Sizes:
    """What can be cut, and the head size h, which cannot.

    Symbols: L layers, D hidden, F FFN (intermediate) size, G KV groups, q query heads per group, h head
    size, E experts (0 without a mixture of experts).
    """

    layers: int
    hidden: int
    ffn: int
    kv_groups: int
    heads_per_group: int
    head_size: int
    experts: int = 0

    @property
    def heads(self) -> int:
        """Query heads, G * q."""
        return self.kv_groups * self.heads_per_group

    @property
    def queries(self) -> int:
        """Entries of all queries of a token, G * q * h."""
        return self.heads * self.head_size

    @property
    def keys(self) -> int:
        """Entries of all keys, or all values, of a token, G * h."""
        return self.kv_groups * self.head_size

    def factor(self, name: str) -> int:
        """The size that a `Term` calls by this name."""
        return int(getattr(self, name))


@dataclass(frozen=True)
class Term:
    """`count` times the product of `factors`, names of sizes such as ("ffn", "hidden").

    matrix: these parameters are multiplied with every token's state, rather than added or multiplied
    entry by entry.
    """

    factors: tuple[str, ...]
    count: int
    matrix: bool

    def parameters(self, sizes: Sizes) -> int:
        """How many there are at these sizes."""
        return self.count * math.prod(sizes.factor(name) for name in self.factors)


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What the parameters of a decoder are, read off its structure: see `cascade.models.anatomy`.

    layer: the terms of one layer. outer: those outside the layers, without the token embeddings and the
    head. active_experts: experts that one token passes. bound: the class takes h from D / (G * q), so that
    hidden channels and heads can only be cut in proportion.
    """

    vocabulary: int
    tied: bool
    layer: tuple[Term, ...]
    outer: tuple[Term, ...]
    active_experts: int = 0
    bound: bool = False


@dataclass(frozen=True)
class Architecture(Sizes):
    """A homogeneous decoder: every layer has the same sizes, so stock libraries can load the child."""

    counts: Counts = field(kw_only=True)

    @property
    def vocabulary(self) -> int:
        """V, the rows of the embeddings."""
        return self.counts.vocabulary

    @property
    def tied(self) -> bool:
        """Whether input and output embeddings are one tensor."""
        return self.counts.tied

    @property
    def layer_parameters(self) -> int:
        """Parameters of one decoder layer."""
        return sum(term.parameters(self) for term in self.counts.layer)

    @property
    def embedding_parameters(self) -> int:
        """V*D once when input and output embeddings are the same tensor, twice when not."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def non_embedding_parameters(self) -> int:
        """All layers, the final norm, learned positions and whatever else is not token embeddings or head."""
        return self.layers * self.layer_parameters + sum(term.parameters(self) for term in self.counts.outer)

    @property
    def parameters(self) -> int:
        """The total, which the real module is asserted against."""
        return self.non_embedding_parameters + self.embedding_parameters

    def forward_flops(self, context: int) -> int:
        """FLOPs of one token's forward pass at a mean attended length of `context`/2.

        Two FLOPs per multiply-add: every weight matrix once (Kaplan et al., 2001.08361, table 1), of the
        experts only the active ones, the attention scores and their weighted sum
        (2 * 2 * Gqh * context/2 per layer), the LM head. Norms, biases and activations are left out, as
        there.
        """
        matrices = sum(self._multiplied(term) for term in self.counts.layer if term.matrix)
        attention = 2 * self.queries * context
        return self.layers * (2 * matrices + attention) + 2 * self.hidden * self.vocabulary

    def _multiplied(self, term: Term) -> int:
        """Parameters of a term that one token meets: all of a router, of the experts the active ones."""
        count = term.parameters(self)
        routed = "experts" in term.factors and len(term.factors) > 2
        return count * self.counts.active_experts // self.experts if routed else count

    def weight_bytes(self, bytes_per_parameter: int = 4) -> int:
        """Bytes of the stored weights (default: float32)."""
        return self.parameters * bytes_per_parameter

    def kv_cache_bytes(self, context: int, bytes_per_value: int = 4) -> int:
        """Bytes of one sequence's key-value cache at `context` tokens."""
        return 2 * self.layers * self.keys * context * bytes_per_value

    def record(self) -> dict[str, Any]:
        """Plain JSON, so that it can be part of a node's key."""
        return asdict(self)

    @staticmethod
    def from_record(record: dict[str, Any]) -> Architecture:
        """What `record` wrote, also after a round trip through JSON."""
        counts = dict(record["counts"])
        for part in ("layer", "outer"):
            counts[part] = tuple(Term(**term | {"factors": tuple(term["factors"])}) for term in counts[part])
        return Architecture(**record | {"counts": Counts(**counts)})
