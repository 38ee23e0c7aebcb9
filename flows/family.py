"""The flow that builds a family; trigger it from the Prefect UI, the command line or a schedule."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger

from cascade.family.aliases import STABLE, Settled, held_line, require_gate, settle
from cascade.family.build import build, run_options
from cascade.family.graph import Graph
from cascade.family.index import Json
from cascade.family.job import Job
from cascade.family.plan import plan_family
from cascade.family.runner import Outcome, made_by
from cascade.recipe import Options, Recipe
from cascade.storage.locations import Location, open_location
from flows import events, tasks
from flows.approval import Approvals, require_deployment
from flows.credentials import credentials
from flows.parameters import checked_options, checked_recipe, run_name
from flows.publish import log_ending, publish_card, waits_shown

DEFAULTS = Options()


@flow(name="build-family", flow_run_name=run_name, persist_result=False, validate_parameters=False)
def build_family(recipe: Recipe, store: str, options: Options = DEFAULTS) -> dict[str, Any]:
    """Build a family of smaller models from one parent, or what is missing of it.

    Args:
        recipe: The parent, the corpus, and how far each child is cut and how long it is taught.
        store: Where everything is kept: a folder on the worker, or s3://bucket/prefix.
        options: Where and how the build runs; none of it changes a result.

    Returns the family's index, which is also stored as family.json. Raises BelowGate, when all of it is
    built and stored, if a stage does not keep the limits of its gate.
    """
    return make(checked_recipe(recipe), store, checked_options(options))


def make(
    recipe: Recipe, store: str, options: Options, prepare: Callable[[Graph], None] = lambda graph: None
) -> Json:
    """Plan and build a family, and move its aliases. prepare: what comes between the plan and the build."""
    require_deployment(options.approval)
    # What is done outside of tasks (planning, the index) is not retried by Prefect: the store's requests are.
    with credentials(options.credentials), waits_shown(), tasks.hosting():
        run = run_options(recipe, store, options)
        graph = plan_family(recipe, Path(run.cache), run.device)
        prepare(graph)
        jobs = Approvals(options.approval, graph, run_as_task)

        def on_index(index: Json) -> None:
            jobs.index = index

        index = build(graph, run, jobs, on_index, lambda card: publish_card(card, store, run.run))
        events.family_completed(index, store)
        place = open_location(store)
        settled = settle(index, place)
        report(settled, place)
        log_ending(index, store)
        require_gate(settled, place)
    return index


def run_as_task(job: Job) -> Outcome:
    """Run a job as a task, called directly: a submitted task's thread never sees a cancel."""
    state = tasks.run_node(job.name, job.dump())
    return Outcome(made_by(job), reused=state.name == tasks.REUSED)


def report(settled: Settled, store: Location) -> None:
    """Say in the log, and by events, what became of the aliases."""
    index = settled.index
    for stage in index["stages"]:
        if rows := settled.shortfalls.get(stage["name"]):
            events.stage_rejected(index["family"], {**stage, "shortfalls": rows}, store.uri, index["run"])
    # A rebuild that found the same children promotes nothing: an automation that builds when a family is
    # promoted must come to an end.
    if settled.promoted:
        events.family_promoted(index, store.uri, STABLE)
    get_run_logger().info(f"{' and '.join(settled.moved)} of {index['family']}: {index['run']}")
    if line := held_line(settled, store):
        get_run_logger().warning(line)
