"""A record of nested JSON, such as a manifest."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text

Json = dict[str, Any]


def record_table(title: str, record: Json) -> Table:
    """Nested JSON as a two-column table with dotted names."""
    table = Table(title=Text(title), title_justify="left", show_header=False)
    for name, value in flatten(record):
        table.add_row(Text(name), Text(value))
    return table


def flatten(record: Json, prefix: str = "") -> list[tuple[str, str]]:
    """`{"a": {"b": 1}}` -> `[("a.b", "1")]`; lists stay on one line."""
    rows: list[tuple[str, str]] = []
    for name, value in record.items():
        if isinstance(value, dict):
            rows += flatten(value, f"{prefix}{name}.")
        else:
            rows.append((prefix + name, str(value)))
    return rows
