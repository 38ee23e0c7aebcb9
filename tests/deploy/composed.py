"""The compose file as compose reads it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "deploy" / "compose.yaml").read_text()
EXAMPLE = dict(
    line.split("=", 1)
    for line in (ROOT / "deploy" / ".env.example").read_text().splitlines()
    if line and not line.startswith("#")
)
SECRETS = {"POSTGRES_PASSWORD": "a/pass@word", "STORE_SECRET_KEY": "a secret"}
# A default may hold braces in pairs, as Compose reads it.
VARIABLE = re.compile(r"\$\{(\w+)(?:(:?[-?])((?:[^{}]|\{\w+\})*))?\}")


def composed(environment: dict[str, str]) -> dict[str, Any]:
    """The file as compose reads it: anchors merged, variables filled in; KeyError for one that is missing."""

    def value(match: re.Match[str]) -> str:
        name, kind, text = match.groups()
        if environment.get(name):
            return environment[name]
        if kind == "-" and name in environment:
            return ""
        if kind in ("-", ":-"):
            return text
        raise KeyError(name)

    tree: dict[str, Any] = json.loads(VARIABLE.sub(value, json.dumps(yaml.safe_load(TEXT))))
    return tree


SERVICES = composed(SECRETS)["services"]


def seconds(text: str) -> float:
    """A duration such as 60s."""
    return float(text.removesuffix("s"))
