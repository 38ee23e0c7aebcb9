"""What commands print of a family on standard output."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from cascade.tables.family import control_tables, extended_tables, family_table
from cascade.tables.races import race_tables

Json = dict[str, Any]


def output() -> Console:
    """Standard output; a table in a pipe keeps its columns instead of folding at 80 characters."""
    console = Console()
    return console if console.is_terminal else Console(width=160)


def print_built(index: Json, family: str) -> None:
    """What a build made: the family's tables, and where its children and its card are. family: its URI."""
    print_family(index)
    places = {child["name"]: child["checkpoint"] for child in (*index["stages"], *index["extended"])}
    print_lines({**places, "card": f"{family}/card.md"})


def print_family(index: Json) -> None:
    """The family's table, one for each race, one for long contexts, and one for the controls."""
    tables = (*race_tables(index), *extended_tables(index), *control_tables(index))
    for table in (family_table(index), *tables):
        output().print(table)


def print_lines(named: dict[str, str]) -> None:
    """`name: value`, never folded."""
    for name, value in named.items():
        output().print(f"{name}: {value}", soft_wrap=True, highlight=False, markup=False)
