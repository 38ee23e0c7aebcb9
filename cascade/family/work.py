"""What each kind of node does: one function a kind, from verified inputs to files and facts."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from cascade.architecture import Architecture
from cascade.data import corpus as corpora
from cascade.data.corpus import Corpus, require_tokens
from cascade.data.packing import pack
from cascade.data.sources import Source, documents, fingerprint
from cascade.distillation.labels import CorpusTeacher
from cascade.distillation.loop import WHOLE, Leg, distill
from cascade.distillation.lora import LowRank
from cascade.distillation.mixture import MixedTeacher, live
from cascade.distillation.objectives import Objective
from cascade.distillation.on_policy import OwnRows, Writing
from cascade.distillation.schedules import Schedule, WeightSchedule
from cascade.distillation.settings import DistillSettings, rows_of
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
from cascade.distillation.training_state import StepRecord
from cascade.errors import InputError
from cascade.evaluation.gate import gate
from cascade.evaluation.loss import cross_entropy
from cascade.evaluation.metrics import evaluate
from cascade.family.cost import body_flops, importance_flops, student_flops, teacher_flops, writing_flops
from cascade.family.extension import child_config, teacher_config
from cascade.family.graph import Kind, Section
from cascade.family.layout import RACE_PART
from cascade.family.students import make_initialised, make_parent, the_source
from cascade.family.teachers import role
from cascade.family.workplace import PassedTokens, Result, Workplace
from cascade.importance.agreement import doubts, layer_doubts
from cascade.importance.method import Aggregation, LayerScore, Method, Scoring
from cascade.importance.scores import score
from cascade.importance.scoring import scores_of
from cascade.models.decoder import decoder_of
from cascade.models.folders import (
    load_folder,
    load_folder_config,
    load_folder_tokenizer,
    save_model,
)
from cascade.models.sources import load_tokenizer
from cascade.planning.axes import Axis
from cascade.pruning.prune import Surgery, prune
from cascade.pruning.repair import Repair
from cascade.roles import Correction
from cascade.storage.artifacts import read_manifest, require_manifest
from cascade.storage.checkpoints import TrainingCheckpoints
from cascade.storage.locations import open_location

SCORES = "scores.safetensors"
STEPS = "steps.jsonl"
METRICS = "metrics.json"
STATE = "state"


def make_corpus(place: Workplace) -> Result:
    """Documents to packed rows; too little text for a stage is an error before anything is stored."""
    section, hints = place.job.section, place.job.hints
    tokenizer = load_tokenizer(the_source(place, section["tokenizer"]))
    sources = [Source(**source) for source in hints["sources"]]
    packed = pack(
        itertools.chain.from_iterable(documents(source) for source in sources),
        tokenizer,
        sequence_length=section["sequence_length"],
        held_out=section["held_out"],
        seed=section["seed"],
        separate=section.get("separate_documents", False),
        report=place.report,
    )
    require_unchanged(sources, [source["fingerprint"] for source in section["sources"]])
    corpora.write(packed, place.folder)
    corpus = Corpus.open(place.folder)
    for need in hints["needs"]:
        require_tokens(len(corpus.train), corpus.sequence_length, **need)
    return Result(packed.facts(), tokens=(len(corpus.train) + len(corpus.held_out)) * corpus.sequence_length)


def require_unchanged(sources: list[Source], planned: list[str]) -> None:
    """What was just read must be what was planned, or it would be stored under another text's key."""
    for source, expected in zip(sources, planned, strict=True):
        if fingerprint(source) != expected:
            raise InputError(
                "a corpus source changed after the family was planned",
                value=source.path,
                where="corpus.sources",
                remedy="run the command again; it plans with the source as it is now",
            )


def make_signals(place: Workplace) -> Result:
    """The teacher's one forward pass for the whole family; shards that an earlier try finished are kept."""
    corpus, section = place.corpus(), place.job.section
    rows = signal_rows(corpus, section["tokens"])
    held_out = held_out_rows(corpus, section["held_out_tokens"])
    teacher = the_model(place, "parent")
    shape, finished = shape_of(teacher), FinishedShards(place.job.training)
    facts = write_signals(
        teacher,
        corpus,
        place.folder,
        rows,
        held_out,
        codec=codec_of(section, shape.hidden, shape.vocabulary),
        finished=finished,
        report=place.report,
    )
    tokens = (rows + held_out) * corpus.sequence_length
    flops = tokens * shape.forward_flops(corpus.sequence_length)
    return Result(facts, tokens, flops, teacher_flops=flops, after_publish=finished.delete)


def signal_rows(corpus: Corpus, tokens: int) -> int:
    """Training rows that so many tokens go through, once."""
    return min(rows_of(tokens, corpus.sequence_length), len(corpus.train))


def make_importance(place: Workplace) -> Result:
    """Statistics of the checkpoint that is to be cut, for most methods from one calibration pass."""
    section = place.job.section
    rows = calibration_rows(place)
    method, drops = Method(section["method"]), section.get("drops", ())
    model = read_only(place, "checkpoint")
    if method is Method.TAYLOR:
        # Gradients are summed in the model's own type.
        model = model.float()
    found = score(model, rows, method, drops=drops, seed=section.get("seed", 0), report=place.report)
    save_file(found.statistics, place.folder / SCORES)
    flops = importance_flops(shape_of(model), method, rows.shape[1], drops)
    return Result({"agreement": found.agreement}, rows.numel() if flops else 0, rows.numel() * flops)


def read_scoring(record: dict[str, Any]) -> Scoring:
    """What `asdict` made of a scoring, after its way through JSON."""
    return Scoring(LayerScore(record["layers"]), record["contiguous"], Aggregation(record["aggregation"]))


def calibration_rows(place: Workplace) -> Tensor:
    """The first training rows, as many as the job's section asks for or as there are."""
    corpus = place.corpus()
    rows = rows_of(place.job.section["calibration_tokens"], corpus.sequence_length)
    return corpus.train[: min(rows, len(corpus.train))]


def make_pruned(place: Workplace) -> Result:
    """Cut the checkpoint to the planned architecture."""
    folder, trust, section = place.input("checkpoint"), place.job.options.trust_remote_code, place.job.section
    target = Architecture.from_record(section["architecture"])
    rows = calibration_rows(place) if "calibration_tokens" in section else None
    # What looks at the corpus runs the model over it.
    device = place.device if rows is not None else "cpu"
    model = load_folder(folder, device=device, trust_remote_code=trust)
    statistics = load_file(place.input("importance") / SCORES)
    source, scoring = shape_of(model), read_scoring(section["scoring"])
    dropped = source.layers - target.layers
    scores = scores_of(statistics, scoring, dropped)
    measured = read_manifest(open_location(place.job.inputs["importance"]["uri"]))
    if measured:
        axes = [axis for axis in Axis if axis.size(target) < axis.size(source)]
        found = doubts(measured.facts["agreement"], measured.tokens, scoring, axes)
        for doubt in [*found, *layer_doubts(statistics, measured.tokens, scoring, dropped)]:
            place.report.log(f"warning: {doubt}")
    surgery = Surgery(section["rotate"], Repair(section["repair"]))
    passed = PassedTokens(place.report)
    child, kept = prune(model, target, scores, surgery=surgery, rows=rows, report=passed)
    save_model(child, load_folder_tokenizer(folder, trust), place.folder)
    flops = passed.tokens * body_flops(source, place.corpus().sequence_length) if passed.tokens else 0
    return Result({"parameters": target.parameters, "kept": kept}, passed.tokens, flops)


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
    place.report.log(f"the steps are written to {place.step_file}")
    with place.stop.cooperative():
        steps = distill(
            student,
            taught.teacher,
            corpus,
            settings=settings_of(place.job.section),
            source=OwnRows(student, live(taught.teacher), corpus, writing) if writing else None,
            leg=leg,
            checkpoints=checkpoints,
            checkpoint_seconds=place.job.options.checkpoint_seconds,
            gradient_checkpointing=place.job.options.gradient_checkpointing,
            step_file=place.step_file,
            report=place.report,
            should_stop=place.stop,
        )
    shutil.move(place.step_file, place.folder / STEPS)
    tokens = steps[-1].tokens - before
    written = writing.own_before(tokens // corpus.sequence_length) if writing else 0
    return Trained(student, taught, corpus, steps, tokens, checkpoints, written)


@dataclass(frozen=True)
class Trained:
    """A training's end. steps: with those of legs before; tokens: of this one; written: rows of these tokens
    that the student wrote."""

    student: PreTrainedModel
    taught: Taught
    corpus: Corpus
    steps: list[StepRecord]
    tokens: int
    checkpoints: TrainingCheckpoints
    written: int = 0

    def result(self, facts: dict[str, Any]) -> Result:
        """What the node leaves: this training's tokens and FLOPs, and no snapshots."""
        shape, length = shape_of(self.student), self.corpus.sequence_length
        own = student_flops(shape, length)
        return Result(
            facts,
            self.tokens,
            self.tokens * (own + self.taught.flops) + writing_flops(shape, length, self.written),
            teacher_flops=self.tokens * self.taught.flops,
            after_publish=self.checkpoints.delete,
        )

    @property
    def ends(self) -> dict[str, Any]:
        """The first and the last step, as facts, and what the student wrote itself."""
        own = {"written_rows": self.written, "own_targets": sum(step.own_targets for step in self.steps)}
        ends = {"first": asdict(self.steps[0]), "last": asdict(self.steps[-1])}
        return {**ends, **(own if self.written else {})}


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


def taught_whole(teacher: Teacher) -> bool:
    """Whether the teacher answers for training rows with whole distributions."""
    return teacher.whole(Part.TRAIN) if isinstance(teacher, StoredTeacher) else True


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
    return done.result({**done.ends, "gate": gate(place.folder, shape_of(done.student).parameters)})


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
        after_publish=done.checkpoints.delete,
    )


def make_evaluated(place: Workplace) -> Result:
    """Held-out figures of every checkpoint among the inputs, against the parent."""
    states = ("pruned", "distilled", "on_policy")
    return measured(place, [name for name in states if name in place.job.inputs] or ["parent"])


def make_evaluated_long(place: Workplace) -> Result:
    """Figures on held-out long rows: the short child with the new RoPE settings, the extended one, the
    parent."""
    return measured(place, ["distilled", "extended", "parent"])


def measured(place: Workplace, names: list[str]) -> Result:
    """Held-out figures of these inputs, against the parent."""
    corpus = place.corpus()
    rows = held_out_rows(corpus, place.job.section["held_out_tokens"])
    teacher, parent = the_teacher(place, corpus)
    facts: dict[str, Any] = {}
    flops, length = 0, corpus.sequence_length
    tokens = rows * length
    for name in names:
        model = the_model(place, name)
        facts[name] = asdict(evaluate(model, teacher, corpus, range(rows), report=place.report))
        flops += tokens * shape_of(model).forward_flops(length)
    (place.folder / METRICS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    parents = tokens * len(names) * teacher_flops(parent, length, "signals" in place.job.inputs)
    return Result(facts, tokens * len(names), flops + parents, teacher_flops=parents)


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


def the_model(place: Workplace, name: str) -> PreTrainedModel:
    """An input for inference; on long rows with the RoPE settings that the job has for it."""
    section, trust = place.job.section, place.job.options.trust_remote_code
    if name == "parent" and "teacher_rope" in section:
        config = teacher_config(load_folder_config(place.input(name), trust), section["teacher_rope"])
    elif name == "distilled" and "rope" in section:
        config = child_config(load_folder_config(place.input(name), trust), section["rope"])
    else:
        config = None
    return read_only(place, name, config)


def read_only(place: Workplace, name: str, config: PreTrainedConfig | None = None) -> PreTrainedModel:
    """An input checkpoint for inference; config: in place of its own."""
    return load_folder(
        place.input(name),
        place.working_dtype,
        place.device,
        trust_remote_code=place.job.options.trust_remote_code,
        config=config,
    )


def shape_of(model: PreTrainedModel) -> Architecture:
    """The architecture of a loaded model."""
    return decoder_of(model).architecture


WORK: dict[Kind, Callable[[Workplace], Result]] = {
    Kind.CORPUS: make_corpus,
    Kind.PARENT: make_parent,
    Kind.GIVEN: make_parent,
    Kind.CORRECTED: make_corrected,
    Kind.SIGNALS: make_signals,
    Kind.IMPORTANCE: make_importance,
    Kind.PRUNED: make_pruned,
    Kind.INITIALISED: make_initialised,
    Kind.RACED: make_raced,
    Kind.DISTILLED: make_distilled,
    Kind.ON_POLICY: make_distilled,
    Kind.EXTENDED: make_extended,
    Kind.EVALUATED: make_evaluated,
    Kind.EVALUATED_LONG: make_evaluated_long,
}
