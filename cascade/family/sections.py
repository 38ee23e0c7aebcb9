"""The section of every node: each number that its result depends on, derived ones included."""

from __future__ import annotations

from dataclasses import asdict

from cascade.architecture import Architecture
from cascade.distillation.layer_map import require_pairs
from cascade.distillation.settings import DistillSettings
from cascade.errors import InputError
from cascade.family.graph import Section, Teaching
from cascade.importance.method import Method
from cascade.pruning.repair import Repair, can_fit
from cascade.recipe import Recipe, Stage
from cascade.trainings import HiddenStates

NO_TEACHING = Teaching()


def held_out_section(recipe: Recipe) -> Section:
    """How much is held out to measure on."""
    return {"held_out_tokens": recipe.corpus.held_out_tokens}


def steps_of(recipe: Recipe, stage: Stage, child: Architecture) -> int:
    """Steps of the whole training of a child."""
    settings = DistillSettings(**training_section(recipe, stage, child))
    return settings.resolved(child.hidden, recipe.corpus.sequence_length).steps


def importance_section(
    recipe: Recipe, stage: Stage, before: Architecture, shapes: tuple[Architecture, ...]
) -> Section:
    """How units are scored: one pass for all candidates; the seed only where it matters."""
    dials = stage.prune.resolved
    section: Section = {"method": dials.importance.value, "calibration_tokens": dials.calibration_tokens}
    if dials.importance is Method.RANDOM:
        section["seed"] = recipe.seed
    if dials.importance is Method.ACTIVATION:
        dropped = {before.layers - shape.layers for shape in shapes}
        drops = {length for count in dropped for length in stage.prune.scoring.drops(count)}
        section |= {"drops": sorted(drops)} if drops else {}
    return section


def pruning_section(stage: Stage, before: Architecture, shape: Architecture) -> Section:
    """What the cut depends on; calibration tokens only where it looks at the corpus itself."""
    dials = stage.prune.resolved
    section: Section = {
        "architecture": shape.record(),
        "scoring": asdict(stage.prune.scoring),
        "repair": dials.repair.value,
    }
    rotates = dials.rotate and shape.hidden < before.hidden
    section["rotate"] = rotates
    fitted = dials.repair is Repair.LEAST_SQUARES and can_fit(before, shape)
    if rotates or fitted:
        section["calibration_tokens"] = dials.calibration_tokens
    return section


# A child with at most this share of its teacher's layers gets the hidden-state loss. Minitron (2407.14679)
# found it to help (0.014 nats) only after large cuts of depth. Doubt: where help begins was not measured.
SHALLOW = 1 / 2


def hidden_states_of(stage: Stage, child: Architecture, teaching: Teaching) -> Section:
    """The settings of the hidden-state loss; none where it is off. Raises InputError where it cannot be."""
    asked = stage.distill.hidden_states
    if asked is HiddenStates.AUTO:
        alone = len(teaching.teachers) == 1 and not teaching.stored
        if not alone or child.layers > SHALLOW * teaching.teachers[0].layers or child.layers < 2:
            return {}
        asked = HiddenStates.COSINE
    if asked is HiddenStates.OFF:
        return {}
    fewest = min(shape.layers for shape in (child, *teaching.teachers))
    if fewest < 2 and asked is not HiddenStates.RELATIONS:
        raise InputError(
            "a hidden-state loss compares second-to-last layers",
            value=f"{fewest} layer",
            where=f"stage {stage.name}, distill.hidden_states",
            remedy="set `hidden_states: off`, or keep two layers or more",
        )
    if asked is not HiddenStates.RELATIONS:
        require_pairs(child.layers, stage.distill.hidden_states_layers, f"stage {stage.name}, ")
    return {
        "hidden_states": asked.value,
        "hidden_states_weight": stage.distill.hidden_states_weight,
        "hidden_states_layers": stage.distill.hidden_states_layers,
    }


def training_section(
    recipe: Recipe, stage: Stage, child: Architecture, teaching: Teaching = NO_TEACHING
) -> Section:
    """Every number of the training, derived ones included: a better derivation makes a new artifact.

    `epochs` is left out: it is a permission and does not change what is trained.
    """
    dials, length = stage.distill, recipe.corpus.sequence_length
    settings = DistillSettings(
        tokens=dials.tokens,
        batch_rows=step_rows(dials.batch_tokens, length),
        learning_rate=dials.learning_rate,
        cross_entropy_weight=dials.cross_entropy_weight,
        objective=dials.objective,
        objective_weight=dials.objective_weight,
        temperature=dials.temperature,
        seed=recipe.seed,
        schedule=dials.schedule,
        cross_entropy_schedule=dials.cross_entropy_schedule,
        **hidden_states_of(stage, child, teaching),
    )
    return settings.resolved(child.hidden, length).settings.record()


def step_rows(batch_tokens: int | None, length: int) -> int | None:
    """Rows of so many tokens in one optimiser step, at least one; None where the settings derive them."""
    return max(1, batch_tokens // length) if batch_tokens else None


def on_policy_section(recipe: Recipe, stage: Stage, child: Architecture) -> Section:
    """Every number of the training on what the child writes."""
    dials, length = stage.on_policy, recipe.corpus.sequence_length
    settings = DistillSettings(
        tokens=dials.tokens,
        batch_rows=step_rows(dials.batch_tokens, length),
        learning_rate=dials.learning_rate,
        objective=dials.objective,
        objective_weight=dials.objective_weight,
        temperature=dials.temperature,
        seed=recipe.seed,
    )
    return settings.resolved(child.hidden, length).settings.record()


def writing_section(recipe: Recipe, stage: Stage) -> Section:
    """How the child writes: the fields of `cascade.distillation.on_policy.Writing`."""
    dials = stage.on_policy
    return {
        "mixture": dials.mixture,
        "prompt_tokens": dials.prompt_of(recipe.corpus.sequence_length),
        "temperature": dials.sampling_temperature,
        "seed": recipe.seed,
    }
