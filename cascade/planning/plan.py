"""The plan of one child: the legal shapes that meet its budget, ranked by what their cuts cost."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from cascade.architecture import Architecture
from cascade.errors import InputError
from cascade.planning.axes import DEFAULT_AXES, Axis
from cascade.planning.budget import Budget
from cascade.planning.cost import cost_of_cuts
from cascade.planning.shapes import Space

# A shape whose FFN is whole still counts as meeting the budget this share below it.
TOLERANCE = 0.03
# Shapes whose depths differ by less than this share of the original's are near twins: of a race between
# them little can be learned. Two layers of SmolLM2-135M's 30 move its loss by about 0.1 to 0.3 nats.
APART = 1 / 15


def plan_child(
    original: Architecture,
    seed: Architecture,
    budget: Budget,
    axes: Collection[Axis] = DEFAULT_AXES,
    *,
    rotates: bool = False,
    fitted: bool = True,
) -> Architecture:
    """The first of `rank_children`."""
    return rank_children(original, seed, budget, axes, rotates=rotates, fitted=fitted)[0]


def rank_children(
    original: Architecture,
    seed: Architecture,
    budget: Budget,
    axes: Collection[Axis] = DEFAULT_AXES,
    *,
    rotates: bool = False,
    fitted: bool = True,
) -> list[Architecture]:
    """The shapes of a child that is cut from `seed`, itself cut from `original`, cheapest cuts first.

    axes: what may be cut. rotates: hidden channels are cut after a rotation, which unties the embeddings.
    fitted: whether least squares repair the cut. A child is never above its budget. Those shapes are ranked
    by `cost_of_cuts` that one more step of the FFN would carry above it, however far below they are, or that
    are within the share `TOLERANCE` of it.

    Raises InputError for a child that is not smaller than its seed, and for a budget that no legal shape
    meets, with the nearest that would do.
    """
    space = Space(original, seed, tuple(axes), rotates)
    if budget.limit >= budget.measure(seed):
        raise not_smaller(space, budget)
    shapes = list(space.within(budget))
    if not shapes:
        raise unreachable(space, budget)
    nearest = max(budget.measure(shape) for shape in shapes)
    enough = min(nearest, budget.limit * (1 - TOLERANCE))
    close = [shape for shape in shapes if shape.ffn < seed.ffn or budget.measure(shape) >= enough]
    # The second key makes the order unique: of equally cheap shapes the larger one comes first.

    def rank(shape: Architecture) -> tuple[float, float]:
        return cost_of_cuts(original, shape, fitted=fitted), -budget.measure(shape)

    return sorted(close, key=rank)


def distinct(ranked: Sequence[Architecture], original: Architecture, count: int) -> list[Architecture]:
    """The first `count` shapes of a ranking that are no near twins of one before them; maybe fewer."""
    found: list[Architecture] = []
    for shape in ranked:
        if len(found) < count and not any(twins(shape, other, original) for other in found):
            found.append(shape)
    return found


def twins(left: Architecture, right: Architecture, original: Architecture) -> bool:
    """Whether two shapes of one budget differ in little but a few layers."""
    others = (Axis.HIDDEN, Axis.KV_GROUPS, Axis.HEADS_PER_GROUP, Axis.EXPERTS)
    same = all(axis.size(left) == axis.size(right) for axis in others)
    return same and abs(left.layers - right.layers) < max(1, APART * original.layers)


def not_smaller(space: Space, budget: Budget) -> InputError:
    """The refusal of a budget that the seed already meets."""
    spent = budget.measure(space.seed)
    largest = list(space.within(budget.below(space.seed)))
    way_out = "allow more axes"
    if largest:
        way_out = f"ask for less, at most `{budget.dial_for(max(largest, key=budget.measure))}`"
    return InputError(
        f"the child would not be smaller than the model it is cut from ({spent:,.0f} {budget.unit})",
        value=budget.dial,
        where="prune",
        remedy=way_out,
    )


def unreachable(space: Space, budget: Budget) -> InputError:
    """The refusal of a budget below the smallest legal shape, with that shape."""
    smallest = space.smallest(budget)
    what = "no legal architecture is that small"
    fewest = min(body.embedding_parameters for body in space.bodies())
    if budget.limit <= fewest * budget.per_embedding:
        what += f": its embeddings alone are {fewest * budget.per_embedding:,} {budget.unit.split()[0]}"
    return InputError(
        what,
        value=budget.dial,
        where=f"prune, axes: {', '.join(space.axes)}",
        remedy=f"the nearest is `{budget.dial_for(smallest)}` ({describe(smallest)})",
    )


def describe(architecture: Architecture) -> str:
    """One line for a person: every size and the count that follows."""
    experts = f"{architecture.experts} experts with " if architecture.experts else ""
    return (
        f"{architecture.layers} layers, hidden {architecture.hidden}, {experts}FFN {architecture.ffn}, "
        f"{architecture.heads} heads in {architecture.kv_groups} KV groups of size {architecture.head_size}, "
        f"{'tied' if architecture.tied else 'untied'}: {architecture.parameters:,} parameters"
    )
