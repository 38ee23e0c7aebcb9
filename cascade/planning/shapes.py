"""Every legal shape of a child, and those among them that a budget allows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from cascade.architecture import Architecture
from cascade.planning.axes import Axis, ffn_step, hidden_step, multiples
from cascade.planning.budget import Budget


@dataclass(frozen=True)
class Space:
    """The shapes that a child of `seed` may take when only `axes` are cut.

    The steps between sizes follow from the original, so that a small child keeps the friendly multiples
    of the family's first parent, and cutting in stages draws from the same sizes as cutting at once.
    rotates: a cut of the hidden size rotates the channels first, and its child has a head of its own.
    """

    original: Architecture
    seed: Architecture
    axes: tuple[Axis, ...]
    rotates: bool = False

    def bodies(self) -> Iterator[Architecture]:
        """All legal combinations of the other sizes, with the seed's FFN."""
        for kv_groups in self.sizes(Axis.KV_GROUPS):
            for per_group in self.sizes(Axis.HEADS_PER_GROUP):
                for hidden in self.hidden_sizes(kv_groups * per_group):
                    for layers in self.sizes(Axis.LAYERS):
                        for experts in self.sizes(Axis.EXPERTS):
                            body = replace(
                                self.seed,
                                layers=layers,
                                kv_groups=kv_groups,
                                heads_per_group=per_group,
                                hidden=hidden,
                                experts=experts,
                            )
                            rotated = self.rotates and hidden < self.seed.hidden
                            yield untied(body) if rotated else body

    def sizes(self, axis: Axis) -> range:
        """Sizes from the seed's downwards, on an axis without steps; of experts no fewer than are active."""
        size = axis.size(self.seed)
        least = self.seed.counts.active_experts if axis is Axis.EXPERTS else 1
        return range(size, least - 1, -1) if axis in self.axes else range(size, size + 1)

    def hidden_sizes(self, heads: int) -> list[int]:
        """Legal hidden sizes of a child with `heads` query heads; maybe none, see `hidden_step`."""
        seed, sizes = self.seed, [self.seed.hidden]
        if seed.counts.bound:
            own = heads * seed.head_size
            return [own] if own == seed.hidden or Axis.HIDDEN in self.axes else []
        if Axis.HIDDEN in self.axes:
            sizes = multiples(hidden_step(self.original, heads), seed.hidden)
        undivided = self.original.hidden % self.original.heads != 0
        return [size for size in sizes if undivided or size % heads == 0]

    def within(self, budget: Budget) -> Iterator[Architecture]:
        """Legal shapes that meet `budget`: for every body the widest FFN that still fits.

        A narrower one costs more quality and is never better. Every measure is linear in F, so the widest is
        found by division, not by trying.
        """
        for body in self.bodies():
            ffn = self.widest_ffn(body, budget)
            if ffn:
                yield replace(body, ffn=ffn)

    def widest_ffn(self, body: Architecture, budget: Budget) -> int:
        """The largest legal FFN size that keeps `body` within `budget`; 0 if there is none."""
        spent = budget.measure(body)
        if spent <= budget.limit:
            return body.ffn
        if Axis.FFN not in self.axes:
            return 0
        neuron = spent - budget.measure(replace(body, ffn=body.ffn - 1))
        if neuron <= 0:
            # A latency on which the FFN was measured to have no share.
            return 0
        step = ffn_step(self.original.ffn)
        return max(0, int((budget.limit - spent + body.ffn * neuron) // neuron) // step * step)

    def smallest(self, budget: Budget) -> Architecture:
        """The legal shape that counts least against `budget`, whatever its limit."""
        ffn = min(ffn_step(self.original.ffn), self.seed.ffn) if Axis.FFN in self.axes else self.seed.ffn
        return min((replace(body, ffn=ffn) for body in self.bodies()), key=budget.measure)


def untied(architecture: Architecture) -> Architecture:
    """The same with an LM head of its own."""
    return replace(architecture, counts=replace(architecture.counts, tied=False))
