"""What the recipe's sections are made of: fields that a form can show, and counts as people write them."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

COUNT = re.compile(r"^([0-9]+(?:\.[0-9]+)?)\s*([kMBT]?)$")
MULTIPLES = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
SIZE = re.compile(r"^([0-9]+(?:\.[0-9]+)?)\s*([kMGT]?)B$")
BYTES = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parse_count(value: object) -> object:
    """Turn "20k", "1.5M" or "3B" (decimal multiples) into an integer; leave anything else to pydantic."""
    match = COUNT.match(value.strip()) if isinstance(value, str) else None
    return round(float(match[1]) * MULTIPLES[match[2]]) if match else value


def parse_bytes(value: object) -> object:
    """Turn "300MB" or "1.5GB" (decimal) into an integer; leave anything else to pydantic."""
    match = SIZE.match(value.strip()) if isinstance(value, str) else None
    return round(float(match[1]) * BYTES[match[2]]) if match else value


Count = Annotated[int, BeforeValidator(parse_count)]
Bytes = Annotated[int, BeforeValidator(parse_bytes)]


def setting(default: Any, position: int, title: str, description: str, **bounds: Any) -> Any:
    """A pydantic field that carries what the Prefect form shows: title, description, order."""
    return Field(
        default, title=title, description=description, json_schema_extra={"position": position}, **bounds
    )


class Section(BaseModel):
    """Frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")
