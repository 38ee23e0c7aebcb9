"""The command line: a thin shell over public functions.

Exit codes: 0 done, 1 the work failed, 2 the input is wrong, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from cascade.console import (
    ConsoleReport,
    Json,
    control_tables,
    extended_tables,
    family_table,
    ledger_table,
    pilot_tables,
    race_tables,
    record_table,
)
from cascade.errors import CascadeError, InputError
from cascade.fields import parse_count
from cascade.recipe import Options, Recipe, load_recipe

if TYPE_CHECKING:
    # The rest of the library takes seconds to load, so each command imports what it needs.
    from cascade.family.graph import Graph
    from cascade.family.job import RunOptions

# What shells report of a program that Ctrl-C or a kill ended.
INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM

app = typer.Typer(
    help="A family of smaller language models from one parent.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A YAML file or a packaged recipe: quickstart.")
]
Uri = Annotated[str, typer.Argument(metavar="URI", help="A folder or s3://bucket/prefix.")]
Store = Annotated[
    str,
    typer.Option("--store", envvar="CASCADE_STORE", metavar="URI", help="A folder or s3://bucket/prefix."),
]
Cache = Annotated[
    str, typer.Option("--cache", envvar="CASCADE_CACHE", help="Scratch folder; ~/.cache/cascade when empty.")
]
Device = Annotated[str, typer.Option("--device", help="A torch device; chosen when empty.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


@app.command()
def plan(recipe: RecipeName, device: Device = "", cache: Cache = "") -> None:
    """Print every stage's architecture, parameters, memory and cost; train nothing, store nothing."""
    from cascade.family.build import default_cache, plan_family
    from cascade.family.forecast import machine_rate, plan_table, ranking_table

    graph = plan_family(load_recipe(recipe), Path(cache or default_cache()), device)
    output().print(plan_table(graph, machine_rate()))
    output().print(ranking_table(graph))


@app.command()
def build(
    recipe: RecipeName,
    store: Store = "families",
    direct: Annotated[bool, typer.Option("--direct", help="Without Prefect.")] = False,
    device: Device = "",
    checkpoint_seconds: Annotated[
        float, typer.Option("--checkpoint-seconds", min=0.0, help="Seconds between training snapshots.")
    ] = 60.0,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory in training, for more time.")
    ] = False,
    cache: Cache = "",
) -> None:
    """Build the family; what the store has already is reused, and an interrupted training goes on."""
    from cascade.family.build import plan_family, run_options
    from cascade.storage.locations import check_store, open_location

    tree = load_recipe(recipe)
    options = Options(
        device=device,
        checkpoint_seconds=checkpoint_seconds,
        cache=cache,
        gradient_checkpointing=gradient_checkpointing,
    )
    run = run_options(tree, store, options)
    # Wrong input is found here, in seconds, before a Prefect server starts.
    check_store(open_location(store))
    graph = plan_family(tree, Path(run.cache), device)
    with ConsoleReport(Console(stderr=True)) as report:
        try:
            index = (
                build_direct(graph, run, report) if direct else build_in_prefect(tree, store, options, report)
            )
        except KeyboardInterrupt:
            report.log("interrupted; run the same command to go on")
            raise typer.Exit(INTERRUPTED) from None
    print_family(index)
    for child in (*index["stages"], *index["extended"]):
        output().print(f"{child['name']}: {child['checkpoint']}", soft_wrap=True, highlight=False)


def build_direct(graph: Graph, run: RunOptions, report: ConsoleReport) -> Json:
    """Build without an orchestrator, one node's process after another."""
    from cascade.family.build import build
    from cascade.family.runner import NodeHost

    with NodeHost() as host:
        return build(graph, run, lambda job: host.run(job, report.start(job.name)))


def build_in_prefect(recipe: Recipe, store: str, options: Options, report: ConsoleReport) -> Json:
    """Build through the Prefect flow; the report shows here what the flow also logs there."""
    # The report prints for people; Prefect's own console lines would say everything twice.
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    from flows.family import build_family
    from flows.publish import listener

    with listener(report):
        return build_family(recipe=recipe, store=store, options=options)


@app.command()
def pilot(
    recipes: Annotated[list[str], typer.Argument(metavar="RECIPE...", help="Two or more recipes.")],
    tokens: Annotated[str, typer.Option("--tokens", help="Training tokens of every stage, such as 50k.")],
    store: Store = "families",
    device: Device = "",
    cache: Cache = "",
) -> None:
    """Teach the same children by two or more recipes on a small budget, and print what came out."""
    from cascade.family.build import run_options
    from cascade.family.pilot import pilot as run_pilot
    from cascade.storage.locations import check_store, open_location

    check_store(open_location(store))
    trees = [load_recipe(name) for name in recipes]
    options = Options(device=device, cache=cache)
    with ConsoleReport(Console(stderr=True)) as report:

        def make(graph: Graph, root: str) -> Json:
            return build_direct(graph, run_options(graph.recipe, root, options), report)

        place = Path(run_options(trees[0], store, options).cache)
        table = run_pilot(trees, count_of(tokens), store, place, make)
    for shown in pilot_tables(table):
        output().print(shown)
    output().print(f"stored in {table['store']}", soft_wrap=True, highlight=False)


def count_of(text: str) -> int:
    """Tokens as people write them; raises InputError for anything else."""
    count = parse_count(text)
    if not isinstance(count, int) or count < 1:
        raise InputError(
            "a count such as 8000, 8k, 1.5M or 3B is needed", value=text, where="--tokens", remedy="give one"
        )
    return count


@app.command()
def show(
    uri: Uri,
    as_json: AsJson = False,
    ledger: Annotated[
        bool, typer.Option("--ledger", help="Of a family: what it cost, node by node.")
    ] = False,
) -> None:
    """Show a family, or one artifact, with its lineage, figures and cost."""
    from cascade.family.index import read_index
    from cascade.storage.artifacts import read_manifest
    from cascade.storage.locations import open_location

    location = open_location(uri)
    manifest = read_manifest(location)
    record = manifest.model_dump(mode="json") if manifest else read_index(location)
    if as_json:
        typer.echo(json.dumps(record, indent=2))
    elif ledger:
        require_ledger(uri, record)
        output().print(ledger_table(record))
    elif manifest:
        output().print(record_table(uri, record))
    else:
        print_family(record)


def require_ledger(uri: str, record: Json) -> None:
    """Raise InputError for an artifact, and for a family of a version that kept no ledger."""
    if "ledger" not in record:
        raise InputError(
            "there is no ledger here",
            value=uri,
            where="--ledger",
            remedy="give <root>/<family>; a family built by an older version gets one by `cascade build`",
        )


@app.command()
def verify(uri: Uri) -> None:
    """Hash every file again and compare it with its manifest; exit 1 and name what is wrong."""
    from cascade.family.audit import audit
    from cascade.storage.locations import open_location

    report = audit(open_location(uri))
    for problem in report.problems:
        typer.echo(problem)
    typer.echo(f"{report.artifacts} artifacts, {report.files} files, problems: {len(report.problems)}")
    if report.problems:
        raise typer.Exit(1)


def print_family(index: Json) -> None:
    """The family's table, one for each race, one for long contexts, and one for the controls."""
    tables = (*race_tables(index), *extended_tables(index), *control_tables(index))
    for table in (family_table(index), *tables):
        output().print(table)


def output() -> Console:
    """Standard output; a table in a pipe keeps its columns instead of folding at 80 characters."""
    console = Console()
    return console if console.is_terminal else Console(width=160)


def main() -> None:
    """The command `cascade`: every error of ours becomes its four parts and its exit code."""
    # Dying at once would leave Prefect's embedded server behind, and the trainer without its time to save.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    try:
        app()
    except CascadeError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
