"""What a family cost, node by node."""

from __future__ import annotations

from typing import Any

from rich.table import Table

Json = dict[str, Any]


def ledger_table(index: Json) -> Table:
    """What a family cost, child by child with its nodes, and the totals it is compared with."""
    table = Table(title=f"ledger of family {index['family']}", title_justify="left")
    for column in LEDGER_COLUMNS:
        table.add_column(column, justify="left" if column == "node" else "right")
    ledger = index["ledger"]
    for entry in ledger["entries"]:
        table.add_row(*ledger_cells(entry))
        for node in entry["nodes"]:
            table.add_row(*ledger_cells({**node, "name": f"  {node['name']}"}))
        table.add_section()
    for sums in (ledger["family"], *([ledger["controls"]] if index["controls"] else [])):
        table.add_row(*ledger_cells(sums))
    for name, flops in (
        ("floor: one teacher pass and the students", ledger["floor_flops"]),
        ("separate: each child with an online teacher", ledger["separate_flops"]),
    ):
        table.add_row(name, "", tera(flops), *[""] * 4)
    if ledger["over_floor"]:
        table.caption = (
            f"The family took {ledger['over_floor']:.3f} x the FLOPs of its floor; "
            f"separate runs take {ledger['separate_over_family']:.3f} x the family's."
        )
    return table


LEDGER_COLUMNS = ("node", "tokens", "TFLOPs", "of students", "of teachers", "seconds", "MB")


def ledger_cells(record: Json) -> list[str]:
    """One line of the ledger as text; `?` where an old manifest does not tell."""
    teacher = record["teacher_flops"]
    return [
        record["name"],
        f"{record['tokens']:,}",
        tera(record["flops"]),
        tera(None if teacher is None else record["flops"] - teacher),
        tera(teacher),
        f"{record['seconds']:,.1f}",
        f"{record['bytes'] / 1e6:,.1f}",
    ]


def tera(flops: int | None) -> str:
    """In 10^12, small ones with three significant digits."""
    if flops is None:
        return "?"
    return f"{flops / 1e12:,.1f}" if flops >= 1e14 else f"{flops / 1e12:.3g}"
