"""What makes an error one of ours: four parts, an exit code that says whose fault it is, plain words."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tests.faults.trial import ESCAPED, Outcome

# How libraries speak to programmers.
JARGON = ("Input should", "String should", "Value error", "pydantic", "valid dictionary", "Traceback")
LONGEST = 3000
WRONG_INPUT = 2


def complaints(said: str, record: dict[str, Any], code: int) -> list[str]:
    """What is not as it should be with an error: its text, its record and its exit code."""
    # A value is what the user wrote; where none was written, or each line names its own, there is none.
    missing = [part for part in ("what", "where", "remedy") if not str(record[part] or "").strip()]
    found = [f"no {part}" for part in missing] + [word for word in JARGON if word in said]
    if code != WRONG_INPUT:
        found.append(f"exit code {code}")
    if len(said) > LONGEST:
        found.append(f"{len(said)} characters")
    return found


def not_ours(outcomes: Iterable[Outcome]) -> list[str]:
    """One text for every outcome that escaped, and for every error that is not as it should be."""
    wrong = []
    for outcome in outcomes:
        error = outcome.error
        found = complaints(outcome.said, error, error["exit_code"]) if error else []
        if outcome.verdict == ESCAPED or found:
            wrong.append(f"{outcome.name}: {', '.join(found)}\n{outcome.said}")
    return wrong
