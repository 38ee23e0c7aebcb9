"""From a recipe to a stored family, without an orchestrator."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from cascade.data.corpus import require_tokens
from cascade.data.sources import Source, fingerprint
from cascade.distillation.lora import require_peft
from cascade.distillation.states import check_head
from cascade.errors import InputError
from cascade.family.extension import require_extensions
from cascade.family.graph import Graph, Node
from cascade.family.index import Json, family_index, has_index, write_index
from cascade.family.job import Job, RunOptions, job_of
from cascade.family.layout import build_graph
from cascade.family.planner import FamilyPlanner
from cascade.family.race import race
from cascade.family.runner import Outcome
from cascade.family.teachers import Parent
from cascade.family.workplace import chosen_device
from cascade.models.decoder import Decoder, decoder_of, empty_model_of
from cascade.models.sources import ParentSource, load_config, load_tokenizer, resolve_parent
from cascade.models.tokenizers import require_same_tokenizer
from cascade.planning.plan import describe
from cascade.pruning.proof import TOKENS, proof_of, random_miniature
from cascade.recipe import Options, Recipe
from cascade.roles import PARENT, PREVIOUS, Correction
from cascade.storage.locations import check_store, open_location
from cascade.storage.manifest import Manifest

LARGE = 100.0
# Of the index, and of the graph.
PARTS = ("stages", "extended", "controls")

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


def plan_family(recipe: Recipe, cache: Path, device: str = "") -> Graph:
    """Plan every stage and lay out the graph; reads the parent's config, never its weights as tensors.

    device: a torch device that latencies are measured on; chosen when empty.

    Raises InputError for whatever of the recipe cannot be built.
    """
    prints = tuple(fingerprint(Source(**source.model_dump())) for source in recipe.corpus.sources)
    parent = found_model(recipe, recipe.parent, cache)
    others = {
        reference: found_model(recipe, reference, cache, parent.tokenizer)
        for reference in given_models(recipe)
    }
    if recipe.teacher.correction is Correction.LORA:
        require_peft()
    planner = FamilyPlanner(
        recipe, parent.decoder, proof_of(parent.decoder), parent.latencies(cache), chosen_device(device)
    )
    students = {stage.checkpoint for stage in recipe.stages if stage.checkpoint}
    given = {
        reference: replace(
            planner,
            decoder=model.decoder,
            proof=proof_of(model.decoder),
            latency_folder=model.latencies(cache),
            original=parent.decoder.architecture,
        )
        for reference, model in others.items()
        if reference in students
    }
    planner = replace(planner, given=given)
    require_any_winner(recipe, planner)
    require_extensions(recipe, parent.decoder, {name: model.decoder for name, model in others.items()})
    described = {reference: model.described for reference, model in others.items()}
    return build_graph(recipe, parent.described, planner, prints, given=described)


@dataclass(frozen=True)
class Found:
    """A model that the recipe names: identified, and its structure and tokenizer read."""

    source: ParentSource
    decoder: Decoder

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its own."""
        return load_tokenizer(self.source)

    @property
    def described(self) -> Parent:
        """What the graph has to know."""
        return Parent(self.source.reference, self.source.fingerprint, self.decoder.architecture)

    def latencies(self, cache: Path) -> Path:
        """Where its measurements are kept."""
        return cache / "latency" / self.source.fingerprint[:12]


def given_models(recipe: Recipe) -> list[str]:
    """What the recipe names beside the parent: teachers and students, each once."""
    teachers = [model.path for model in recipe.teacher.models if model.path not in (PARENT, PREVIOUS)]
    return list(
        dict.fromkeys([*teachers, *(stage.checkpoint for stage in recipe.stages if stage.checkpoint)])
    )


def found_model(
    recipe: Recipe, reference: str, cache: Path, tokenizer: PreTrainedTokenizerBase | None = None
) -> Found:
    """Read a model's config; raises InputError if it cannot be distilled, or has another tokenizer."""
    trust = recipe.trust_remote_code
    source = resolve_parent(reference, trust_remote_code=trust, cache=cache)
    found = Found(source, decoder_of(empty_model_of(load_config(source), trust_remote_code=trust)))
    require_plain_head(found.decoder)
    if tokenizer is not None:
        require_same_tokenizer(tokenizer, found.tokenizer, where=reference)
    return found


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
        complete = all(len(index[part]) == len(getattr(graph, part)) for part in PARTS)
        if not rebuilt or complete:
            write_index(index, store)
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
            stage = graph.stages[place]
        for node in (stage.pruned, *stage.trained, stage.evaluated):
            make(node)
        index = publish(graph)
    beside: list[Iterable[Node]] = [*graph.extended, *graph.controls]
    for group in beside:
        for node in group:
            make(node)
        index = publish(graph)
    return index


def require_enough(corpus: Node, made: Manifest) -> None:
    """Raise InputError if a stage wants more tokens than a corpus has in the epochs it allows.

    The corpus checks this before it is stored; one that is reused was perhaps made for shorter stages.
    """
    for need in corpus.hints["needs"]:
        require_tokens(made.facts["train_rows"], made.facts["sequence_length"], **need)
