"""The policies of a pilot, side by side."""

from __future__ import annotations

from typing import Any

from rich.table import Table

Json = dict[str, Any]


def pilot_tables(pilot: Json) -> list[Table]:
    """What the policies of a pilot differ in, and what came out stage by stage."""
    title = f"pilot: {pilot['tokens']:,} tokens a stage, seed {pilot['seed']}"
    settings = Table(title=title, title_justify="left")
    results = Table(title="held-out figures", title_justify="left")
    families = [policy["family"] for policy in pilot["policies"]]
    for column in ("key", *families):
        settings.add_column(column)
    for name in pilot["policies"][0]["differs"]:
        settings.add_row(name, *(str(policy["differs"][name]) for policy in pilot["policies"]))
    for column in PILOT_COLUMNS:
        results.add_column(column, justify="left" if column in ("stage", "policy") else "right")
    for row in pilot_rows(pilot):
        results.add_row(*row)
    return [settings, results]


PILOT_COLUMNS = ("stage", "policy", "CE distilled", "KL to parent", "top-1", "seconds")


def pilot_rows(pilot: Json) -> list[list[str]]:
    """Stage by stage, the policies in the order of their recipes."""
    policies = pilot["policies"]
    return [
        [
            policy["stages"][place]["name"],
            policy["family"],
            f"{policy['stages'][place]['held_out_ce']:.3f}",
            f"{policy['stages'][place]['kl_to_parent']:.3f}",
            f"{100 * policy['stages'][place]['top1_agreement']:.1f} %",
            f"{policy['stages'][place]['seconds']:,.0f}",
        ]
        for place in range(len(policies[0]["stages"]))
        for policy in policies
    ]
