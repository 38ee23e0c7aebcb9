"""Who teaches in a job: its signals, made once, and the teachers that answer a training or an evaluation."""

from __future__ import annotations

from dataclasses import dataclass

from cascade.architecture import Architecture
from cascade.data.corpus import Corpus
from cascade.distillation.labels import CorpusTeacher
from cascade.distillation.mixture import MixedTeacher
from cascade.distillation.settings import rows_of
from cascade.distillation.signals import (
    FinishedShards,
    OnlineTeacher,
    Part,
    ReadAhead,
    StoredTeacher,
    Teacher,
    write_signals,
)
from cascade.distillation.signals.codecs import codec_of
from cascade.distillation.signals.teachers import RECORD, shards_of
from cascade.distillation.states import head_of
from cascade.family.cost import teacher_flops
from cascade.family.models import shape_of, the_model
from cascade.family.teachers import role
from cascade.family.workplace import Result, Workplace
from cascade.storage.artifacts import require_manifest
from cascade.storage.locations import open_location


def make_signals(place: Workplace) -> Result:
    """The teacher's one forward pass for the whole family; shards that an earlier try finished are kept."""
    corpus, section = place.corpus(), place.job.section
    rows = signal_rows(corpus, section["tokens"])
    held_out = held_out_rows(corpus, section["held_out_tokens"])
    teacher = the_model(place, "parent")
    shape = shape_of(teacher)
    facts = write_signals(
        teacher,
        corpus,
        place.folder,
        rows,
        held_out,
        codec=codec_of(section, shape.hidden, shape.vocabulary),
        finished=FinishedShards(place.job.training),
        report=place.report,
    )
    tokens = (rows + held_out) * corpus.sequence_length
    flops = tokens * shape.forward_flops(corpus.sequence_length)
    return Result(facts, tokens, flops, teacher_flops=flops)


def signal_rows(corpus: Corpus, tokens: int) -> int:
    """Training rows that so many tokens go through, once."""
    return min(rows_of(tokens, corpus.sequence_length), len(corpus.train))


def taught_whole(teacher: Teacher) -> bool:
    """Whether the teacher answers for training rows with whole distributions."""
    return teacher.whole(Part.TRAIN) if isinstance(teacher, StoredTeacher) else True


def held_out_rows(corpus: Corpus, tokens: int) -> int:
    """Rows that are evaluated: as many as asked for, or all there are."""
    return min(rows_of(tokens, corpus.sequence_length), len(corpus.held_out))


def the_teacher(
    place: Workplace, corpus: Corpus, model: str = "parent", signals: str = "signals"
) -> tuple[Teacher, Architecture]:
    """A model among the inputs, from its stored signals where there are any, and its architecture."""
    found = the_model(place, model)
    if signals not in place.job.inputs:
        return OnlineTeacher(found, corpus), shape_of(found)
    shards = signal_shards(place, corpus, signals)
    return StoredTeacher(shards, head_of(found), corpus.identity), shape_of(found)


@dataclass(frozen=True)
class Taught:
    """Who teaches. flops: that this takes for a token that is trained."""

    teacher: Teacher
    flops: int = 0


def the_teachers(place: Workplace, corpus: Corpus, vocabulary: int) -> Taught:
    """Those among the job's inputs; without any, the corpus itself. vocabulary: of the student's LM head."""
    weights, inputs = place.job.section.get("weights", [1.0]), place.job.inputs
    names = ["parent"] if "parent" in inputs else [role("teacher", i) for i in range(len(weights))]
    if names[0] not in inputs:
        return Taught(CorpusTeacher(corpus, vocabulary))
    teachers, flops, length = [], 0, corpus.sequence_length
    for index, name in enumerate(names):
        signals = role("signals", index)
        teacher, shape = the_teacher(place, corpus, name, signals)
        teachers.append(teacher)
        flops += teacher_flops(shape, length, signals in inputs, taught_whole(teacher))
    return Taught(teachers[0] if len(teachers) == 1 else MixedTeacher(teachers, weights), flops)


# Signals up to this size stay in the cache folder for the stages that follow.
KEPT_SIGNALS = 16 * 2**30


def signal_shards(place: Workplace, corpus: Corpus, signals: str) -> ReadAhead:
    """The stored signals, of which a thread brings what the job will ask for before it does.

    Of an epoch in stored order only the shards at hand are kept, unless all are few; later epochs are
    permuted and need all of them.
    """
    location = open_location(place.job.inputs[signals]["uri"])
    manifest = require_manifest(location)
    tokens = place.job.section.get("distill", {}).get("tokens", 0)
    rows = signal_rows(corpus, tokens)
    order = [RECORD, *shards_of(manifest.facts, rows)]
    permuted = rows_of(tokens, corpus.sequence_length) > rows
    keep = permuted or manifest.bytes <= KEPT_SIGNALS
    folder = (place.cache if keep else place.scratch) / f"signals-{manifest.key[:12]}"
    shards = ReadAhead(location, manifest, folder, order, keep=keep)
    place.leaving.callback(shards.close)
    return shards
