"""Pieces of Markdown around names that people chose, and that may hold anything."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rich.table import Table

# What begins an entity, a tag, emphasis, code, a link or a cell.
SPECIAL = re.compile(r"([\\`*_{}\[\]<>&|~#$])")
LONGEST_LABEL = 40


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; cells are Markdown already, and stay in one line and in one cell."""
    return "\n".join([_row(columns), _row(["---"] * len(columns)), *map(_row, rows)])


def rich_table(table_: Table) -> str:
    """A table that was made for a terminal, with its title and caption."""
    columns = [plain(str(column.header)) for column in table_.columns]
    rows = list(zip(*([plain(str(cell)) for cell in column.cells] for column in table_.columns), strict=True))
    title = f"**{plain(str(table_.title))}**" if table_.title else ""
    caption = "\n".join(plain(line) + "  " for line in str(table_.caption or "").splitlines())
    return "\n\n".join(part for part in (title, table(columns, rows), caption) if part)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_in_cell(cell) for cell in cells) + " |"


def _in_cell(text: str) -> str:
    """Bars end a cell even in code, unless a backslash stands before them."""
    return re.sub(r"(?<!\\)\|", r"\\|", one_line(text))


def one_line(text: str) -> str:
    """Without line breaks, which would end a table, a heading or a label."""
    return " ".join(text.split())


def plain(text: str) -> str:
    """Text that means nothing but itself."""
    return SPECIAL.sub(r"\\\1", one_line(text))


def code(text: str) -> str:
    """Text as code: Prefect strips what looks like a link to a bucket."""
    text = one_line(text)
    ticks = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    edge = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{ticks}{edge}{text}{edge}{ticks}"


def block(text: str, language: str = "") -> str:
    """Lines as code."""
    fence = "`" * max(3, max(map(len, re.findall("`+", text)), default=0) + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def label(text: str) -> str:
    """Text inside the quotes of a mermaid node, with its entities (`#34;`); a long one loses its front."""
    text = one_line(text)
    text = text if len(text) <= LONGEST_LABEL else "..." + text[3 - LONGEST_LABEL :]
    return re.sub(r"[^\w .,:/+=@()-]", lambda match: f"#{ord(match[0])};", text, flags=re.ASCII)
