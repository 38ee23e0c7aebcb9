"""A child whose sizes a person has chosen."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from cascade.architecture import Architecture
from cascade.errors import InputError
from cascade.planning.axes import Axis
from cascade.planning.shapes import untied


def chosen_child(
    original: Architecture,
    seed: Architecture,
    sizes: Mapping[Axis, int],
    *,
    axes: Collection[Axis],
    rotates: bool = False,
) -> Architecture:
    """The seed with these sizes and all others as they are.

    axes: what the parent allows to cut. Raises InputError for a size that is no cut, for one that stock
    configs refuse, with the nearest legal ones, and for an axis that may not be cut.
    """
    for axis, size in sizes.items():
        if axis not in axes:
            raise refused(
                axis, size, "this axis cannot be cut", f"leave it out; {', '.join(axes)} can be cut"
            )
        most = axis.size(seed)
        least = seed.counts.active_experts if axis is Axis.EXPERTS else 1
        if not least <= size <= most:
            remedy = f"choose {least} to {most}; {most} leaves it as it is"
            raise refused(axis, size, "no such size can be cut from the model before", remedy)
    changed: dict[str, Any] = {axis.value: size for axis, size in sizes.items()}
    child = replace(seed, **changed)
    if child == seed:
        raise InputError(
            "nothing is cut", value=dict(changed), where="prune.shape", remedy="set smaller sizes"
        )
    require_divisible(original, seed, child)
    return untied(child) if rotates and child.hidden < seed.hidden else child


def require_divisible(original: Architecture, seed: Architecture, child: Architecture) -> None:
    """Raise InputError for a hidden size that its heads do not divide, with the nearest that they do."""
    if child.counts.bound:
        legal = [child.queries]
    elif original.hidden % original.heads:
        return
    else:
        legal = list(range(child.heads, seed.hidden + 1, child.heads))
    if child.hidden in legal:
        return
    nearest = sorted(sorted(legal, key=lambda size: abs(size - child.hidden))[:2])
    raise refused(
        Axis.HIDDEN,
        child.hidden,
        f"{child.heads} query heads do not divide it, and stock configs refuse that",
        f"the nearest legal sizes: {', '.join(map(str, nearest)) or 'none; keep more heads'}",
    )


def refused(axis: Axis, size: int, what: str, remedy: str) -> InputError:
    """The refusal of one size."""
    return InputError(what, value=f"{axis}: {size}", where="prune.shape", remedy=remedy)
