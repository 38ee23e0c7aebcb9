"""What became of every child, as rows of a table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from cascade.architecture import Architecture
from cascade.evaluation.metrics import Metrics
from cascade.planning.plan import describe
from tests.bench.report import spread

HEADER = (
    "child",
    "parameters",
    "of the body",
    "shape",
    "CE pruned",
    "CE distilled",
    "KL distilled",
    "rise pruned",
    "rise distilled",
)
LEGEND = (
    "CE: held-out cross-entropy, KL: distance to the parent, both in nats a token on the same rows for all; "
    "of the body: share of the parent's non-embedding parameters; rise: of CE over the parent's, relative to "
    "that of the first row; several figures: median (smallest to largest)"
)


@dataclass(frozen=True)
class Outcome:
    """One child: its shape, and held-out figures before and after distillation."""

    name: str
    ratio: float
    shape: Architecture
    pruned: Metrics
    distilled: Metrics

    def rises(self, parent: Metrics) -> tuple[float, float]:
        """Of the cross-entropy over the parent's, in nats, before and after."""
        before, after = self.pruned.held_out_ce, self.distilled.held_out_ce
        return before - parent.held_out_ce, after - parent.held_out_ce


def rows(outcomes: Iterable[Outcome], parent: Metrics, body: int) -> Iterator[list[str]]:
    """One row a child and ratio, in the order in which they were made; equal names share a row.

    body: non-embedding parameters of the parent. The first child at a ratio is what others are compared with.
    """
    groups: dict[tuple[float, str], list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault((outcome.ratio, outcome.name), []).append(outcome)
    first: dict[float, tuple[float, float]] = {}
    for (ratio, name), group in groups.items():
        rise = median_rises(group, parent)
        ours = first.setdefault(ratio, rise)
        shape = group[0].shape
        yield [
            f"{ratio:.0%}: {name}",
            f"{shape.parameters:,}",
            f"{shape.non_embedding_parameters / body:.1%}",
            describe(shape).partition(":")[0],
            spread([one.pruned.held_out_ce for one in group], 3),
            spread([one.distilled.held_out_ce for one in group], 3),
            spread([one.distilled.kl_to_parent for one in group], 3),
            f"{rise[0] / ours[0]:.2f}",
            f"{rise[1] / ours[1]:.2f}",
        ]


def median_rises(group: Sequence[Outcome], parent: Metrics) -> tuple[float, float]:
    """Before and after distillation."""
    before, after = zip(*(outcome.rises(parent) for outcome in group), strict=True)
    return median(before), median(after)
