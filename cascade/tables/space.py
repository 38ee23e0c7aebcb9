"""The table of `cascade gc`: what nobody needs any more, in a store and in a machine's cache."""

from __future__ import annotations

from rich.table import Table

from cascade.family.space import DAY, Collected

COLUMNS = ("what", "where", "MB", "days old")


def space_table(found: Collected, *, now: float, deleted: bool, option: str = "--delete") -> Table:
    """One line a thing, and their sum. now: seconds since 1970. deleted: or it would be, with this option."""
    done = "removed" if deleted else f"would be removed; run it again with {option}"
    rows = [(thing.what.value, thing.place, thing.bytes, thing.modified) for thing in found.waste]
    rows += [("copy in the cache", str(copy.path), copy.bytes, copy.used) for copy in found.copies]
    table = Table(title=f"{len(rows)} things nobody needs", title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in COLUMNS[:2] else "right", overflow="fold")
    for what, where, size, moment in rows:
        table.add_row(what, where, megabytes(size), f"{(now - moment) / DAY:.0f}")
    if rows:
        table.add_row(done, "", megabytes(sum(size for _, _, size, _ in rows)), "", style="bold")
    for thing in found.damaged:
        age = f"{(now - thing.modified) / DAY:.0f}"
        table.add_row("stays: " + thing.what.value, thing.place, megabytes(thing.bytes), age)
    return table


def megabytes(size: int) -> str:
    """With one digit after the point."""
    return f"{size / 1e6:,.1f}"
