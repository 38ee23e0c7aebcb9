"""The races of a family: its candidates and their curves."""

from __future__ import annotations

from typing import Any

from rich.table import Table

Json = dict[str, Any]


def race_tables(index: Json) -> list[Table]:
    """For every stage that raced: its candidates, best first, with their curves."""
    return [race_table(stage) for stage in index["stages"] if stage.get("race")]


def race_table(stage: Json) -> Table:
    """One row a candidate: shape, parameters, cross-entropy in nats after each leg that it ran."""
    table = Table(title=f"race of stage {stage['name']}", title_justify="left")
    for column in race_columns(stage):
        table.add_column(column, justify="left" if column in ("shape", "outcome") else "right")
    for row in race_rows(stage):
        table.add_row(*row)
    return table


def race_columns(stage: Json) -> list[str]:
    """One column for each leg of the race."""
    ends = max((candidate["curve"] for candidate in stage["race"]), key=len)
    return ["shape", "parameters", *(f"CE at {end['tokens']:,} tokens" for end in ends), "outcome"]


def race_rows(stage: Json) -> list[list[str]]:
    """The candidates as text cells, those that ran longest first."""
    legs = max(len(candidate["curve"]) for candidate in stage["race"])
    ordered = sorted(
        stage["race"], key=lambda one: (-len(one["curve"]), [end["ce"] for end in one["curve"][-1:]])
    )
    return [
        [
            shape_text(one["architecture"]),
            f"{one['parameters']:,}",
            *(f"{end['ce']:.3f}" for end in one["curve"]),
            *[""] * (legs - len(one["curve"])),
            race_outcome(one),
        ]
        for one in ordered
    ]


def race_outcome(candidate: Json) -> str:
    """How far a candidate came."""
    if candidate["won"]:
        return "won"
    return f"out after {candidate['curve'][-1]['tokens']:,} tokens" if candidate["curve"] else "failed"


def shape_text(sizes: Json) -> str:
    """`28 layers, hidden 576, FFN 1024, 9 heads in 3 groups`."""
    experts = f"{sizes['experts']} x " if sizes["experts"] else ""
    heads = sizes["kv_groups"] * sizes["heads_per_group"]
    return (
        f"{sizes['layers']} layers, hidden {sizes['hidden']}, FFN {experts}{sizes['ffn']}, "
        f"{heads} heads in {sizes['kv_groups']} groups"
    )
