"""What cuts a model: importance scores, and the cut itself."""

from __future__ import annotations

from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from cascade.architecture import Architecture
from cascade.distillation.settings import rows_of
from cascade.family.cost import body_flops, importance_flops
from cascade.family.models import read_only, shape_of
from cascade.family.workplace import PassedTokens, Result, Workplace
from cascade.importance.agreement import doubts, layer_doubts
from cascade.importance.method import Aggregation, LayerScore, Method, Scoring
from cascade.importance.scores import score
from cascade.importance.scoring import scores_of
from cascade.models.folders import load_folder, load_folder_tokenizer, save_model
from cascade.planning.axes import Axis
from cascade.pruning.prune import Surgery, prune
from cascade.pruning.repair import Repair
from cascade.storage.artifacts import read_manifest
from cascade.storage.locations import open_location

SCORES = "scores.safetensors"


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
