"""The quality gate's rows as a table."""

from __future__ import annotations

from typing import Any

from cascade.cards.markdown import table

Json = dict[str, Any]


def gate_part(index: Json, stage: str = "") -> str:
    """Of one stage, or of all; empty where the recipe sets no limits."""
    rows = [row for row in index.get("gate", []) if stage in ("", row["stage"])]
    if not rows:
        return ""
    failed = sum(not row["passed"] for row in rows)
    verdict = f"**Fell short: {failed} of {len(rows)} limits.**" if failed else "**Passed.**"
    cells = [
        [
            row["stage"],
            row["figure"].replace("_", " "),
            f"{row['value']:,.6g}",
            f"{row['bound']} {row['limit']:,.6g}",
            "yes" if row["passed"] else "**no**",
        ]
        for row in rows
    ]
    return f"{verdict}\n\n{table(('stage', 'figure', 'value', 'limit', 'kept'), cells)}"
