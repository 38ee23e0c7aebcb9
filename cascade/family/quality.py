"""Whether a family keeps the limits of its recipe, from its index and that of the family that is `stable`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]


@dataclass(frozen=True)
class Figure:
    """What a limit is for. least: it is a lower bound. of: the value, from the stage's row and the one that
    it is compared with: the parent's, or `stable`'s of the same stage where `stable` is set."""

    least: bool
    of: Callable[[Json, Json], float]
    stable: bool = False


def loss_above(stage: Json, other: Json) -> float:
    """Nats a token."""
    return float(stage["held_out_ce"] - other["held_out_ce"])


def speed_of(stage: Json, other: Json) -> float:
    """A multiple of the other's tokens/s, as they were measured when each was evaluated."""
    return float(stage["tokens_per_second"] / other["tokens_per_second"])


FIGURES = {
    "loss_above_parent": Figure(False, loss_above),
    "loss_above_stable": Figure(False, loss_above, stable=True),
    "kl_to_parent": Figure(False, lambda stage, parent: float(stage["kl_to_parent"])),
    "top1_agreement": Figure(True, lambda stage, parent: float(stage["top1_agreement"])),
    "parameters": Figure(False, lambda stage, parent: float(stage["parameters"])),
    "speed_of_parent": Figure(True, speed_of),
    "speed_of_stable": Figure(True, speed_of, stable=True),
}


def verdicts(index: Json, stable: Json | None) -> list[Json]:
    """One row for each limit of each stage that is built: stage, figure, value, limit, bound, passed.

    index: of the family; its recipe says the limits. stable: the index that `stable` names; what is compared
    with it counts only where it has a stage of this name.
    """
    others = {stage["name"]: stage for stage in stable["stages"]} if stable else {}
    limits = {stage["name"]: stage.get("gate") or {} for stage in index["recipe"]["stages"]}
    return [
        verdict(name, limit, stage, other)
        for stage in index["stages"]
        for name, limit in limits[stage["name"]].items()
        if limit is not None
        and (other := others.get(stage["name"]) if FIGURES[name].stable else index["parent"])
    ]


def verdict(name: str, limit: float, stage: Json, other: Json) -> Json:
    """One row. A value that is no number keeps no limit."""
    figure = FIGURES[name]
    value = figure.of(stage, other)
    return {
        "stage": stage["name"],
        "figure": name,
        "value": value,
        "limit": limit,
        "bound": "at least" if figure.least else "at most",
        "passed": value >= limit if figure.least else value <= limit,
    }


def shortfalls(rows: list[Json]) -> dict[str, list[Json]]:
    """The rows that were not passed, by stage."""
    failed = [row for row in rows if not row["passed"]]
    return {name: [row for row in failed if row["stage"] == name] for name in unique(failed)}


def unique(rows: list[Json]) -> list[str]:
    """Stages in the order of the rows."""
    return list(dict.fromkeys(row["stage"] for row in rows))


def verdict_line(row: Json) -> str:
    """`small: loss_above_parent is 0.534, at most 0.5`."""
    return f"{row['stage']}: {row['figure']} is {row['value']:,.6g}, {row['bound']} {row['limit']:,.6g}"
