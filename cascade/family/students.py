"""What a student starts as, where it is no cut: a given checkpoint, or random weights."""

from __future__ import annotations

from cascade.architecture import Architecture
from cascade.errors import InputError
from cascade.family.workplace import Result, Workplace
from cascade.models.decoder import decoder_of
from cascade.models.folders import load_folder, load_folder_tokenizer, save_model
from cascade.models.sources import ParentSource, load_model, load_tokenizer, resolve_parent
from cascade.pruning.initial import random_model


def make_parent(place: Workplace) -> Result:
    """A model as a plain Hugging Face folder in its own precision, whatever form it came in."""
    source = the_source(place, place.job.section["fingerprint"])
    model = load_model(source)
    architecture = decoder_of(model).architecture
    save_model(model, load_tokenizer(source), place.folder)
    return Result({"parameters": architecture.parameters, "architecture": architecture.record()})


def the_source(place: Workplace, fingerprint: str) -> ParentSource:
    """The model that was planned; raises InputError when its content has changed since."""
    options = place.job.options
    source = resolve_parent(
        place.job.hints["parent"], trust_remote_code=options.trust_remote_code, cache=place.cache
    )
    if source.fingerprint != fingerprint:
        raise InputError(
            "the parent changed after the family was planned",
            value=source.fingerprint[:12],
            where=source.reference,
            remedy="run the command again; it plans with the parent as it is now",
        )
    return source


def make_initialised(place: Workplace) -> Result:
    """Random weights in the planned architecture, by the class's own initialisation."""
    folder, trust, section = place.input("checkpoint"), place.job.options.trust_remote_code, place.job.section
    target = Architecture.from_record(section["architecture"])
    model = random_model(decoder_of(load_folder(folder, trust_remote_code=trust)), target, section["seed"])
    save_model(model, load_folder_tokenizer(folder, trust), place.folder)
    return Result({"parameters": target.parameters})
