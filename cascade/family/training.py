"""A training as a job: resumed, watched, and counted."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from cascade.data.corpus import Corpus
from cascade.distillation.loop import Leg, distill
from cascade.distillation.meters import write_steps
from cascade.distillation.mixture import live
from cascade.distillation.objectives import Objective
from cascade.distillation.on_policy import OwnRows, Writing
from cascade.distillation.schedules import Schedule, WeightSchedule
from cascade.distillation.settings import DistillSettings
from cascade.distillation.signals import OnlineTeacher
from cascade.distillation.states import head_of
from cascade.distillation.training_state import StepRecord
from cascade.distillation.watch import Watch, WatchSettings, measured, watch_facts
from cascade.family.cost import inner_flops, student_flops, writing_flops
from cascade.family.graph import Section
from cascade.family.models import shape_of
from cascade.family.origins import origins_of
from cascade.family.teaching import Taught, the_teachers
from cascade.family.workplace import Result, Workplace
from cascade.models.folders import load_folder
from cascade.storage.checkpoints import TrainingCheckpoints
from cascade.storage.locations import open_location

STEPS = "steps.jsonl"
STATE = "state"


def settings_of(section: Section) -> DistillSettings:
    """What `DistillSettings.record` made of the settings, after its way through JSON."""
    names = {"objective": Objective, "schedule": Schedule, "cross_entropy_schedule": WeightSchedule}
    record: dict[str, Any] = dict(section["distill"])
    for name in names.keys() & record.keys():
        record[name] = names[name](record[name])
    return DistillSettings(**record)


def train(place: Workplace, leg: Leg, student: PreTrainedModel | None = None) -> Trained:
    """The job's training, or a leg of it; student: the input of that name unless it is given."""
    corpus, trust = place.corpus(), place.job.options.trust_remote_code
    if student is None:
        student = load_folder(place.input("student"), torch.float32, place.device, trust_remote_code=trust)
    checkpoints = TrainingCheckpoints(place.job.training)
    before = 0
    if "raced" in place.job.inputs:
        raced = place.input("raced")
        leg = replace(leg, start=TrainingCheckpoints(open_location(str(raced / STATE))))
        before = json.loads((raced / STEPS).read_text("utf-8").splitlines()[-1])["tokens"]
    taught = the_teachers(place, corpus, head_of(student).vocabulary)
    writing = Writing(**place.job.section["writing"]) if "writing" in place.job.section else None
    watch = the_watch(place)
    place.report.log(f"the steps are written to {place.step_file}")
    with place.stop.cooperative():
        steps = distill(
            student,
            taught.teacher,
            corpus,
            settings=settings_of(place.job.section),
            source=OwnRows(student, live(taught.teacher), corpus, writing) if writing else None,
            origins=origins_of(place),
            watch=watch,
            leg=leg,
            checkpoints=checkpoints,
            checkpoint_seconds=place.job.options.checkpoint_seconds,
            gradient_checkpointing=place.job.options.gradient_checkpointing,
            compiled=place.job.options.compile,
            step_file=place.step_file,
            report=place.report,
            should_stop=place.stop,
        )
    write_steps(place.folder / STEPS, steps)
    place.step_file.unlink(missing_ok=True)
    tokens = steps[-1].tokens - before
    written = writing.own_before(tokens // corpus.sequence_length) if writing else 0
    settings = place.job.section["distill"]
    return Trained(student, taught, corpus, steps, tokens, written, settings, watch)


def the_watch(place: Workplace) -> Watch | None:
    """The watched corpus and how it is watched, if the job's training is."""
    if "watched" not in place.job.inputs:
        return None
    return Watch(Corpus.open(place.input("watched")), WatchSettings(**place.job.section["watch"]))


@dataclass(frozen=True)
class Trained:
    """A training's end. steps: with those of legs before; tokens: of this one; written: rows of these tokens
    that the student wrote. distill: the settings. All count what was trained, even where the student is that
    of an earlier step."""

    student: PreTrainedModel
    taught: Taught
    corpus: Corpus
    steps: list[StepRecord]
    tokens: int
    written: int = 0
    distill: Section = field(default_factory=dict)
    watch: Watch | None = None

    def result(self, facts: dict[str, Any]) -> Result:
        """What the node leaves: this training's tokens and FLOPs."""
        shape, length = shape_of(self.student), self.corpus.sequence_length
        own = student_flops(shape, length)
        if isinstance(self.taught.teacher, OnlineTeacher):
            own += inner_flops(shape, shape_of(self.taught.teacher.model), length, self.distill)
        return Result(
            facts,
            self.tokens,
            self.tokens * (own + self.taught.flops)
            + writing_flops(shape, length, self.written)
            + self.watched_tokens * shape.forward_flops(length),
            teacher_flops=self.tokens * self.taught.flops,
        )

    @property
    def watched_tokens(self) -> int:
        """Tokens of all measurements of the watched corpus."""
        if not self.watch:
            return 0
        return len(measured(self.steps)) * self.watch.rows * self.watch.corpus.sequence_length

    def watched(self, settings: DistillSettings) -> dict[str, Any]:
        """What the watch found, as facts; empty without one."""
        if not self.watch:
            return {}
        plan = settings.resolved(head_of(self.student).width, self.corpus.sequence_length)
        return {"watched": {**watch_facts(self.steps, plan.steps), "tokens": self.watched_tokens}}

    @property
    def ends(self) -> dict[str, Any]:
        """The first and the last step, as facts, and what the student wrote itself."""
        own = {"written_rows": self.written, "own_targets": sum(step.own_targets for step in self.steps)}
        ends = {"first": asdict(self.steps[0]), "last": asdict(self.steps[-1])}
        return {**ends, **(own if self.written else {})}
