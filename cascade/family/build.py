"""From a graph to a stored family, without an orchestrator."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path

from cascade.data.corpus import require_tokens
from cascade.family.aliases import stable_index
from cascade.family.builds import Build
from cascade.family.cards import Cards, OnCard
from cascade.family.graph import Graph, Node
from cascade.family.index import Json, family_index
from cascade.family.job import Job, RunOptions, job_of
from cascade.family.leftovers import clear_leftovers
from cascade.family.quality import verdicts
from cascade.family.race import race
from cascade.family.runner import Outcome
from cascade.recipe import Options, Recipe
from cascade.storage.cache import tidy
from cascade.storage.locations import check_store, open_location
from cascade.storage.manifest import Manifest

# Of the index, and of the graph.
PARTS = ("stages", "extended", "controls")

RunJob = Callable[[Job], Outcome]
OnIndex = Callable[[Json], None]


def default_cache() -> Path:
    """CASCADE_CACHE, or `~/.cache/cascade`."""
    return Path(os.environ.get("CASCADE_CACHE") or Path.home() / ".cache" / "cascade")


def run_options(recipe: Recipe, store: str, options: Options) -> RunOptions:
    """Bind a build to a store; names the run by family and UTC time, and no two alike."""
    return RunOptions(
        store=store,
        cache=options.cache or str(default_cache()),
        run=f"{recipe.family}-{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(3)}",
        device=options.device,
        checkpoint_seconds=options.checkpoint_seconds,
        gradient_checkpointing=options.gradient_checkpointing,
        compile=options.compile,
        trust_remote_code=recipe.trust_remote_code,
    )


def build(
    graph: Graph,
    options: RunOptions,
    run: RunJob,
    on_index: OnIndex = lambda index: None,
    on_card: OnCard = lambda card: None,
) -> Json:
    """Make every artifact of the graph and return the family's index.

    run: makes one node, such as `runner.run_node` with a report, or a Prefect task around it.
    on_index: receives the index when the parent and when a stage has been evaluated, once it is stored.
    on_card: receives before that every card that is new; a stage's is new again when it is extended.
    """
    store = open_location(options.store)
    # The command line has asked already, and said soon if the address is wrong; a worker has nobody to tell.
    check_store(store, wait=True)
    tidy(Path(options.cache))
    stable = stable_index(store / graph.recipe.family)
    this = Build(store, options.run)
    this.refer(graph)
    done: dict[str, Outcome] = {}
    cards = Cards(store, graph.recipe, Path(options.cache), on_card)

    def make(node: Node) -> Manifest:
        if node.key not in done:
            done[node.key] = run(job_of(node, options))
        return done[node.key].manifest

    def publish(graph: Graph) -> Json:
        index = family_index(graph, store, done, options.run)
        index["gate"] = verdicts(index, stable)
        cards.publish(index, all(len(index[part]) == len(getattr(graph, part)) for part in PARTS))
        on_index(index)
        return index

    for corpus in graph.corpora:
        require_enough(corpus, make(corpus))
    for node in graph.trunk:
        make(node)
    index = publish(graph)
    for place in range(len(graph.stages)):
        stage = graph.stages[place]
        for node in stage.before:
            make(node)
        if stage.open:
            graph = graph.decide(stage.stage.name, race(stage, make))
            this.refer(graph)
            stage = graph.stages[place]
        for node in (stage.pruned, *stage.trained, stage.evaluated):
            make(node)
        index = publish(graph)
    beside: list[Iterable[Node]] = [*graph.extended, *graph.controls]
    for group in beside:
        for node in group:
            make(node)
        index = publish(graph)
    jobs = [job_of(node, options) for node in graph if node.key in done]
    clear_leftovers(jobs, store / graph.recipe.family)
    this.refer(graph, index=index)
    return index


def require_enough(corpus: Node, made: Manifest) -> None:
    """Raise InputError if a stage wants more tokens than a corpus has in the epochs it allows.

    The corpus checks this before it is stored; one that is reused was perhaps made for shorter stages.
    """
    for need in corpus.hints["needs"]:
        require_tokens(made.facts["train_rows"], made.facts["sequence_length"], **need)
