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
from transformers import PreTrainedModel

from cascade.architecture import Architecture
from cascade.data import corpus as corpora
from cascade.data.corpus import Corpus, require_tokens
from cascade.data.packing import pack
from cascade.data.sources import Source, documents, fingerprint
from cascade.distillation.loop import WHOLE, Leg, distill
from cascade.distillation.settings import DistillSettings, rows_of
from cascade.distillation.signals import OnlineTeacher, Part, StoredTeacher, Teacher, write_signals
from cascade.distillation.states import head_of
from cascade.distillation.training_state import StepRecord
from cascade.errors import InputError
from cascade.evaluation.gate import gate
from cascade.evaluation.metrics import evaluate
from cascade.family.cost import evaluation_flops, importance_flops, training_flops
from cascade.family.graph import Kind
from cascade.family.layout import RACE_PART
from cascade.family.workplace import Result, Workplace
from cascade.importance.agreement import doubts
from cascade.importance.method import Aggregation, LayerScore, Method, Scoring
from cascade.importance.scores import score
from cascade.importance.scoring import scores_of
from cascade.models.decoder import decoder_of
from cascade.models.folders import load_folder, load_folder_tokenizer, save_model
from cascade.models.sources import ParentSource, load_model, load_tokenizer, resolve_parent
from cascade.planning.axes import Axis
from cascade.pruning.prune import Surgery, prune
from cascade.pruning.repair import Repair
from cascade.storage.artifacts import read_manifest
from cascade.storage.checkpoints import TrainingCheckpoints
from cascade.storage.locations import open_location

SCORES = "scores.safetensors"
STEPS = "steps.jsonl"
METRICS = "metrics.json"
STATE = "state"
# A race is judged on so many tokens at most: enough to tell candidates a hundredth of a nat apart, because
# all are judged on the same ones.
JUDGED_TOKENS = 16_384


def make_corpus(place: Workplace) -> Result:
    """Documents to packed rows; too little text for a stage is an error before anything is stored."""
    section, hints = place.job.section, place.job.hints
    tokenizer = load_tokenizer(the_parent(place, section["tokenizer"]))
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


def make_parent(place: Workplace) -> Result:
    """The parent as a plain Hugging Face folder in its own precision, whatever form it came in."""
    source = the_parent(place, place.job.section["fingerprint"])
    model = load_model(source)
    architecture = decoder_of(model).architecture
    save_model(model, load_tokenizer(source), place.folder)
    return Result({"parameters": architecture.parameters, "architecture": architecture.record()})


def the_parent(place: Workplace, fingerprint: str) -> ParentSource:
    """The parent that was planned; raises InputError when its content has changed since."""
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


def make_signals(place: Workplace) -> Result:
    """The teacher's one forward pass for the whole family."""
    corpus, section = place.corpus(), place.job.section
    rows = min(rows_of(section["tokens"], corpus.sequence_length), len(corpus.train))
    held_out = held_out_rows(corpus, section["held_out_tokens"])
    teacher = read_only(place, "parent")
    facts = write_signals(teacher, corpus, place.folder, rows, held_out, report=place.report)
    tokens = (rows + held_out) * corpus.sequence_length
    return Result(facts, tokens, tokens * shape_of(teacher).forward_flops(corpus.sequence_length))


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
    scores = scores_of(statistics, scoring, source.layers - target.layers)
    measured = read_manifest(open_location(place.job.inputs["importance"]["uri"]))
    if measured:
        axes = [axis for axis in Axis if axis.size(target) < axis.size(source)]
        for doubt in doubts(measured.facts["agreement"], measured.tokens, scoring, axes):
            place.report.log(f"warning: {doubt}")
    surgery = Surgery(section["rotate"], Repair(section["repair"]))
    child, kept = prune(model, target, scores, surgery=surgery, rows=rows, report=place.report)
    save_model(child, load_folder_tokenizer(folder, trust), place.folder)
    return Result({"parameters": target.parameters, "kept": kept})


def train(place: Workplace, leg: Leg) -> Trained:
    """The job's training, or a leg of it."""
    corpus, folder = place.corpus(), place.input("student")
    trust = place.job.options.trust_remote_code
    student = load_folder(folder, torch.float32, place.device, trust_remote_code=trust)
    checkpoints = TrainingCheckpoints(place.job.training)
    before = 0
    if "raced" in place.job.inputs:
        raced = place.input("raced")
        leg = replace(leg, start=TrainingCheckpoints(open_location(str(raced / STATE))))
        before = json.loads((raced / STEPS).read_text("utf-8").splitlines()[-1])["tokens"]
    teacher, parent = the_teacher(place, corpus)
    place.report.log(f"the steps are written to {place.step_file}")
    with place.stop.cooperative():
        steps = distill(
            student,
            teacher,
            corpus,
            settings=DistillSettings(**place.job.section["distill"]),
            leg=leg,
            checkpoints=checkpoints,
            checkpoint_seconds=place.job.options.checkpoint_seconds,
            gradient_checkpointing=place.job.options.gradient_checkpointing,
            step_file=place.step_file,
            report=place.report,
            should_stop=place.stop,
        )
    shutil.move(place.step_file, place.folder / STEPS)
    flops = training_flops(shape_of(student), parent, corpus.sequence_length, "signals" in place.job.inputs)
    return Trained(student, teacher, corpus, steps, steps[-1].tokens - before, flops, checkpoints)


@dataclass(frozen=True)
class Trained:
    """A training's end. steps: with those of legs before; tokens: of this one; flops: of a token."""

    student: PreTrainedModel
    teacher: Teacher
    corpus: Corpus
    steps: list[StepRecord]
    tokens: int
    flops: int
    checkpoints: TrainingCheckpoints


def make_raced(place: Workplace) -> Result:
    """A leg of a candidate's training: its state, and its loss on rows that no leg trains on."""
    section = place.job.section
    end = TrainingCheckpoints(open_location(str(place.folder / STATE)))
    done = train(place, Leg(section["part"], end=end))
    held_out = held_out_rows(done.corpus, section["held_out_tokens"])
    part, rows = judged_rows(done.corpus, DistillSettings(**section["distill"]), held_out)
    metrics = evaluate(done.student, done.teacher, done.corpus, rows, part=part, report=place.report)
    end_figures = {"ce": metrics.held_out_ce, "kl": metrics.kl_to_parent}
    facts = {"end": {"tokens": done.steps[-1].tokens, **end_figures}}
    return Result(facts, done.tokens, done.tokens * done.flops, after_publish=done.checkpoints.delete)


def judged_rows(corpus: Corpus, settings: DistillSettings, held_out: int) -> tuple[Part, list[int]]:
    """Rows that no leg of a race trains on, the same for all: the training's last ones.

    Where every row is seen before the race is over, they are the `held_out` rows that are evaluated.
    """
    whole = rows_of(settings.tokens, corpus.sequence_length)
    # The last leg ends with a whole step.
    last = math.ceil(RACE_PART * whole) + (settings.batch_rows or 1)
    raced = {corpus.row(position) for position in range(last)}
    unseen = dict.fromkeys(corpus.row(position) for position in reversed(range(whole)))
    most = max(1, JUDGED_TOKENS // corpus.sequence_length)
    rows = [row for row in unseen if row not in raced][:most]
    return (Part.TRAIN, rows) if rows else (Part.HELD_OUT, list(range(min(most, held_out))))


def make_distilled(place: Workplace) -> Result:
    """Teach the cut model; the gate admits it before it is published."""
    folder, trust = place.input("student"), place.job.options.trust_remote_code
    done = train(place, WHOLE)
    save_model(done.student, load_folder_tokenizer(folder, trust), place.folder)
    facts = {
        "first": asdict(done.steps[0]),
        "last": asdict(done.steps[-1]),
        "gate": gate(place.folder, shape_of(done.student).parameters),
    }
    return Result(facts, done.tokens, done.tokens * done.flops, after_publish=done.checkpoints.delete)


def make_evaluated(place: Workplace) -> Result:
    """Held-out figures of every checkpoint among the inputs, against the parent."""
    corpus = place.corpus()
    rows = held_out_rows(corpus, place.job.section["held_out_tokens"])
    teacher, parent = the_teacher(place, corpus)
    names = ["pruned", "distilled"] if "distilled" in place.job.inputs else ["parent"]
    facts: dict[str, Any] = {}
    flops, tokens = 0, rows * corpus.sequence_length
    for name in names:
        model = read_only(place, name)
        facts[name] = asdict(evaluate(model, teacher, corpus, range(rows), report=place.report))
        flops += tokens * evaluation_flops(
            shape_of(model), parent, corpus.sequence_length, "signals" in place.job.inputs
        )
    (place.folder / METRICS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return Result(facts, tokens * len(names), flops)


def held_out_rows(corpus: Corpus, tokens: int) -> int:
    """Rows that are evaluated: as many as asked for, or all there are."""
    return min(rows_of(tokens, corpus.sequence_length), len(corpus.held_out))


def the_teacher(place: Workplace, corpus: Corpus) -> tuple[Teacher, Architecture]:
    """The parent, from its stored signals where the family has them, and its architecture."""
    model = read_only(place, "parent")
    if "signals" not in place.job.inputs:
        return OnlineTeacher(model, corpus), shape_of(model)
    return StoredTeacher(place.input("signals"), head_of(model), corpus.identity), shape_of(model)


def read_only(place: Workplace, name: str) -> PreTrainedModel:
    """An input checkpoint for inference."""
    trust = place.job.options.trust_remote_code
    return load_folder(place.input(name), place.working_dtype, place.device, trust_remote_code=trust)


def shape_of(model: PreTrainedModel) -> Architecture:
    """The architecture of a loaded model."""
    return decoder_of(model).architecture


WORK: dict[Kind, Callable[[Workplace], Result]] = {
    Kind.CORPUS: make_corpus,
    Kind.PARENT: make_parent,
    Kind.SIGNALS: make_signals,
    Kind.IMPORTANCE: make_importance,
    Kind.PRUNED: make_pruned,
    Kind.RACED: make_raced,
    Kind.DISTILLED: make_distilled,
    Kind.EVALUATED: make_evaluated,
}
