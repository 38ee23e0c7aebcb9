"""Real parents by their shape alone, for tests of the planner."""

from __future__ import annotations

from cascade.architecture import Architecture, Counts, Term


def llama(
    layers: int,
    hidden: int,
    ffn: int,
    kv_groups: int,
    heads_per_group: int,
    head_size: int,
    vocabulary: int,
    *,
    tied: bool,
    qkv_bias: bool = False,
) -> Architecture:
    """A Llama-like decoder: q and o, k and v, gate, up and down, two norms a layer, and the final norm."""
    biases = (Term(("keys",), 2, False), Term(("queries",), 1, False)) if qkv_bias else ()
    layer = (
        Term(("hidden", "queries"), 2, True),
        Term(("hidden", "keys"), 2, True),
        Term(("ffn", "hidden"), 3, True),
        Term(("hidden",), 2, False),
        *biases,
    )
    counts = Counts(vocabulary=vocabulary, tied=tied, layer=layer, outer=(Term(("hidden",), 1, False),))
    return Architecture(layers, hidden, ffn, kv_groups, heads_per_group, head_size, counts=counts)


SMOLLM2_135M = llama(30, 576, 1536, 3, 3, 64, 49152, tied=True)
QWEN2_5_500M = llama(24, 896, 4864, 2, 7, 64, 151936, tied=True, qkv_bias=True)
LLAMA3_8B = llama(32, 4096, 14336, 8, 4, 128, 128256, tied=False)
TINY = llama(4, 64, 128, 2, 2, 16, 258, tied=True)
