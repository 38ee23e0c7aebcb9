"""The plan of one child: the shape that meets its budget and whose cuts cost least."""

from __future__ import annotations

from collections.abc import Collection

from cascade.architecture import Architecture
from cascade.errors import InputError
from cascade.planning.axes import DEFAULT_AXES, Axis
from cascade.planning.budget import Budget, resolve_budget
from cascade.planning.cost import cost_of_cuts
from cascade.planning.shapes import Space

# A shape this share of the budget below it still counts as meeting it: sizes come in steps, and one step of
# hardware-friendly FFN is about 2 % of a small model.
TOLERANCE = 0.02


def plan_child(
    original: Architecture,
    seed: Architecture,
    *,
    parameters: int | None = None,
    ratio: float | None = None,
    axes: Collection[Axis] = DEFAULT_AXES,
) -> Architecture:
    """The architecture of a child that is cut from `seed`, which itself was cut from `original`.

    parameters: the child's total. ratio: the share of the ORIGINAL parent's non-embedding parameters
    that it keeps. axes: what may be cut. The child is never above its budget, and within 2 % of it where
    the legal sizes allow; among those shapes it is the one with the lowest `cost_of_cuts`.

    Raises InputError for both or none of the dials, for a child that is not smaller than its seed, and
    for a budget that no legal shape meets; the last two name the nearest that would do.
    """
    budget = resolve_budget(original, parameters=parameters, ratio=ratio)
    space = Space(original, seed, tuple(axes))
    if budget.limit >= budget.spent(seed):
        raise not_smaller(space, budget)
    shapes = list(space.within(budget))
    if not shapes:
        raise unreachable(space, budget)
    nearest = max(budget.spent(shape) for shape in shapes)
    enough = min(nearest, budget.limit * (1 - TOLERANCE))
    close = [shape for shape in shapes if budget.spent(shape) >= enough]
    # The second key makes the choice unique: of equally cheap shapes the larger one.
    return min(close, key=lambda shape: (cost_of_cuts(original, shape), -budget.spent(shape)))


def not_smaller(space: Space, budget: Budget) -> InputError:
    """The refusal of a budget that the seed already meets."""
    spent = budget.spent(space.seed)
    counted = "parameters" if budget.embeddings else "non-embedding parameters"
    largest = list(space.within(Budget(spent - 1, budget.embeddings, budget.dial)))
    way_out = "allow more axes"
    if largest:
        way_out = f"ask for less, at most `{budget.dial_for(max(largest, key=budget.spent), space.original)}`"
    return InputError(
        f"the child would not be smaller than the model it is cut from ({spent:,} {counted})",
        value=budget.dial,
        where="prune",
        remedy=way_out,
    )


def unreachable(space: Space, budget: Budget) -> InputError:
    """The refusal of a budget below the smallest legal shape, with that shape."""
    smallest = space.smallest(budget)
    what = "no legal architecture is that small"
    fewest = min(body.embedding_parameters for body in space.bodies())
    if budget.embeddings and budget.limit <= fewest:
        what += f": its embeddings alone are {fewest:,} parameters"
    return InputError(
        what,
        value=budget.dial,
        where=f"prune, axes: {', '.join(space.axes)}",
        remedy=f"the nearest is `{budget.dial_for(smallest, space.original)}` ({describe(smallest)})",
    )


def describe(architecture: Architecture) -> str:
    """One line for a person: every size and the count that follows."""
    experts = f"{architecture.experts} experts with " if architecture.experts else ""
    return (
        f"{architecture.layers} layers, hidden {architecture.hidden}, {experts}FFN {architecture.ffn}, "
        f"{architecture.heads} heads in {architecture.kv_groups} KV groups of size {architecture.head_size}, "
        f"{'tied' if architecture.tied else 'untied'}: {architecture.parameters:,} parameters"
    )
