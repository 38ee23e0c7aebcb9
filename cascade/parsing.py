"""YAML and JSON that somebody else wrote: whatever is wrong with it is a ValueError in a person's words."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

import yaml

# A recipe is ten deep. What is deeper than this was not written by hand, and would exhaust the stack.
DEEPEST = 50
DEEPEST_JSON = 200
# What opens and closes values of JSON, and strings, inside which nothing does.
STRUCTURE = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?|[][{}]', re.DOTALL)
# Bytes. A thousand stages take a third of it.
LARGEST = 1 << 20
# A few lines of aliases of aliases can stand for more values than any memory holds.
MOST_NODES = 100_000


class Loader(yaml.SafeLoader):
    """YAML without what loses a person's values in silence, a key that is there twice, and without what ends
    in a traceback or takes all memory: nesting and aliases without end, dates and numbers that are none."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = 0
        self.counts: dict[int, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """As in YAML, down to a depth."""
        self.depth += 1
        if self.depth > DEEPEST:
            raise yaml.MarkedYAMLError(
                problem=f"more than {DEEPEST} levels deep", problem_mark=self.peek_event().start_mark
            )
        node = super().compose_node(parent, index)
        self.depth -= 1
        if node and self.count(node) > MOST_NODES:
            raise yaml.MarkedYAMLError(
                problem=f"more than {MOST_NODES:,} values once every alias is written out",
                problem_mark=node.start_mark,
            )
        return node

    def count(self, node: yaml.Node) -> int:
        """Values in a node as if none was an alias; one inside of itself counts once."""
        if id(node) not in self.counts and isinstance(node, yaml.CollectionNode):
            inner = itertools.chain.from_iterable(
                part if isinstance(part, tuple) else (part,) for part in node.value
            )
            self.counts[id(node)] = 1 + sum(self.counts.get(id(part), 1) for part in inner)
        return self.counts.get(id(node), 1)

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """As in YAML, which keeps the last of equal keys."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            name = key.tag, key.value if isinstance(key, yaml.ScalarNode) else id(key)
            if name in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value!r} is there twice", problem_mark=key.start_mark
                )
            seen.add(name)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """As in YAML; a date or a number that is none has a line as well."""
        try:
            return super().construct_object(node, deep=deep)
        except ValueError as error:
            raise yaml.MarkedYAMLError(problem=str(error), problem_mark=node.start_mark) from error


def parse_yaml(data: bytes) -> object:
    """The tree in a YAML document; ValueError says what is wrong and, where it can, in which line."""
    if len(data) > LARGEST:
        raise ValueError(f"more than {LARGEST:,} bytes")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(f"line {line} is not UTF-8 (byte {data[error.start]:#04x})") from error
    try:
        return yaml.load(text, Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = error.problem or error.context or "not YAML"
        raise ValueError(place + problem.removeprefix("but ")) from error
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise ValueError(f"line {line}: the character {error.character:#06x} is not allowed") from error


def parse_json(data: bytes, *, finite: bool = False) -> Any:
    """The value in a JSON text; ValueError for anything else. finite: NaN and Infinity are refused too."""
    require_shallow(data)
    return json.loads(data, parse_constant=_refuse if finite else None)


def require_shallow(text: bytes) -> None:
    """ValueError for JSON that is deeper than what any program of ours or of others writes."""
    if text.count(b"[") + text.count(b"{") <= DEEPEST_JSON:
        return
    depth = 0
    for found in STRUCTURE.finditer(text):
        first = found[0][:1]
        depth += (first in b"[{") - (first in b"]}")
        if depth > DEEPEST_JSON:
            raise ValueError(f"it is nested more than {DEEPEST_JSON} deep")


def _refuse(name: str) -> float:
    raise ValueError(f"{name} is no number")
