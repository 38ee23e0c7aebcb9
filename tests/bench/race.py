"""The regret of a race against training every candidate to the end, and what either costs in tokens."""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import PreTrainedModel

from cascade.architecture import Architecture
from cascade.distillation.loop import Leg, distill
from cascade.distillation.settings import DistillSettings
from cascade.distillation.signals import Part
from cascade.evaluation.loss import cross_entropy
from cascade.family.children import judged_rows
from cascade.family.race import legs_of, race
from cascade.planning.budget import ratio_budget
from cascade.planning.plan import describe, distinct, rank_children
from cascade.storage.checkpoints import TrainingCheckpoints
from cascade.storage.locations import open_location
from tests.bench.children import Task, cascade_child
from tests.bench.options import Options
from tests.bench.parents import load_parent, read_text
from tests.bench.pruning import School, school_of
from tests.bench.report import report

RATIO, CANDIDATES, TOKENS, SEQUENCE = 0.6, 8, 4096, 256
# To score and fit; fewer than a recipe's, because every candidate is fitted.
CALIBRATED = 8192
# Tokens that the candidates are judged on; a recipe's race takes four times as many.
JUDGED = 4096
# And examined on at the end.
EXAMINED = 8192
GOAL_NATS, GOAL_SHARE = 0.01, 0.25


@dataclass(frozen=True)
class Run:
    """A candidate trained to the end. curve: CE on the race's own rows after each leg; final: held-out."""

    shape: Architecture
    curve: list[float]
    final: float


def run(options: Options) -> str:
    """All candidates to the end; a race sees only what it would have seen by then."""
    parent, tokenizer = load_parent(options.parent)
    text = read_text(options.text, tokenizer, sequence_length=SEQUENCE)
    settings = DistillSettings(options.tokens or TOKENS, batch_rows=1)
    with school_of(parent, text, settings) as school:
        task = Task(parent, RATIO, text.corpus.train[: CALIBRATED // SEQUENCE])
        budget = ratio_budget(task.source, RATIO)
        shapes = distinct(rank_children(task.source, task.source, budget), task.source, CANDIDATES)
        runs = [trained(school, shape, cascade_child(task, target=shape)) for shape in shapes]
    steps = school.settings.resolved(task.source.hidden, SEQUENCE).steps
    return table(runs, legs_of(len(runs), steps), [text.note, f"{settings.tokens:,} tokens, {steps} steps"])


def trained(school: School, shape: Architecture, student: PreTrainedModel) -> Run:
    """Leg by leg, which is bit for bit the whole training."""
    corpus, settings = school.text.corpus, school.settings
    plan = settings.resolved(shape.hidden, corpus.sequence_length)
    part, rows = judged_rows(corpus, plan.settings, JUDGED, len(school.rows))
    curve: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        start: TrainingCheckpoints | None = None
        for number, share in enumerate([*legs_of(CANDIDATES, plan.steps), 1.0]):
            end = TrainingCheckpoints(open_location(str(Path(folder) / str(number))))
            distill(student, school.teacher, corpus, settings=settings, leg=Leg(share, start, end))
            if share < 1:
                curve.append(cross_entropy(student, corpus, part, rows))
            start = end
    examined = range(min(EXAMINED // SEQUENCE, len(corpus.held_out)))
    found = Run(shape, curve, cross_entropy(student, corpus, Part.HELD_OUT, examined))
    print(f"race: {describe(shape)}: {found.curve}, {found.final:.4f}", file=sys.stderr, flush=True)
    return found


def winner(runs: list[Run]) -> int:
    """Whom the race would have picked."""
    candidates = [
        SimpleNamespace(pruned=None, legs=[(place, leg) for leg in range(len(runs[0].curve))])
        for place in range(len(runs))
    ]

    def make(node: Any) -> Any:
        facts = {"end": {"ce": runs[node[0]].curve[node[1]]}} if node else {}
        return SimpleNamespace(facts=facts)

    stage: Any = SimpleNamespace(candidates=candidates)
    return race(stage, make)


def table(runs: list[Run], parts: list[float], notes: list[str]) -> str:
    """One row a candidate, in the planner's order."""
    won, best = winner(runs), min(run.final for run in runs)
    standing, spent, before = len(runs), 1 - parts[-1], 0.0
    for part in parts:
        spent, before, standing = spent + standing * (part - before), part, -(-standing // 2)
    share, regret = spent / len(runs), runs[won].final - best
    verdict = "met" if regret <= GOAL_NATS and share <= GOAL_SHARE else "missed"
    header = ("candidate", *(f"CE at {part:.0%}" for part in parts), "held-out CE at the end", "")
    rows = [
        [
            describe(run.shape).partition(":")[0],
            *(f"{ce:.3f}" for ce in run.curve),
            f"{run.final:.4f}",
            "the race's winner" if place == won else "best" if run.final == best else "",
        ]
        for place, run in enumerate(runs)
    ]
    found = (
        f"regret {regret:.4f} nats for {share:.0%} of the tokens of training all "
        f"(at most {GOAL_NATS} for {GOAL_SHARE:.0%}): {verdict}"
    )
    first = f"the planner's first choice, without a race: {runs[0].final - best:.4f} nats above the best"
    return report("race", header, rows, [*notes, found, first])
