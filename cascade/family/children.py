"""What is trained and stored: a child, a leg of its race, its long-context version, a corrected teacher."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from cascade.data.corpus import Corpus
from cascade.distillation.loop import WHOLE, Leg
from cascade.distillation.lora import LowRank
from cascade.distillation.settings import DistillSettings, rows_of
from cascade.distillation.signals import Part
from cascade.evaluation.gate import gate
from cascade.evaluation.loss import cross_entropy
from cascade.family.cost import student_flops
from cascade.family.extension import child_config
from cascade.family.models import shape_of
from cascade.family.race import RACE_PART
from cascade.family.teaching import held_out_rows
from cascade.family.training import STATE, settings_of, train
from cascade.family.workplace import Result, Workplace
from cascade.models.folders import load_folder, load_folder_config, load_folder_tokenizer, save_model
from cascade.roles import Correction
from cascade.storage.checkpoints import TrainingCheckpoints
from cascade.storage.locations import open_location


def make_raced(place: Workplace) -> Result:
    """A leg of a candidate's training: its state, and its loss on rows that no leg trains on."""
    section = place.job.section
    end = TrainingCheckpoints(open_location(str(place.folder / STATE)))
    done = train(place, Leg(section["part"], end=end))
    held_out = held_out_rows(done.corpus, section["held_out_tokens"])
    part, rows = judged_rows(done.corpus, settings_of(section), section["judged_tokens"], held_out)
    ce = cross_entropy(done.student, done.corpus, part, rows, report=place.report)
    result = done.result({"end": {"tokens": done.steps[-1].tokens, "ce": ce}})
    length = done.corpus.sequence_length
    own = len(rows) * length * shape_of(done.student).forward_flops(length)
    return replace(result, flops=result.flops + own)


def judged_rows(
    corpus: Corpus, settings: DistillSettings, tokens: int, held_out: int
) -> tuple[Part, list[int]]:
    """Rows of so many tokens that no leg of a race trains on, the same for all: first those that the whole
    training never reaches.

    Where every row is seen before the race is over, they are the `held_out` rows that are evaluated.
    """
    whole = rows_of(settings.tokens, corpus.sequence_length)
    # The last leg ends with a whole step.
    last = math.ceil(RACE_PART * whole) + (settings.batch_rows or 1)
    raced = {corpus.row(position) for position in range(last)}
    most = max(1, tokens // corpus.sequence_length)
    rows = [row for row in reversed(range(len(corpus.train))) if row not in raced][:most]
    return (Part.TRAIN, rows) if rows else (Part.HELD_OUT, list(range(min(most, held_out))))


def make_distilled(place: Workplace) -> Result:
    """Teach the cut model, or by its own texts the distilled one; the gate admits it first."""
    folder, trust = place.input("student"), place.job.options.trust_remote_code
    done = train(place, WHOLE)
    save_model(done.student, load_folder_tokenizer(folder, trust), place.folder)
    watched = done.watched(settings_of(place.job.section))
    passed = gate(place.folder, shape_of(done.student).parameters)
    return done.result({**done.ends, **watched, "gate": passed})


def make_extended(place: Workplace) -> Result:
    """Teach the short child on long rows, with other RoPE settings; the gate admits what comes of it."""
    folder, trust, section = place.input("student"), place.job.options.trust_remote_code, place.job.section
    config = child_config(load_folder_config(folder, trust), section["rope"])
    student = load_folder(folder, torch.float32, place.device, trust_remote_code=trust, config=config)
    done = train(place, WHOLE, student)
    tokenizer = load_folder_tokenizer(folder, trust)
    # A tokenizer warns of text that is longer than this.
    tokenizer.model_max_length = max(tokenizer.model_max_length, config.max_position_embeddings)
    save_model(done.student, tokenizer, place.folder)
    positions = {
        "max_position_embeddings": config.max_position_embeddings,
        "rope_parameters": config.rope_parameters,
    }
    figures = gate(place.folder, shape_of(done.student).parameters)
    return done.result({**done.ends, **positions, "gate": figures})


def make_corrected(place: Workplace) -> Result:
    """Fine-tune a teacher on the corpus; what LoRA adds is merged, so that it is a model like any other."""
    folder, trust, section = place.input("student"), place.job.options.trust_remote_code, place.job.section
    teacher = load_folder(folder, torch.float32, place.device, trust_remote_code=trust)
    shape, lora = shape_of(teacher), Correction(section["correction"]) is Correction.LORA
    additions = LowRank(teacher, section["seed"]) if lora else None
    done = train(place, WHOLE, teacher)
    if additions:
        teacher = additions.merged()
    save_model(teacher, load_folder_tokenizer(folder, trust), place.folder)
    flops = done.tokens * student_flops(shape, done.corpus.sequence_length, frozen=lora)
    return Result(
        {**done.ends, "gate": gate(place.folder, shape.parameters)},
        done.tokens,
        flops,
        teacher_flops=flops,
    )
