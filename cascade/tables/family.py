"""A family: parent and children, long contexts, and the controls beside the last child."""

from __future__ import annotations

from typing import Any

from rich.table import Table

Json = dict[str, Any]


def family_table(index: Json) -> Table:
    """Parent and children, one row each: what the README's quickstart table shows."""
    table = Table(title=f"family {index['family']}", title_justify="left")
    for column in FAMILY_COLUMNS:
        table.add_column(column, justify="left" if column == "model" else "right")
    for row in family_rows(index):
        table.add_row(*row)
    return table


FAMILY_COLUMNS = (
    "model",
    "parameters",
    "CE pruned",
    "CE distilled",
    "KL to parent",
    "top-1",
    "tokens/s",
    "tokens trained",
    "seconds",
    "state",
)


def family_rows(index: Json) -> list[list[str]]:
    """The family as text cells; cross-entropy (CE) and KL are held-out, in nats a token."""
    parent = index["parent"]
    rows = [
        [
            "parent",
            f"{parent['parameters']:,}",
            "",
            f"{parent['held_out_ce']:.3f}",
            "",
            "",
            f"{parent['tokens_per_second']:,.0f}",
            "",
            "",
            "",
        ]
    ]
    for stage in index["stages"]:
        rows.append(
            [
                stage["name"],
                f"{stage['parameters']:,}",
                f"{stage['pruned_held_out_ce']:.3f}",
                f"{stage['held_out_ce']:.3f}",
                f"{stage['kl_to_parent']:.3f}",
                f"{100 * stage['top1_agreement']:.1f} %",
                f"{stage['tokens_per_second']:,.0f}",
                f"{stage['tokens_trained']:,}",
                f"{stage['seconds']:,.0f}",
                state_text(stage),
            ]
        )
    return rows


def state_text(stage: Json) -> str:
    """`made` or `reused`; and where its watch found a child that was better before the end."""
    state = "reused" if stage["reused"] else "made"
    for found in stage.get("watched", {}).values():
        if found["stopped_early"]:
            state += f", stopped early: best at {found['best_tokens']:,}"
    return state


def extended_tables(index: Json) -> list[Table]:
    """The children whose context was extended, where there are any."""
    if not index.get("extended"):
        return []
    table = Table(title=f"long contexts of family {index['family']}", title_justify="left")
    for column in EXTENDED_COLUMNS:
        table.add_column(column, justify="left" if column in ("model", "RoPE") else "right")
    for row in extended_rows(index):
        table.add_row(*row)
    return [table]


EXTENDED_COLUMNS = (
    "model",
    "rows of",
    "RoPE",
    "CE parent",
    "CE before",
    "CE extended",
    "KL before",
    "KL to parent",
    "top-1",
    "tokens trained",
    "seconds",
    "state",
)


def extended_rows(index: Json) -> list[list[str]]:
    """Extended children as text cells; figures are of held-out long rows, `before`: with the RoPE settings
    alone."""
    return [
        [
            row["name"],
            f"{row['sequence_length']:,}",
            rope_text(row["rope_parameters"]),
            f"{row['parent_held_out_ce']:.3f}",
            f"{row['before_held_out_ce']:.3f}",
            f"{row['held_out_ce']:.3f}",
            f"{row['before_kl_to_parent']:.3f}",
            f"{row['kl_to_parent']:.3f}",
            f"{100 * row['top1_agreement']:.1f} %",
            f"{row['tokens_trained']:,}",
            f"{row['seconds']:,.0f}",
            "reused" if row["reused"] else "made",
        ]
        for row in index["extended"]
    ]


def rope_text(parameters: Json) -> str:
    """`yarn x 4, theta 10,000`; of full attention where layers differ."""
    own = parameters.get("full_attention", parameters)
    scaling = f"{own['rope_type']} x {own['factor']:g}, " if own.get("factor") else ""
    return f"{scaling}theta {own['rope_theta']:,.0f}"


def control_tables(index: Json) -> list[Table]:
    """The last child and its controls, where there are any."""
    if not index.get("controls"):
        return []
    child = index["controls"][0]["of"]
    table = Table(title=f"controls of stage {child}", title_justify="left")
    for column in CONTROL_COLUMNS:
        table.add_column(column, justify="left" if column == "model" else "right")
    for row in control_rows(index):
        table.add_row(*row)
    return [table]


CONTROL_COLUMNS = (
    "model",
    "seed",
    "parameters",
    "tokens trained",
    "CE distilled",
    "worse by",
    "KL to parent",
    "worse by",
    "top-1",
    "seconds",
)


def control_rows(index: Json) -> list[list[str]]:
    """The child and its controls as text cells; differences in nats a token, positive where the child is
    better."""
    controls = index["controls"]
    (child,) = [stage for stage in index["stages"] if stage["name"] == controls[0]["of"]]
    # What all runs share stands in every row.
    own = {"seed": controls[0]["seed"], "held_out_ce_difference": None, "kl_to_parent_difference": None}
    return [
        [
            row["name"],
            str(row["seed"]),
            f"{row['parameters']:,}",
            f"{row['tokens_trained']:,}",
            f"{row['held_out_ce']:.3f}",
            signed(row["held_out_ce_difference"]),
            f"{row['kl_to_parent']:.3f}",
            signed(row["kl_to_parent_difference"]),
            f"{100 * row['top1_agreement']:.1f} %",
            f"{row['seconds']:,.0f}",
        ]
        for row in ({**child, **own}, *controls)
    ]


def signed(difference: float | None) -> str:
    """`+0.012`; nothing for no difference to state."""
    return "" if difference is None else f"{difference:+.3f}"
