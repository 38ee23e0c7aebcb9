"""From a recipe to a stored family, without an orchestrator."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch

from cascade.data.corpus import require_tokens
from cascade.data.sources import Source, fingerprint
from cascade.distillation.states import check_head
from cascade.errors import InputError
from cascade.family.graph import Graph, Node
from cascade.family.index import Json, family_index, has_index, write_index
from cascade.family.job import Job, RunOptions, job_of
from cascade.family.layout import Parent, build_graph
from cascade.family.planner import FamilyPlanner
from cascade.family.race import race
from cascade.family.runner import Outcome
from cascade.models.decoder import Decoder, decoder_of, empty_model_of
from cascade.models.sources import load_config, resolve_parent
from cascade.planning.plan import describe
from cascade.pruning.proof import TOKENS, proof_of, random_miniature
from cascade.recipe import Options, Recipe
from cascade.storage.locations import check_store, open_location
from cascade.storage.manifest import Manifest

LARGE = 100.0

RunJob = Callable[[Job], Outcome]
OnIndex = Callable[[Json], None]


def default_cache() -> Path:
    """CASCADE_CACHE, or `~/.cache/cascade`."""
    return Path(os.environ.get("CASCADE_CACHE") or Path.home() / ".cache" / "cascade")


def run_options(recipe: Recipe, store: str, options: Options) -> RunOptions:
    """Bind a build to a store; names the run by family and UTC time."""
    return RunOptions(
        store=store,
        cache=options.cache or str(default_cache()),
        run=f"{recipe.family}-{datetime.now(UTC):%Y%m%dT%H%M%S}",
        device=options.device,
        checkpoint_seconds=options.checkpoint_seconds,
        gradient_checkpointing=options.gradient_checkpointing,
        trust_remote_code=recipe.trust_remote_code,
    )


def plan_family(recipe: Recipe, cache: Path) -> Graph:
    """Plan every stage and lay out the graph; reads the parent's config, never its weights as tensors.

    Raises InputError for whatever of the recipe cannot be built.
    """
    source = resolve_parent(recipe.parent, trust_remote_code=recipe.trust_remote_code, cache=cache)
    model = empty_model_of(load_config(source), trust_remote_code=recipe.trust_remote_code)
    prints = tuple(fingerprint(Source(**source.model_dump())) for source in recipe.corpus.sources)
    decoder = decoder_of(model)
    require_plain_head(decoder)
    parent = Parent(recipe.parent, source.fingerprint, decoder.architecture)
    planner = FamilyPlanner(recipe, decoder, proof_of(decoder), cache / "latency" / source.fingerprint[:12])
    require_any_winner(recipe, planner)
    return build_graph(recipe, parent, planner, prints)


def require_any_winner(recipe: Recipe, planner: FamilyPlanner) -> None:
    """Raise InputError if what follows a race could not be cut from one of those that race."""
    for stage, plan in zip(recipe.stages, planner({}), strict=True):
        for winner, shape in enumerate(plan.candidates[1:], 1):
            try:
                planner({stage.name: winner})
            except InputError as error:
                error.where += f"; if {describe(shape)} wins the race of stage {stage.name}"
                raise


def require_plain_head(decoder: Decoder) -> None:
    """Raise InputError for a parent that could be cut but not distilled, before anything is written."""
    small = random_miniature(decoder)
    # A soft cap shows only where logits are large.
    small.get_output_embeddings().weight.mul_(LARGE)
    check_head(small, torch.arange(TOKENS))


def build(graph: Graph, options: RunOptions, run: RunJob, on_index: OnIndex = lambda index: None) -> Json:
    """Make every artifact of the graph and return the family's index.

    run: makes one node, such as `runner.run_node` with a report, or a Prefect task around it.
    on_index: receives the index when the parent and when a stage has been evaluated.
    """
    store = open_location(options.store)
    check_store(store)
    done: dict[str, Outcome] = {}
    rebuilt = has_index(graph, store)

    def make(node: Node) -> Manifest:
        if node.key not in done:
            done[node.key] = run(job_of(node, options))
        return done[node.key].manifest

    def publish(graph: Graph) -> Json:
        index = family_index(graph, store, done, options.run)
        on_index(index)
        # An interrupted rebuild must not hide the stages of the build before it.
        if not rebuilt or len(index["stages"]) == len(graph.stages):
            write_index(index, store)
        return index

    require_enough(graph, make(graph.corpus))
    for node in graph.trunk:
        make(node)
    index = publish(graph)
    for place in range(len(graph.stages)):
        stage = graph.stages[place]
        make(stage.importance)
        if stage.open:
            graph = graph.decide(stage.stage.name, race(stage, make))
            stage = graph.stages[place]
        for node in (stage.pruned, stage.distilled, stage.evaluated):
            make(node)
        index = publish(graph)
    return index


def require_enough(graph: Graph, corpus: Manifest) -> None:
    """Raise InputError if a stage wants more tokens than the corpus has in the epochs it allows.

    The corpus checks this before it is stored; one that is reused was perhaps made for shorter stages.
    """
    for need in graph.corpus.hints["needs"]:
        require_tokens(corpus.facts["train_rows"], corpus.facts["sequence_length"], **need)
