"""What the recipe's sections are made of: fields that a form can show, and counts as people write them."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    ValidationInfo,
    field_validator,
)
from pydantic_core import CoreSchema

COUNT = re.compile(r"^([0-9]+(?:\.[0-9]+)?)\s*([kMBT]?)$")
MULTIPLES = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
SIZE = re.compile(r"^([0-9]+(?:\.[0-9]+)?)\s*([kMGT]?)B$")
# Digits of a number, and the largest one: what follows is computed in 64 bits.
LONGEST = 30
MOST = 10**18
BYTES = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parse_count(value: object) -> object:
    """Turn "20k", "1.5M" or "3B" (decimal multiples) into an integer; leave anything else to pydantic."""
    match = COUNT.match(value.strip()) if isinstance(value, str) else None
    return scaled(match, MULTIPLES) if match else value


def parse_bytes(value: object) -> object:
    """Turn "300MB" or "1.5GB" (decimal) into an integer; leave anything else to pydantic."""
    match = SIZE.match(value.strip()) if isinstance(value, str) else None
    return scaled(match, BYTES) if match else value


def scaled(match: re.Match[str], multiples: dict[str, int]) -> int:
    """The number that a match of COUNT or SIZE stands for."""
    if len(match[1]) > LONGEST:
        raise ValueError(f"a number of at most {LONGEST} digits is needed")
    return round(float(match[1]) * multiples[match[2]])


def count_of(value: object) -> object:
    """See `parse_count`; a text that is no count is refused here, where it is known what is meant."""
    count = parse_count(value)
    if isinstance(count, str):
        raise ValueError("a count such as 8000, 8k, 1.5M or 3B is needed")
    return count


def bytes_of(value: object) -> object:
    """See `parse_bytes` and `count_of`."""
    size = parse_bytes(value)
    if isinstance(size, str) and not size.isdecimal():
        raise ValueError("bytes such as 300MB or 1.5GB are needed")
    return size


# Pydantic writes bounds of a field with a validator of its own under its own names into a JSON schema, where
# no form looks for them.
BOUNDS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
Count = Annotated[int, BeforeValidator(count_of), Field(le=MOST)]
Bytes = Annotated[int, BeforeValidator(bytes_of), Field(le=MOST)]


def setting(default: Any, position: int, title: str, description: str, **bounds: Any) -> Any:
    """A pydantic field that carries what the Prefect form shows: title, description, order."""
    return Field(
        default, title=title, description=description, json_schema_extra={"position": position}, **bounds
    )


class Section(BaseModel):
    """Frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def no_truth_for_a_number(cls, value: object, field: ValidationInfo) -> object:
        """YAML reads a bare `yes` or `on` as true, which pydantic takes for the number 1."""
        annotation = cls.model_fields[field.field_name or ""].annotation
        if isinstance(value, bool) and annotation is not bool:
            raise ValueError("true and false are no value here")
        return value

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """As pydantic makes it, with every bound where a form looks for it."""
        schema = handler(core)
        own = handler.resolve_ref_schema(schema)
        own["properties"] = {name: bounded(field) for name, field in own.get("properties", {}).items()}
        return schema


def bounded(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of a field, and of what it may be, with bounds as JSON schema has them."""
    plain = {BOUNDS.get(name, name): value for name, value in schema.items()}
    return plain | ({"anyOf": [bounded(one) for one in plain["anyOf"]]} if "anyOf" in plain else {})
