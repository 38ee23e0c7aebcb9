"""The shape of a decoder and the analytic counts that follow from it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Architecture:
    """A homogeneous decoder: every layer has the same sizes, so stock libraries can load the child.

    Symbols: L layers, D hidden, F FFN (intermediate) size, G KV groups, q query heads per group,
    h head size, V vocabulary. The flags say which optional parameters the parent's layers have.
    """

    layers: int
    hidden: int
    ffn: int
    kv_groups: int
    heads_per_group: int
    head_size: int
    vocabulary: int
    tied: bool
    qkv_bias: bool = False
    output_bias: bool = False
    ffn_bias: bool = False
    qk_norm: bool = False

    @property
    def heads(self) -> int:
        """Query heads, G * q."""
        return self.kv_groups * self.heads_per_group

    @property
    def layer_parameters(self) -> int:
        """Parameters of one decoder layer.

        Weights: q and o are D*Gqh each, k and v are D*Gh each, gate, up and down are D*F each.
        Two RMSNorm gains of D; optionally q/k norms of h each and biases.
        """
        query, key_value = self.heads * self.head_size, self.kv_groups * self.head_size
        attention = 2 * self.hidden * (query + key_value)
        ffn = 3 * self.hidden * self.ffn
        norms = 2 * self.hidden + (2 * self.head_size if self.qk_norm else 0)
        biases = (
            (query + 2 * key_value if self.qkv_bias else 0)
            + (self.hidden if self.output_bias else 0)
            + (2 * self.ffn + self.hidden if self.ffn_bias else 0)
        )
        return attention + ffn + norms + biases

    @property
    def embedding_parameters(self) -> int:
        """V*D once when input and output embeddings are the same tensor, twice when not."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def non_embedding_parameters(self) -> int:
        """All layers and the final norm."""
        return self.layers * self.layer_parameters + self.hidden

    @property
    def parameters(self) -> int:
        """The total, which the real module is asserted against."""
        return self.non_embedding_parameters + self.embedding_parameters

    def forward_flops(self, context: int) -> int:
        """FLOPs of one token's forward pass at a mean attended length of `context`/2.

        Two FLOPs per multiply-add: every weight matrix once (Kaplan et al., 2001.08361, table 1),
        the attention scores and their weighted sum (2 * 2 * Gqh * context/2 per layer), the LM head.
        Norms, biases and activations are left out, as there.
        """
        query, key_value = self.heads * self.head_size, self.kv_groups * self.head_size
        matrices = 2 * self.hidden * (query + key_value) + 3 * self.hidden * self.ffn
        attention = 2 * query * context
        return self.layers * (2 * matrices + attention) + 2 * self.hidden * self.vocabulary

    def weight_bytes(self, bytes_per_parameter: int = 4) -> int:
        """Bytes of the stored weights (default: float32)."""
        return self.parameters * bytes_per_parameter

    def kv_cache_bytes(self, context: int, bytes_per_value: int = 4) -> int:
        """Bytes of one sequence's key-value cache at `context` tokens."""
        return 2 * self.layers * self.kv_groups * self.head_size * context * bytes_per_value

    def record(self) -> dict[str, Any]:
        """Plain JSON with the fields alone, so that it can be part of a node's key."""
        return asdict(self)
