"""What pydantic finds wrong with a tree, in the words of the person who wrote it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError

# A tree can be wrong in thousands of places, and a value can be a book.
MOST_LINES = 20
LONGEST_VALUE = 80

NUMBER, WHOLE, TRUTH = "a number is needed", "a whole number is needed", "true or false is needed"
TEXT, LIST, KEYS = "text is needed", "a list is needed", "keys with values are needed"
# By pydantic's name of a problem. What is not here begins with INPUT, which reads well as "must be".
WORDS = {
    "missing": "required, but missing",
    "model_type": KEYS,
    "model_attributes_type": KEYS,
    "dict_type": KEYS,
    "tuple_type": LIST,
    "list_type": LIST,
    "string_type": f"{TEXT}; put it in quotes if it looks like something else",
    "string_unicode": "this is not text",
    "int_type": WHOLE,
    "int_parsing": WHOLE,
    "int_parsing_size": "the number is too large",
    "int_from_float": WHOLE,
    "float_type": NUMBER,
    "float_parsing": NUMBER,
    "finite_number": "a finite number is needed",
    "bool_type": TRUTH,
    "bool_parsing": TRUTH,
    "invalid_key": "a key must be text",
}
INPUT = "Input should be "
SHAPES = {
    r"^[a-z0-9][a-z0-9-]{0,62}$": "lowercase letters, digits and dashes are needed, up to 63, first no dash",
    "^[0-9a-f]{64}$": "64 hexadecimal digits are needed",
}


def problem_lines(error: ValidationError, known: Iterable[str] = ()) -> list[str]:
    """One line for each wrong key, the first ones of very many. known: all keys, to guess a misspelt one."""
    found: list[Any] = error.errors(include_url=False)
    # A list whose items are wrong is called too short as well.
    told = [
        problem
        for problem in found
        if problem["type"] != "too_short" or not any(is_within(other, problem) for other in found)
    ]
    lines = [f"{path_of(problem)}: {describe(problem, known)}" for problem in told[:MOST_LINES]]
    return lines + [f"and {len(told) - MOST_LINES} more"] * (len(told) > MOST_LINES)


def is_within(inner: Any, outer: Any) -> bool:
    """Whether a problem lies deeper in the tree, in the same branch."""
    depth = len(outer["loc"])
    return len(inner["loc"]) > depth and inner["loc"][:depth] == outer["loc"]


def path_of(problem: Any) -> str:
    """The keys that lead to a problem."""
    return ".".join(short(str(part)) for part in problem["loc"]) or "top level"


def describe(problem: Any, known: Iterable[str] = ()) -> str:
    """What is wrong, and with which value; for an unknown key the known one that looks most like it."""
    kind, value, context = problem["type"], problem["input"], problem.get("ctx", {})
    if kind == "extra_forbidden":
        close = difflib.get_close_matches(short(str(problem["loc"][-1])), sorted(set(known)), n=1)
        return "unknown key" + (f"; did you mean `{close[0]}`?" if close else "")
    if value is None and kind == "model_type" and not problem["loc"]:
        return "there is nothing here"
    if kind == "enum":
        text = f"one of {context['expected']} is needed"
    elif kind in ("string_too_short", "too_short"):
        text = "it must not be empty"
    elif kind == "string_pattern_mismatch":
        text = SHAPES.get(context["pattern"]) or f"it must have the form {context['pattern']}"
    else:
        text = WORDS.get(kind) or problem["msg"].removeprefix("Value error, ").replace(INPUT, "must be ")
    return (
        text
        if kind == "missing" or isinstance(value, dict | list | tuple | set)
        else (f"{text} (got {short(repr(value))})")
    )


def short(text: str) -> str:
    """The text, or its two ends."""
    half = LONGEST_VALUE // 2 - 2
    return text if len(text) <= LONGEST_VALUE else f"{text[:half]}...{text[-half:]}"
