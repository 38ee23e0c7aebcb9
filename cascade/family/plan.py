"""From a recipe to the graph of its family, before anything is computed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from cascade.data.files import public
from cascade.data.sources import Source, contents, fingerprint
from cascade.distillation.attention_parts import attention_parts
from cascade.distillation.lora import require_peft
from cascade.errors import InputError
from cascade.family.extension import require_extensions
from cascade.family.found import found_model, given_models
from cascade.family.graph import Graph
from cascade.family.layout import build_graph
from cascade.family.planner import FamilyPlanner
from cascade.family.workplace import chosen_device
from cascade.models.decoder import Decoder
from cascade.planning.plan import describe
from cascade.pruning.proof import proof_of
from cascade.recipe import Recipe
from cascade.roles import Correction
from cascade.storage.faults import only_names
from cascade.texts import Corpus, Watch
from cascade.trainings import HiddenStates


@only_names("a path in the recipe, or the cache")
def plan_family(recipe: Recipe, cache: Path, device: str = "") -> Graph:
    """Plan every stage and lay out the graph; reads the parent's config, never its weights as tensors.

    device: a torch device that latencies are measured on; chosen when empty.

    Raises InputError for whatever of the recipe cannot be built.
    """
    prints = fingerprints(recipe.corpus)
    with about_watched():
        watched = fingerprints(recipe.watch)
        require_unseen(recipe)
    parent = found_model(recipe, recipe.parent, cache)
    others = {reference: found_model(recipe, reference, cache, parent) for reference in given_models(recipe)}
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
    require_relations(recipe, [parent.decoder, *(model.decoder for model in others.values())])
    described = {reference: model.described for reference, model in others.items()}
    return build_graph(recipe, parent.described, planner, prints, given=described, watched=watched)


def fingerprints(section: Corpus | Watch) -> tuple[str, ...]:
    """The content identity of each source."""
    return tuple(fingerprint(Source(**source.model_dump())) for source in section.sources)


@contextmanager
def about_watched() -> Iterator[None]:
    """Errors about a watched source name its place in the recipe."""
    try:
        yield
    except InputError as error:
        error.where = error.where.replace("corpus.sources", "watch.sources")
        raise


def require_unseen(recipe: Recipe) -> None:
    """Raise InputError if a watched file is trained on: over-fitting to it would look like progress."""
    if not recipe.watch.sources:
        return
    trained = {one for source in recipe.corpus.sources for one in contents(Source(**source.model_dump()))}
    for source in recipe.watch.sources:
        if trained & contents(Source(**source.model_dump())):
            raise InputError(
                "a watched source is trained on, so over-fitting would not show on it",
                value=public(source.path),
                where="watch.sources",
                remedy="watch text that `corpus.sources` does not have",
            )


def require_any_winner(recipe: Recipe, planner: FamilyPlanner) -> None:
    """Raise InputError if what follows a race could not be cut from one of those that race."""
    for stage, plan in zip(recipe.stages, planner({}), strict=True):
        for winner, shape in enumerate(plan.candidates[1:], 1):
            try:
                planner({stage.name: winner})
            except InputError as error:
                error.where += f"; if {describe(shape)} wins the race of stage {stage.name}"
                raise


def require_relations(recipe: Recipe, decoders: Iterable[Decoder]) -> None:
    """Raise InputError if relations are to be compared in a class whose queries are not found."""
    if any(stage.distill.hidden_states is HiddenStates.RELATIONS for stage in recipe.stages):
        for decoder in decoders:
            attention_parts(decoder, 0)
