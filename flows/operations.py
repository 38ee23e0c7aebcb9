"""What people do with a family that is built: one stage again, figures again, promotion, clearing up."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact
from pydantic import Field

from cascade.cards.markdown import rich_table
from cascade.family.again import of_evaluations, of_stage, recipe_of, require_same_sources, set_aside
from cascade.family.aliases import STABLE, alias_runs
from cascade.family.aliases import promote as move_stable
from cascade.family.build import default_cache
from cascade.family.graph import Graph
from cascade.family.index import damage_named, read_index
from cascade.family.space import collect
from cascade.recipe import Options
from cascade.storage.locations import open_location
from cascade.tables.space import space_table
from flows import events
from flows.credentials import credentials as lent
from flows.family import DEFAULTS, make
from flows.parameters import checked_options, run_name


@flow(name="rebuild-stage", flow_run_name=run_name, persist_result=False, validate_parameters=False)
def rebuild_stage(store: str, family: str, stage: str, options: Options = DEFAULTS) -> dict[str, Any]:
    """Make one stage again, from what is there; everything else is reused.

    What the stage had is set aside in `.replaced` folders. Until the stage is done, an alias that names this
    build has no such child.

    Args:
        store: Where the family is: a folder on the worker, or s3://bucket/prefix.
        family: Its name.
        stage: The stage's name.
        options: Where and how the build runs; none of it changes a result.

    Returns the family's index. Raises InputError when there is no such stage, or when parent or corpus are
    not those of the newest build any more.
    """
    return make_again(store, family, stage, checked_options(options))


@flow(name="evaluate-family", flow_run_name=run_name, persist_result=False, validate_parameters=False)
def evaluate_family(store: str, family: str, options: Options = DEFAULTS) -> dict[str, Any]:
    """Measure the newest build again, on this worker, and judge it anew by its gate.

    Args:
        store: Where the family is: a folder on the worker, or s3://bucket/prefix.
        family: Its name.
        options: Where and how the measurements run.

    Returns the family's index. Raises BelowGate as a build does.
    """
    return make_again(store, family, "", checked_options(options))


def make_again(store: str, family: str, stage: str, options: Options) -> dict[str, Any]:
    """Set aside a stage, or with "" all evaluations, and build what is missing then."""
    with lent(options.credentials):
        place = open_location(store)
        index = read_index(place / family)
        with damage_named(place / family):
            wanted = of_stage(index, stage) if stage else of_evaluations(index)
            recipe = recipe_of(index, place / family)

    def prepare(graph: Graph) -> None:
        require_same_sources(graph, index)
        for line in set_aside(wanted, place):
            get_run_logger().info(line)

    return make(recipe, store, options, prepare)


@flow(name="promote", flow_run_name=run_name, persist_result=False)
def promote(
    store: str, family: str, run: str = "", rollback: bool = False, credentials: str = ""
) -> dict[str, Any]:
    """Make a build of a family `stable` by hand, whatever its gate says, or take that back.

    Args:
        store: Where the family is: a folder on the worker, or s3://bucket/prefix.
        family: Its name.
        run: The build that becomes stable, such as family-20260301T020000-a1b2c3; the latest when empty.
        rollback: Go back to what was stable before; leave `run` empty.
        credentials: Name of a Prefect block of type Secret, as in the options of a build.

    Returns the alias.
    """
    place = open_location(store) / family
    with lent(credentials):
        before = alias_runs(place).get(STABLE)
        alias = move_stable(place, run, rollback)
    if alias["run"] != before:
        events.family_promoted(alias["index"], store, STABLE)
    get_run_logger().info(f"{STABLE} of {family}: {alias['run']}")
    return alias


@flow(name="collect-garbage", persist_result=False)
def collect_garbage(
    store: str,
    keep_days: Annotated[float, Field(ge=0)] = 30,
    delete: bool = False,
    cache: str = "",
    credentials: str = "",
) -> dict[str, Any]:
    """Say what no build of a store needs any more; with `delete` remove it.

    Args:
        store: A folder on the worker, or s3://bucket/prefix: the whole store, not one family.
        keep_days: What a build of so many days refers to stays.
        delete: Remove it; otherwise nothing is touched.
        cache: Scratch folder on the worker; ~/.cache/cascade when empty.
        credentials: Name of a Prefect block of type Secret, as in the options of a build.

    Returns how many things and bytes it is about.
    """
    now, scratch = time.time(), Path(cache or default_cache())
    with lent(credentials):
        found = collect(open_location(store), keep_days, scratch, delete=delete, now=now)
    table = space_table(found, now=now, deleted=delete, option="`delete`")
    create_markdown_artifact(rich_table(table), key="garbage", description=str(table.title))
    size = sum(thing.bytes for thing in found.waste) + sum(copy.bytes for copy in found.copies)
    things = len(found.waste) + len(found.copies)
    done = "removed" if delete else "would be removed; run it again with `delete`"
    get_run_logger().info(f"{things} things, {size / 1e6:,.1f} MB {done}; the artifact garbage lists them")
    return {"things": things, "bytes": size, "deleted": delete}
