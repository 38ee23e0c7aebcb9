"""JSON schemas of forms."""

from __future__ import annotations

from typing import Any


def nodes(schema: Any) -> list[dict[str, Any]]:
    """Every object of a JSON schema."""
    children = schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else []
    return ([schema] if isinstance(schema, dict) else []) + [
        node for child in children for node in nodes(child)
    ]
