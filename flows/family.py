"""The flow that builds a family; trigger it from the Prefect UI, the command line or a schedule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger

from cascade.family.build import build, plan_family, run_options
from cascade.family.job import Job
from cascade.family.runner import Outcome, made_by
from cascade.recipe import Options, Recipe
from flows import tasks
from flows.publish import publish_index

DEFAULTS = Options()


@flow(name="build-family", flow_run_name="{recipe.family}", persist_result=False, log_prints=False)
def build_family(recipe: Recipe, store: str, options: Options = DEFAULTS) -> dict[str, Any]:
    """Build a family of smaller models from one parent.

    recipe: the parent, the corpus, and how far each child is cut and how long it is taught.
    store: a folder or s3://bucket/prefix; credentials come from the worker's environment.
    options: where and how the build runs; none of it changes a result.
    Returns the family's index, which is also stored as family.json.
    """
    run = run_options(recipe, store, options)
    graph = plan_family(recipe, Path(run.cache), run.device)
    with tasks.hosting():
        index = build(graph, run, run_as_task, publish_index)
    get_run_logger().info(
        f"the family is at {store}/{recipe.family}; show it with: cascade show {store}/{recipe.family}"
    )
    return index


def run_as_task(job: Job) -> Outcome:
    """Run a job as a task, called directly: a submitted task's thread never sees a cancel."""
    state = tasks.run_node(job.name, job.dump())
    return Outcome(made_by(job), reused=state.name == tasks.REUSED)
