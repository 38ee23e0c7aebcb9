"""Long-context stages: the family's recipe as it reads on longer rows, and what is refused beforehand.

The shape is Ministral 3's (2601.08584, section 3): a child's long-context stage is a branch beside the trunk,
and the next child is cut from the short one. The original parent teaches.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from transformers import PreTrainedConfig

from cascade.errors import InputError
from cascade.family.graph import Section
from cascade.models.decoder import Decoder
from cascade.models.positions import RopeSettings
from cascade.models.rope import FULL_ATTENTION, extended_config
from cascade.pruning.proof import TOKENS, random_miniature
from cascade.recipe import Recipe, Stage
from cascade.trainings import Distill, OnPolicy


def lengths(recipe: Recipe) -> list[int]:
    """Tokens of a long row, each length once."""
    stated = [stage.extend.sequence_length for stage in recipe.stages]
    return list(dict.fromkeys(length for length in stated if length is not None))


def longer(recipe: Recipe, length: int) -> Recipe:
    """The family on rows of so many tokens: the stages that are extended to them, taught as on those."""
    stages = tuple(
        stage.model_copy(update={"distill": long_distill(stage), "on_policy": OnPolicy()})
        for stage in recipe.stages
        if stage.extend.sequence_length == length
    )
    corpus = recipe.corpus.model_copy(update={"sequence_length": length})
    teacher = recipe.teacher.model_copy(update={"correction_tokens": 0})
    return recipe.model_copy(update={"stages": stages, "corpus": corpus, "teacher": teacher})


def long_distill(stage: Stage) -> Distill:
    """The stage's teaching, with what `extend` says in place of what is said for short rows."""
    extend = stage.extend
    stated = {name: getattr(extend, name) for name in ("learning_rate", "batch_tokens")}
    changes = {name: value for name, value in stated.items() if value is not None}
    return stage.distill.model_copy(update={"tokens": extend.tokens, "epochs": extend.epochs, **changes})


def rope_sections(recipe: Recipe, stage: Stage, length: int) -> dict[str, Section]:
    """How the child and, where it is stated, the parent read rows of this length."""
    child = {"rope": {**stage.extend.rope.settings.record(), "length": length}}
    return child | teacher_section(recipe, length)


def teacher_section(recipe: Recipe, length: int) -> dict[str, Section]:
    """How the parent reads rows of this length; nothing where it is not stated."""
    settings = recipe.teacher.rope.settings
    return {"teacher_rope": {**settings.record(), "length": length}} if settings.stated else {}


def child_config(config: PreTrainedConfig, section: Section) -> PreTrainedConfig:
    """A child's config by a section of `rope_sections`."""
    stated = {name: value for name, value in section.items() if name != "length"}
    return extended_config(config, RopeSettings.from_record(stated), section["length"], "extend.rope")


def teacher_config(config: PreTrainedConfig, section: Section | None) -> PreTrainedConfig:
    """The parent's config: as it is for rows that it allows, and where nothing is stated."""
    if section is None or section["length"] <= (getattr(config, "max_position_embeddings", None) or 0):
        return config
    return child_config(config, section)


def require_extensions(recipe: Recipe, parent: Decoder, given: Mapping[str, Decoder]) -> None:
    """Raise InputError for a long-context stage that could not be run, before anything is written.

    given: decoders of checkpoints that stages start from; what follows one is cut from it.
    """
    child, settings, needed = parent, recipe.teacher.rope.settings, False
    for stage in recipe.stages:
        child = given[stage.checkpoint] if stage.checkpoint else child
        length = stage.extend.sequence_length
        if length is None:
            continue
        require_rope(child, stage.extend.rope.settings, length, f"stage {stage.name}, extend.rope")
        if length > parent.model.config.max_position_embeddings:
            require_rope(parent, settings, length, "teacher.rope")
            needed = True
    if settings.stated and not needed:
        raise InputError(
            "the parent's config allows rows as long as these, so its RoPE settings stay as they are",
            value=f"max_position_embeddings {parent.model.config.max_position_embeddings}",
            where="teacher.rope",
            remedy="leave it out",
        )


def require_rope(decoder: Decoder, settings: RopeSettings, length: int, where: str) -> None:
    """Raise InputError unless the decoder's context can be extended so.

    With settings for all layers, a miniature's logits must change with them: no list of models says which
    classes read them.
    """
    before = decoder.model.config
    after = extended_config(before, settings, length, where)
    if before.rope_parameters == after.rope_parameters or FULL_ATTENTION in after.rope_parameters:
        return
    ids = torch.arange(TOKENS)[None]
    plain, changed = (random_miniature(decoder, config)(input_ids=ids).logits for config in (before, after))
    if torch.equal(plain, changed):
        raise InputError(
            "the decoder's class does not read its RoPE settings from its config",
            value=before.model_type,
            where=where,
            remedy="leave `extend` out, or choose another parent",
        )
