"""A pilot: recipes that differ in how children are taught, all on a small budget, side by side.

The literature disagrees on teacher, objective and mix (see the README), and which is right depends on parent,
corpus and size; so the question is asked of the family itself, before the whole budget is spent.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cascade.errors import InputError
from cascade.family.graph import Graph
from cascade.family.plan import plan_family
from cascade.quality import Gate
from cascade.recipe import Recipe, Stage
from cascade.storage.locations import open_location
from cascade.trainings import Extend, Rope

Json = dict[str, Any]
TABLE = "pilot.json"


def pilot_root(recipes: Sequence[Recipe], store: str) -> str:
    """Where a pilot is stored: a store of its own within the store."""
    return (open_location(store) / f"{recipes[0].family}-pilot").uri


def pilot_recipe(recipe: Recipe, number: int, tokens: int) -> Recipe:
    """The recipe with `tokens` tokens a training, and no race, controls or long-context stages; the family
    policy-NUMBER."""

    def small(stage: Stage) -> Stage:
        distill = stage.distill.model_copy(update={"tokens": tokens})
        prune = stage.prune.model_copy(update={"candidates": 1})
        own = min(tokens, stage.on_policy.tokens)
        on_policy = stage.on_policy.model_copy(update={"tokens": own})
        update: Json = {"distill": distill, "prune": prune, "on_policy": on_policy, "extend": Extend()}
        # A small budget keeps no limits that are meant for the whole one.
        update["gate"] = Gate()
        return stage.model_copy(update=update)

    correction = min(tokens, recipe.teacher.correction_tokens)
    return recipe.model_copy(
        update={
            "family": f"policy-{number}",
            "stages": tuple(small(stage) for stage in recipe.stages),
            "teacher": recipe.teacher.model_copy(update={"correction_tokens": correction, "rope": Rope()}),
            "controls": (),
        }
    )


def pilot(
    recipes: Sequence[Recipe],
    tokens: int,
    store: str,
    cache: Path,
    build: Callable[[Graph, str], Json],
    device: str = "",
) -> Json:
    """Build every recipe's pilot and write the table; returns it.

    build: makes a planned family in a store and returns its index. device: a torch device that latencies are
    measured on; chosen when empty. Raises InputError for fewer than two
    recipes, and for recipes whose children do not compare: another parent, corpus, seed or shape.
    """
    if len(recipes) < 2:
        raise InputError(
            "a pilot compares two or more recipes",
            value=len(recipes),
            where="RECIPE",
            remedy="give one recipe for each policy",
        )
    root = pilot_root(recipes, store)
    graphs = [
        plan_family(pilot_recipe(recipe, number, tokens), cache, device)
        for number, recipe in enumerate(recipes, 1)
    ]
    for number, graph in enumerate(graphs[1:], 2):
        require_comparable(graphs[0], graph, number)
    differing = differences([graph.recipe for graph in graphs])
    policies = []
    for graph, differs in zip(graphs, differing, strict=True):
        index = build(graph, root)
        policies.append(
            {
                "family": graph.recipe.family,
                "differs": differs,
                "flops": index["ledger"]["family"]["flops"],
                "teacher_flops": index["ledger"]["family"]["teacher_flops"],
                "stages": index["stages"],
            }
        )
    table = {"tokens": tokens, "seed": recipes[0].seed, "store": root, "policies": policies}
    (open_location(root) / TABLE).write_bytes((json.dumps(table, indent=2) + "\n").encode())
    return table


def require_comparable(first: Graph, other: Graph, number: int) -> None:
    """Raise InputError unless two families have one parent and corpus, and children of the same shapes."""
    pairs = {
        "parent": (first.parent.key, other.parent.key),
        "corpus or seed": (first.corpus.key, other.corpus.key),
        "shapes": (shapes(first), shapes(other)),
    }
    for name, (ours, theirs) in pairs.items():
        if ours != theirs:
            raise InputError(
                f"a pilot compares how the same children are taught; recipe {number} has other {name}",
                value=f"{ours} and {theirs}",
                where=f"recipes 1 and {number}",
                remedy="change only the teacher and what is in `distill`",
            )


def shapes(graph: Graph) -> list[Json]:
    """Name and shape of every child."""
    return [{"name": stage.stage.name, **stage.architecture.record()} for stage in graph.stages]


def differences(recipes: Sequence[Recipe]) -> list[Json]:
    """For every recipe the keys, as dotted paths, in which not all are equal, with its own values."""
    flat = [flattened(recipe.model_dump(mode="json", exclude={"family"})) for recipe in recipes]
    names = dict.fromkeys(name for one in flat for name in one)
    differing = [name for name in names if any(one.get(name) != flat[0].get(name) for one in flat)]
    return [{name: one.get(name) for name in differing} for one in flat]


def flattened(tree: object, path: str = "") -> Json:
    """`{"a": [{"b": 1}]}` -> `{"a.0.b": 1}`."""
    pairs = list(tree.items()) if isinstance(tree, dict) else []
    if isinstance(tree, list):
        pairs = list(enumerate(tree))
    if not pairs:
        return {path: tree}
    inner = [flattened(value, f"{path}.{name}" if path else str(name)) for name, value in pairs]
    return {name: value for one in inner for name, value in one.items()}
