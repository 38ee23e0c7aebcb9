"""Keys of recipes that use none of the newer dials: what is stored under them stays what it was."""

from __future__ import annotations

from dataclasses import replace

from cascade.family.graph import StagePlan
from cascade.family.layout import build_graph
from cascade.family.teachers import Parent
from cascade.pruning.repair import Repair
from cascade.recipe import Recipe
from cascade.recipe_files import load_recipe
from tests.unit.planning.shapes import TINY

# Computed at commit e25f06d, before teachers, students and controls could be chosen.
QUICKSTART = {
    "parent/corpus": "f23e2d8e0fb0",
    "parent/parent": "9746a5597087",
    "parent/signals": "fb135ff7d817",
    "parent/evaluated": "8167d558a875",
    "r85/importance": "81b9c682ad75",
    "r85/pruned": "99661bbacca7",
    "r85/distilled": "33cdb49e576b",
    "r85/evaluated": "de31f97b03c9",
    "r70/importance": "6f8c25dd56be",
    "r70/pruned": "d4ddb6da1294",
    "r70/distilled": "e0c2e033b412",
    "r70/evaluated": "423dc0a35c1a",
    "r55/importance": "9fa05d039627",
    "r55/pruned": "0620e53679ef",
    "r55/distilled": "794536049107",
    "r55/evaluated": "c18d15894475",
}
SHAPES = [replace(TINY, layers=layers) for layers in (3, 2, 1)]


def old_quickstart() -> Recipe:
    """The packaged recipe with the dials that it had then."""
    recipe = load_recipe("quickstart")
    stages = []
    for stage in recipe.stages:
        prune = stage.prune.model_copy(update={"calibration_tokens": 4000, "repair": Repair.NONE})
        stages.append(stage.model_copy(update={"prune": prune}))
    joined = recipe.corpus.model_copy(update={"separate_documents": False})
    return recipe.model_copy(update={"stages": tuple(stages), "corpus": joined})


def test_an_old_recipe_finds_its_artifacts() -> None:
    graph = build_graph(
        old_quickstart(),
        Parent("p", "a" * 64, TINY),
        lambda winners: tuple(StagePlan((shape,), ()) for shape in SHAPES),
        ("b" * 64,),
    )
    assert {node.name: node.key[:12] for node in graph} == QUICKSTART
