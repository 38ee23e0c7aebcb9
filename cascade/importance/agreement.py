"""Whether a calibration set is large enough to rank: do two halves of its rows choose the same units?"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from cascade.importance.method import Scoring
from cascade.importance.scoring import layer_scores, width_key
from cascade.importance.streams import halves_key, layer_key
from cascade.importance.tallies import HALVES, Tally
from cascade.planning.axes import Axis

ENOUGH = 0.75
"""Warn below. Take the scores of a half as a unit's true score plus normal noise. Two halves whose scores
have the correlation r agree on 1/2 + arcsin(r) / pi of a median split (Sheppard, 1899), so 0.75 is r = 0.71.
All rows together then have the reliability 2 r / (1 + r) = 0.83 (Spearman and Brown, 1910), correlate by its
root, 0.91, with the true scores, and put 86 % of the units on the right side. A model, not a measurement."""


def agreement(first: Tensor, second: Tensor, reached: Tensor | None = None) -> float:
    """Share of units that both scores keep or both drop when the better half is kept; 1.0 is the same set.

    Scores [..., n] of the same units, n > 1: along the last dimension n // 2 are kept, and the share is the
    mean over the rest. By chance it is 0.5 for an even n, and (n^2 + 1) / 2n^2 for an odd one; as much counts
    where nothing was `reached` [...], because then both scores come from elsewhere and are equal anyway.
    """
    shares = (better_half(first) == better_half(second)).double().mean(-1)
    if reached is not None:
        size, kept = first.shape[-1], first.shape[-1] // 2
        shares = torch.where(reached, shares, (kept**2 + (size - kept) ** 2) / size**2)
    return shares.mean().item()


def better_half(scores: Tensor) -> Tensor:
    """Whether a unit is among the n // 2 best of its row; of equals the lower one is, as in `select`."""
    order = torch.argsort(scores, dim=-1, descending=True, stable=True)
    kept = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    return kept.scatter_(-1, order[..., : scores.shape[-1] // 2], True)


def agreements(tallies: Sequence[Tally], length: int) -> dict[str, float]:
    """`agreement` of the even and the odd rows by statistic; empty where one of the halves has no row."""
    found = dict[str, float]()
    for tally in tallies:
        if all(tally.rows):
            first, second = (tally.statistics(length, [half]) for half in HALVES)
            several = [name for name, values in first.items() if values.shape[-1] > 1]
            found |= {name: agreement(first[name], second[name], tally.reached()) for name in several}
    return found


def doubts(
    agreement: Mapping[str, float], tokens: int, scoring: Scoring, axes: Collection[Axis] = tuple(Axis)
) -> list[str]:
    """A warning for each of `axes` that the calibration ranks poorly, with numbers, in a person's words.

    agreement, tokens: as in `Calibration`. Empty for a method that measured no activations (`tokens` is 0).
    """
    if not tokens:
        return []
    if not agreement:
        return [
            f"calibration on {tokens} tokens is one row, so nothing tells how well it ranks; "
            "raise calibration_tokens"
        ]
    shares = [(axis, agreement.get(width_key(axis, scoring))) for axis in axes]
    return [
        f"calibration on {tokens} tokens ranks {axis} poorly: two halves of them agree on {share:.0%} of the "
        "units to keep (50% is chance); raise calibration_tokens"
        for axis, share in shares
        if share is not None and share < ENOUGH
    ]


def layer_doubts(statistics: Mapping[str, Tensor], tokens: int, scoring: Scoring, dropped: int) -> list[str]:
    """A warning where the even and the odd rows would drop other layers, as of `doubts`.

    statistics: as of `Calibration`; dropped: how many layers go. `ENOUGH` of those that go must be the same
    ones: for up to three layers that is all of them, and one layer is a large part of a model.
    """
    key, halves = layer_key(scoring.layers), statistics.get(halves_key(scoring.layers))
    if not dropped or halves is None:
        return []
    first, second = (dropped_layers({key: matrix}, scoring, dropped) for matrix in halves)
    same, layers = len(first & second), halves.shape[-1] - 1
    if same >= ENOUGH * dropped:
        return []
    chance = chance_of_layers(layers, dropped, scoring.contiguous)
    return [
        f"calibration on {tokens} tokens ranks layers poorly: two halves of them agree on {same} of the "
        f"{dropped} layers to drop ({chance:.1f} is chance); raise calibration_tokens"
    ]


def dropped_layers(statistics: Mapping[str, Tensor], scoring: Scoring, dropped: int) -> set[int]:
    """The layers that go; of equals the later ones, as in `select`."""
    order = torch.argsort(layer_scores(statistics, scoring, dropped), descending=True, stable=True)
    return set(order[-dropped:].tolist())


def chance_of_layers(layers: int, dropped: int, contiguous: bool) -> float:
    """How many of the `dropped` layers two choices at random have in common, on average."""
    if not contiguous:
        return dropped**2 / layers
    starts = range(layers - dropped + 1)
    return sum(max(0, dropped - abs(i - j)) for i in starts for j in starts) / len(starts) ** 2
