"""The command line: a thin shell over public functions.

Exit codes: 0 done, 1 the work failed, 2 the input is wrong, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console

from cascade import __version__
from cascade.collector import collect_seldom
from cascade.console import ConsoleReport
from cascade.errors import BelowGate, CascadeError, InputError
from cascade.fields import parse_count
from cascade.recipe import Options, Recipe
from cascade.recipe_files import load_recipe
from cascade.tables.ledger import ledger_table
from cascade.tables.pilot import pilot_tables
from cascade.tables.printed import output, print_built, print_family, print_lines
from cascade.tables.record import record_table

if TYPE_CHECKING:
    # The rest of the library takes seconds to load: each command imports what it needs, and first of all
    # refuses a wrong recipe.
    from cascade.family.graph import Graph
    from cascade.family.index import Json
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
    str,
    typer.Argument(
        metavar="RECIPE", help="A YAML file, here or in a bucket, or a packaged recipe: quickstart, smoke."
    ),
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


def print_version(wanted: bool) -> None:
    """Print the version and leave, if that is what was asked."""
    if wanted:
        typer.echo(f"cascade {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """What comes before a command."""


@app.command()
def plan(recipe: RecipeName, device: Device = "", cache: Cache = "") -> None:
    """Print every stage's architecture, parameters, memory and cost; train nothing, store nothing."""
    tree = load_recipe(recipe)
    from cascade.family.build import default_cache
    from cascade.family.forecast import machine_rate
    from cascade.family.plan import plan_family
    from cascade.tables.plan import plan_table, ranking_table

    graph = plan_family(tree, Path(cache or default_cache()), device)
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
    compile: Annotated[
        bool, typer.Option("--compile", help="torch.compile in training: a slow start, then faster steps.")
    ] = False,
    cache: Cache = "",
) -> None:
    """Build the family; what the store has already is reused, and an interrupted training goes on."""
    tree = load_recipe(recipe)
    from cascade.distillation.compiled import require_compiler
    from cascade.family.build import run_options
    from cascade.family.index import read_index
    from cascade.family.plan import plan_family
    from cascade.family.workplace import chosen_device
    from cascade.storage.locations import check_store, open_location

    options = Options(
        device=device,
        checkpoint_seconds=checkpoint_seconds,
        cache=cache,
        gradient_checkpointing=gradient_checkpointing,
        compile=compile,
    )
    run, family = run_options(tree, store, options), open_location(store) / tree.family
    # Wrong input is found here, in seconds, before a Prefect server starts.
    check_store(open_location(store))
    if compile:
        require_compiler(chosen_device(device))
    graph = plan_family(tree, Path(run.cache), device)
    with ConsoleReport(Console(stderr=True)) as report:
        try:
            index = (
                build_and_settle(graph, run, report)
                if direct
                else build_in_prefect(tree, store, options, report)
            )
        except KeyboardInterrupt:
            report.log("interrupted; run the same command to go on")
            raise typer.Exit(INTERRUPTED) from None
        except BelowGate:
            print_built(read_index(family), family.uri)
            raise
    print_built(index, family.uri)


def build_and_settle(graph: Graph, run: RunOptions, report: ConsoleReport) -> Json:
    """Build without an orchestrator, and move the aliases as the flow does."""
    from cascade.family.aliases import held_line, require_gate, settle
    from cascade.storage.locations import open_location

    index, store = build_direct(graph, run, report), open_location(run.store)
    settled = settle(index, store)
    if line := held_line(settled, store):
        report.log(line)
    require_gate(settled, store)
    return index


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
    trees = [load_recipe(name) for name in recipes]
    from cascade.family.build import run_options
    from cascade.family.pilot import pilot as run_pilot
    from cascade.storage.locations import check_store, open_location

    check_store(open_location(store))
    options = Options(device=device, cache=cache)
    with ConsoleReport(Console(stderr=True)) as report:

        def make(graph: Graph, root: str) -> Json:
            return build_direct(graph, run_options(graph.recipe, root, options), report)

        place = Path(run_options(trees[0], store, options).cache)
        table = run_pilot(trees, count_of(tokens), store, place, make, device)
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
    from cascade.family.addresses import record_folder
    from cascade.family.aliases import alias_runs
    from cascade.family.index import damage_named, read_index
    from cascade.storage.artifacts import read_manifest
    from cascade.storage.locations import open_location

    location = record_folder(open_location(uri))
    manifest = read_manifest(location)
    aliases = {} if manifest else alias_runs(location)
    record = manifest.model_dump(mode="json") if manifest else read_index(location) | {"aliases": aliases}
    if as_json:
        typer.echo(json.dumps(record, indent=2))
    elif ledger:
        require_ledger(uri, record)
        with damage_named(location):
            output().print(ledger_table(record))
    elif manifest:
        output().print(record_table(uri, record))
    else:
        with damage_named(location):
            print_family(record)
        print_lines(aliases)


@app.command()
def promote(
    uri: Annotated[str, typer.Argument(metavar="URI", help="A family: <root>/<family>.")],
    run: Annotated[
        str, typer.Option("--run", help="The build that becomes stable; the latest when empty.")
    ] = "",
    rollback: Annotated[bool, typer.Option("--rollback", help="Go back to what was stable before.")] = False,
) -> None:
    """Make a build of a family `stable` by hand, whatever its gate says, or take that back."""
    from cascade.family.addresses import record_folder
    from cascade.family.aliases import alias_runs
    from cascade.family.aliases import promote as move_stable
    from cascade.storage.locations import open_location

    family = record_folder(open_location(uri))
    move_stable(family, run, rollback)
    print_lines(alias_runs(family))


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
        if report.damaged or report.indexes:
            typer.echo(f"`cascade repair {uri}` sets aside what is damaged")
        typer.echo("the next build makes again what is not there")
        raise typer.Exit(1)


@app.command()
def repair(uri: Uri) -> None:
    """Set damaged artifacts aside, so that the next build makes them again; delete nothing."""
    from cascade.family.repair import repair as set_aside
    from cascade.storage.locations import open_location

    report = set_aside(open_location(uri))
    found = report.found
    for line in (*found.problems, *report.moved, *report.absent, *report.left):
        typer.echo(line)
    checked = f"{found.artifacts} artifacts, {found.files} files"
    if not found.problems:
        typer.echo(f"{checked}: nothing is damaged")
        return
    typer.echo(f"{checked}, set aside: {len(report.moved)}, left: {len(report.left)}")
    if report.left:
        raise typer.Exit(1)


@app.command()
def gc(
    uri: Annotated[str, typer.Argument(metavar="URI", help="A store: a folder or s3://bucket/prefix.")],
    keep_days: Annotated[
        float, typer.Option("--keep-days", min=0.0, help="What a build of so many days refers to stays.")
    ] = 30.0,
    delete: Annotated[bool, typer.Option("--delete", help="Remove it; without, only say what.")] = False,
    cache: Cache = "",
) -> None:
    """Say what no build needs any more, in a store and in this machine's cache; with --delete remove it."""
    from cascade.family.build import default_cache
    from cascade.family.space import collect
    from cascade.storage.locations import open_location
    from cascade.tables.space import space_table

    now = time.time()
    found = collect(open_location(uri), keep_days, Path(cache or default_cache()), delete=delete, now=now)
    output().print(space_table(found, now=now, deleted=delete))


@app.command()
def up(
    home: Annotated[
        str, typer.Option("--home", envvar="CASCADE_HOME", help="Folder of the stack; ~/.cascade when empty.")
    ] = "",
    store: Annotated[
        str,
        typer.Option("--store", metavar="URI", help="A store of your own; one is started when empty."),
    ] = "",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Of the Prefect UI; 0: 4200, or any free one.")
    ] = 0,
    store_port: Annotated[
        int, typer.Option("--store-port", min=0, max=55535, help="Of the store; 0: 8333, or any free one.")
    ] = 0,
) -> None:
    """Start Prefect, a store and a worker here, with all deployments registered; Ctrl-C ends them."""
    from cascade.stack.home import default_home
    from cascade.stack.up import Wishes
    from cascade.stack.up import up as start

    try:
        start(Wishes(Path(home) if home else default_home(), store, port, store_port), typer.echo)
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None


def main() -> None:
    """The command `cascade`: every error of ours becomes its four parts and its exit code."""
    collect_seldom()
    # Dying at once would leave Prefect's embedded server behind, and the trainer without its time to save.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    try:
        app()
    except CascadeError as error:
        fail(error)
    except OSError as error:
        from cascade.storage.faults import full, not_a_name

        # A file that a library writes, outside of every store; a path that nothing had looked at before.
        fault = full(error, tempfile.gettempdir()) or not_a_name(error, "command line")
        if fault is None:
            raise
        fail(fault)


def fail(error: CascadeError) -> NoReturn:
    """Print its four parts and end with its exit code."""
    typer.echo(f"error: {error}", err=True)
    sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
