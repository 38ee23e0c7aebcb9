"""Parts of a built family are made again: what they had is set aside first, and nothing is deleted."""

from __future__ import annotations

from collections.abc import Collection

from cascade.errors import InputError
from cascade.family.addresses import INDEX
from cascade.family.graph import Graph
from cascade.family.index import Json
from cascade.family.places import REPLACED, named
from cascade.family.repair import alone, move
from cascade.kinds import SHARED, Kind
from cascade.recipe import Recipe
from cascade.recipe_files import validate_recipe
from cascade.storage.artifacts import read_manifest
from cascade.storage.locations import Location

EVALUATIONS = (Kind.EVALUATED, Kind.EVALUATED_LONG)


def recipe_of(index: Json, family: Location) -> Recipe:
    """The recipe of a family's newest build; raises InputError for one that this version does not take."""
    return validate_recipe(index["recipe"], where=f"`recipe` in {family}/{INDEX}")


def of_stage(index: Json, stage: str) -> dict[str, str]:
    """The places of a stage's own artifacts, and which run made each; what families share stays.

    Raises InputError when there is no such stage.
    """
    stages = [row["name"] for row in (*index["stages"], *index.get("controls", []))]
    if stage not in stages:
        raise InputError(
            "the family has no such stage",
            value=stage,
            where=f"family {index['family']}",
            remedy=f"give one of: {', '.join(stages)}",
        )
    return places(index, [kind for kind in Kind if kind not in SHARED], stage)


def of_evaluations(index: Json) -> dict[str, str]:
    """The places of everything that was measured, the parent's figures too, and which run made each."""
    return places(index, EVALUATIONS)


def places(index: Json, kinds: Collection[Kind], stage: str = "") -> dict[str, str]:
    """Of the artifacts of these kinds, of one stage or of all: place -> the run that made it."""
    rows = [(*row["node"].rpartition("/")[::2], row) for row in index["artifacts"]]
    chosen = [row for owner, kind, row in rows if kind in kinds and stage in ("", owner)]
    return {place: row["run"] for row in chosen for place in named(row["uri"])}


def require_same_sources(graph: Graph, index: Json) -> None:
    """Raise InputError if the parent, the corpus, or another model that the recipe names is not what the
    newest build was made from: then it would not be a part of that family."""
    known = {row["key"] for row in index["artifacts"]}
    changed = [node.name for node in graph if not node.inputs and node.key not in known]
    if changed:
        raise InputError(
            "the family's sources are not those of its newest build any more, or this is another version",
            value=", ".join(changed),
            where=f"family {index['family']}, build {index['run']}",
            remedy="run build-family with the recipe: it makes what depends on the change",
        )


def set_aside(wanted: dict[str, str], store: Location) -> list[str]:
    """Move artifacts to `.replaced` beside them; a line for each one.

    wanted: place -> the run that made it. What another run has made there since is the work of a rebuild that
    was cut off, or starts again from its top, as it does after an approval: it stays.
    """
    lines = []
    for place, run in sorted(wanted.items()):
        with alone(store / place):
            manifest = read_manifest(store / place)
            if manifest and manifest.run == run:
                lines.append(f"{store / place} -> {move(store / place, REPLACED)}")
    return lines
