"""The graph of the tiny family, with two stages of known shapes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from cascade.family.graph import Graph, StagePlan
from cascade.family.layout import build_graph
from cascade.family.teachers import Parent
from cascade.recipe import Recipe
from tests.tiny_family import tiny_tree
from tests.unit.planning.shapes import TINY

PLANS = (replace(TINY, layers=3), replace(TINY, layers=2))


def graph(
    fingerprint: str = "a" * 64, source: str = "b" * 64, parent: str = "parent", **changes: Any
) -> Graph:
    tree = tiny_tree(Path("parent"), Path("corpus.jsonl")) | changes
    recipe = Recipe.model_validate(tree)
    return build_graph(recipe, Parent(parent, fingerprint, TINY), planned, (source,))


def planned(winners: dict[str, int]) -> tuple[StagePlan, ...]:
    return tuple(StagePlan((shape,), ()) for shape in PLANS)
