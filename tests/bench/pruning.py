"""Held-out cross-entropy after pruning and after distillation, beside presets and peers at equal budgets."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from cascade.distillation.loop import distill
from cascade.distillation.settings import DistillSettings, rows_of
from cascade.distillation.signals import StoredTeacher, Teacher, write_signals
from cascade.distillation.states import head_of
from cascade.evaluation.metrics import Metrics, evaluate
from cascade.models.decoder import decoder_of
from tests.bench.children import LENIENCE, Task, calibration_rows, makers
from tests.bench.options import Options
from tests.bench.outcomes import HEADER, LEGEND, Outcome, rows
from tests.bench.parents import Text, load_parent, read_text
from tests.bench.report import report

RATIOS = (0.75, 0.5)
TOKENS, EVALUATED = 8192, 2048
# Children with random scores: one alone says little.
DRAWS = 3


@dataclass(frozen=True)
class School:
    """What every child is taught and examined with. rows: held out."""

    text: Text
    teacher: Teacher
    settings: DistillSettings
    rows: range

    def examine(self, model: PreTrainedModel) -> Metrics:
        """Held-out figures."""
        return evaluate(model, self.teacher, self.text.corpus, self.rows)

    def teach(self, name: str, ratio: float, child: PreTrainedModel) -> Outcome:
        """Examine the child, teach it, and examine it again."""
        began, pruned = time.monotonic(), self.examine(child)
        distill(child, self.teacher, self.text.corpus, settings=self.settings)
        outcome = Outcome(name, ratio, decoder_of(child).architecture, pruned, self.examine(child))
        figures = f"{pruned.held_out_ce:.4f}, distilled {outcome.distilled.held_out_ce:.4f} nats"
        seconds = f"{time.monotonic() - began:.0f} s"
        print(f"pruning: {ratio:.0%}, {name}: {figures}, {seconds}", file=sys.stderr, flush=True)
        return outcome


def run(options: Options) -> str:
    """Every child at every budget, for every seed again with the training text in another order."""
    parent, tokenizer = load_parent(options.parent)
    body = decoder_of(parent).architecture.non_embedding_parameters
    settings = DistillSettings(options.tokens or TOKENS)
    draws = -(-DRAWS // options.seeds)
    outcomes: list[Outcome] = []
    for seed in range(options.seeds):
        text = read_text(options.text, tokenizer, seed=seed)
        with school_of(parent, text, settings) as school:
            own = school.examine(parent)
            outcomes += children(school, parent, range(seed * draws, (seed + 1) * draws))
    notes = [*described(options, school, own), text.note, LEGEND]
    return report("pruning", HEADER, list(rows(outcomes, own, body)), notes)


@contextmanager
def school_of(parent: PreTrainedModel, text: Text, settings: DistillSettings) -> Iterator[School]:
    """The parent's answers are computed once for all children."""
    corpus = text.corpus
    held_out = min(rows_of(EVALUATED, corpus.sequence_length), len(corpus.held_out))
    taught = min(rows_of(settings.tokens, corpus.sequence_length), len(corpus.train))
    with tempfile.TemporaryDirectory() as folder:
        write_signals(parent, corpus, Path(folder), taught, held_out)
        teacher = StoredTeacher(Path(folder), head_of(parent), corpus.identity)
        yield School(text, teacher, settings, range(held_out))


def children(school: School, parent: PreTrainedModel, draws: range) -> Iterator[Outcome]:
    """Made and taught one after another, on the same calibration and training rows."""
    for ratio in RATIOS:
        task = Task(parent, ratio, calibration_rows(school.text))
        for name, make in makers(draws):
            yield school.teach(name, ratio, make(task))


def described(options: Options, school: School, own: Metrics) -> list[str]:
    """What was run, in words."""
    width, length = school.teacher.head.width, school.text.corpus.sequence_length
    plan = school.settings.resolved(width, length)
    draws = options.seeds * -(-DRAWS // options.seeds)
    calibrated = calibration_rows(school.text).numel()
    calibrated, step = calibration_rows(school.text).numel(), plan.batch_rows * length
    return [
        f"{options.parent}, float32: cross-entropy {own.held_out_ce:.3f} nats on {own.tokens:,} targets",
        "peers cut the FFN alone, to the planner's widest within the budget; "
        f"OptiPFair's cuts of layers may exceed it by {LENIENCE:.1%}, as one layer is a coarse step",
        f"calibrated on {calibrated:,} tokens, distilled on {plan.tokens:,} by forward KL to the parent, "
        f"in {plan.steps} steps of {step}, peak rate {plan.peak_rate:.2g} at the parent's width",
        f"seeds: {options.seeds} orders of the training text, {draws} draws of random scores",
    ]
