"""Families built directly, without Prefect, and what of them has to be the same every time."""

from __future__ import annotations

import atexit
from contextlib import ExitStack, nullcontext
from functools import cache as once
from pathlib import Path
from typing import Any

from cascade.family.build import build, run_options
from cascade.family.index import read_index
from cascade.family.plan import plan_family
from cascade.family.runner import NodeHost
from cascade.recipe import Options, Recipe
from cascade.report import SILENT, Report
from cascade.storage.locations import Location, open_location


@once
def shared_host() -> NodeHost:
    """For builds of which nothing is killed, one after another: its process takes seconds to start, and ends
    with the tests' own, before Python takes the thread away that looks after it."""
    stack = ExitStack()
    atexit.register(stack.close)
    return stack.enter_context(NodeHost())


def build_directly(
    recipe: Recipe,
    store: str | Path,
    cache: Path,
    report: Report = SILENT,
    host: NodeHost | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Build without Prefect; the family's index. host: None for one of its own."""
    run = run_options(recipe, str(store), Options(cache=str(cache), **options))
    with nullcontext(host) if host else NodeHost() as nodes:
        return build(plan_family(recipe, cache), run, lambda job: nodes.run(job, report))


def digests(family: Location) -> dict[str, str]:
    """File of a stage's checkpoint -> sha256; what holds seconds and dates is left out."""
    return {
        f"{stage['name']}/{path}": (open_location(stage["checkpoint"]) / path).sha256()
        for stage in read_index(family)["stages"]
        for path in open_location(stage["checkpoint"]).walk()
        if path not in ("manifest.json", "steps.jsonl")
    }
