"""Which layers of a student are compared with which of its teacher's.

Layers are counted from 0; M of the student, N of the teacher. origins [M]: the teacher's layer that each of
the student's was before the cuts between the two, ascending; None where the student was not cut from it.
"""

from __future__ import annotations

from collections.abc import Sequence

from cascade.errors import InputError

Pairs = tuple[tuple[int, int], ...]

DEEP, UPPER = 12, 7 / 8
"""MiniLMv2 (2012.15828) learned from the last layer of 12, and from the 21st (BERT) or the 19th (RoBERTa,
XLM-R) of 24: so here from the last one of up to 12, and of more from the one at 7/8. Doubt: these were
encoders."""


def state_pairs(student: int, teacher: int, count: int, origins: Sequence[int] | None = None) -> Pairs:
    """`count` pairs, from the lowest to second-to-last with second-to-last (Minitron, 2407.14679, section 3).

    The student's layers are evenly spread: of m = 1..M-1 those at round(j * (M-1) / count). The teacher's are
    where they come from, or at the same share of the depth, round(m * (N-1) / (M-1)): TinyBERT's uniform rule
    (1909.10351) over all layers but the last, so that it holds the pair that is always there.
    Raises InputError for more pairs than the student has such layers.
    """
    require_pairs(student, count)
    last, top = student - 1, teacher - 1
    chosen = [round(place * last / count) for place in range(1, count + 1)]

    def partner(m: int) -> int:
        if m == last:
            return top - 1
        return origins[m - 1] if origins else max(1, min(top, round(m * top / last))) - 1

    return tuple((m - 1, partner(m)) for m in chosen)


def require_pairs(student: int, count: int, where: str = "") -> None:
    """Raise InputError for more pairs than a student of so many layers can have."""
    if count > student - 1:
        raise InputError(
            f"a student of {student} layers has {student - 1} below its last to compare",
            value=f"hidden_states_layers: {count}",
            where=f"{where}distill.hidden_states_layers",
            remedy=f"ask for at most {student - 1}",
        )


def relation_pair(student: int, teacher: int, origins: Sequence[int] | None = None) -> tuple[int, int]:
    """The student's last layer with the one it comes from, or with the one that MiniLMv2 would choose."""
    upper = teacher if teacher <= DEEP else round(UPPER * teacher)
    return student - 1, origins[-1] if origins else upper - 1


def composed(cuts: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Origins after several cuts, the newest first: each says which of the layers before it were kept."""
    first, *older = cuts
    found = tuple(first)
    for cut in older:
        found = tuple(cut[layer] for layer in found)
    return found
