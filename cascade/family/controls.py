"""What a family's last child is compared with: stages that differ from its own in one thing."""

from __future__ import annotations

from cascade.dials import Prune
from cascade.importance.method import Method
from cascade.presets import Preset
from cascade.recipe import Recipe, Stage
from cascade.roles import Control, Student
from cascade.trainings import Distill, HiddenStates, OnPolicy


def control_stage(recipe: Recipe, control: Control) -> Stage:
    """The stage of a control of the last child.

    What starts from the parent or from nothing gets the tokens of all stages, because the child was
    seeded by children that had them; the others get the last stage's. An on-policy part is one for a control
    too; that of earlier stages, and of a control without a teacher, are as many tokens of the corpus.
    """
    last, stages = recipe.stages[-1], recipe.stages
    earlier = [stage.on_policy.tokens for stage in stages[:-1]]
    whole = {
        "tokens": sum(stage.distill.tokens for stage in stages) + sum(earlier),
        "epochs": sum(epochs_of(stage) for stage in stages),
    }
    changes: dict[Control, dict[str, object]] = {
        Control.SCRATCH: {"student": Student.SCRATCH, "distill": last.distill.model_copy(update=whole)},
        Control.ONE_SHOT: {
            "student": Student.PRUNED,
            "distill": last.distill.model_copy(update=whole),
            "prune": rotating_as_before(recipe),
        },
        Control.CE_ONLY: {"distill": corpus_alone(last), "on_policy": OnPolicy()},
        Control.RANDOM_PRUNE: {"prune": drawn(last.prune)},
    }
    return last.model_copy(update={"name": control.name_of(last.name), **changes[control]})


def rotating_as_before(recipe: Recipe) -> Prune:
    """A rotation unties the embeddings, so the child's shape needs one if any stage had one."""
    last = recipe.stages[-1].prune.resolved
    rotates = any(stage.prune.resolved.rotate for stage in recipe.stages)
    return last.model_copy(update={"rotate": rotates, "candidates": 1})


def epochs_of(stage: Stage) -> int:
    """The corpus may be repeated so often by the trainings of a stage."""
    return stage.distill.epochs * (2 if stage.on_policy.tokens else 1)


def corpus_alone(stage: Stage) -> Distill:
    """As many tokens of training with the corpus's own labels in place of a teacher."""
    fields = Distill.model_fields
    return stage.distill.model_copy(
        update={
            "tokens": stage.distill.tokens + stage.on_policy.tokens,
            "epochs": epochs_of(stage),
            "cross_entropy_weight": 1.0,
            "objective": fields["objective"].default,
            "objective_weight": fields["objective_weight"].default,
            "temperature": fields["temperature"].default,
            "hidden_states": HiddenStates.OFF,
        }
    )


def drawn(prune: Prune) -> Prune:
    """The same cut, rotation and repair, by random scores."""
    names = ("layer_score", "contiguous_layers", "aggregation")
    plain = {name: Prune.model_fields[name].default for name in names}
    return prune.resolved.model_copy(update={"importance": Method.RANDOM, "preset": Preset.NONE, **plain})
