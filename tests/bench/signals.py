"""Stored signals: the speed of a step beside cross-entropy, and the quality of what is learned, by codec.

N tokens, V vocabulary, C tokens of one chunk.
"""

from __future__ import annotations

import copy
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from transformers import PreTrainedModel

from cascade.data.corpus import Corpus
from cascade.distillation.fused import chunk_tokens
from cascade.distillation.loop import distill
from cascade.distillation.settings import DistillSettings, rows_of
from cascade.distillation.signals import Part, StoredTeacher, batch_ids, make_codec, write_signals
from cascade.distillation.states import final_states, head_of
from cascade.evaluation.metrics import Metrics, evaluate
from tests.bench.children import Task, calibration_rows, cascade_child
from tests.bench.options import Options
from tests.bench.parents import Text, load_parent, read_text
from tests.bench.report import report, spread
from tests.bench.steps import alternate, step_rows

RATIO, TOKENS, EVALUATED, STEPS = 0.75, 8192, 4096, 7
# The first is what the others are compared with.
CODECS = ("hidden_bf16", "hidden_int8", "head_and_tail", "sampled", "top_k")
TOKEN_BYTES = 24
BINS = 15
NEAR_NATS, NEAR_POINTS = 0.005, 0.5


@dataclass(frozen=True)
class Taught:
    """A child after distillation. error: expected calibration error in percent points."""

    metrics: Metrics
    error: float


def run(options: Options) -> str:
    """Both tables; for every seed the training text in another order and other draws."""
    parent, tokenizer = load_parent(options.parent)
    settings = DistillSettings(options.tokens or TOKENS)
    taught: dict[str, list[Taught]] = {name: [] for name in CODECS}
    for seed in range(options.seeds):
        text = read_text(options.text, tokenizer, seed=seed)
        child = cascade_child(Task(parent, RATIO, calibration_rows(text)))
        with teachers_of(parent, text, settings.tokens, seed) as (teachers, sizes):
            if seed == 0:
                figures = alternate(copy.deepcopy(child), text.corpus, dict(teachers), STEPS)
                fast = step_rows(figures, text.corpus.sequence_length, sizes)
            held_out = evaluated_rows(text.corpus)
            examiner = teachers[CODECS[0]]
            before = evaluate(child, examiner, text.corpus, held_out)
            for name, teacher in teachers.items():
                began = time.monotonic()
                student = copy.deepcopy(child)
                distill(student, teacher, text.corpus, settings=settings)
                taught[name].append(examined(student, examiner, text.corpus, held_out))
                seconds, last = time.monotonic() - began, taught[name][-1].metrics
                said = f"{last.held_out_ce:.4f} nats, KL {last.kl_to_parent:.4f}, {seconds:.0f} s"
                print(f"signals: seed {seed}, {name}: {said}", file=sys.stderr, flush=True)
    notes = [
        f"{options.parent}, float32; child: {RATIO:.0%} of the body, cut by the defaults, cross-entropy "
        f"{before.held_out_ce:.3f} nats on {before.tokens:,} held-out targets",
        text.note,
    ]
    header = ["step", "bytes/token", "tokens/s", "of cross-entropy's", "peak MiB", "of cross-entropy's"]
    speed = report(
        "signals: a step of one row",
        [*header, "95 % and 1.1x"],
        fast,
        [*notes, f"medians of {STEPS} rounds of all steps in turn, AdamW included; peak: resident size"],
    )
    plan = settings.resolved(head_of(child).width, text.corpus.sequence_length)
    learned = f"distilled on {plan.tokens:,} tokens in {plan.steps} steps, seeds: {options.seeds}"
    columns = ["codec", "bytes/token", "CE", "KL to parent", "ECE, points", "CE - first's", "ECE - first's"]
    compared = [*columns, f"within {NEAR_NATS} and {NEAR_POINTS}"]
    quality = report(
        "signals: what is learned", compared, list(quality_rows(taught, sizes)), [*notes, learned]
    )
    return f"{speed}\n{quality}"


@contextmanager
def teachers_of(
    parent: PreTrainedModel, text: Text, tokens: int, seed: int
) -> Iterator[tuple[dict[str, StoredTeacher], dict[str, str]]]:
    """A teacher for each codec, and the bytes of a token that its files take; the first has held-out rows."""
    corpus, head = text.corpus, head_of(parent)
    rows = min(rows_of(tokens, corpus.sequence_length), len(corpus.train))
    teachers, sizes = {}, {}
    with tempfile.TemporaryDirectory() as root:
        for name in CODECS:
            folder = Path(root) / name
            codec = make_codec(name, head.width, head.vocabulary, token_bytes=TOKEN_BYTES, seed=seed)
            held_out = 0 if teachers else len(evaluated_rows(corpus))
            record = write_signals(parent, corpus, folder, max(rows, STEPS + 1), held_out, codec=codec)
            teachers[name] = StoredTeacher(folder, head, corpus.identity)
            sizes[name] = f"{record['bytes_per_token']:.1f}"
        yield teachers, sizes


def evaluated_rows(corpus: Corpus) -> range:
    """Held-out rows."""
    return range(min(rows_of(EVALUATED, corpus.sequence_length), len(corpus.held_out)))


def examined(student: PreTrainedModel, teacher: StoredTeacher, corpus: Corpus, rows: range) -> Taught:
    """Held-out figures."""
    metrics = evaluate(student, teacher, corpus, rows)
    return Taught(metrics, 100 * calibration_error(student, corpus, rows))


@torch.no_grad()
def calibration_error(model: PreTrainedModel, corpus: Corpus, rows: Sequence[int]) -> float:
    """Expected calibration error (Guo et al., 1706.04599, eq. 3): over bins of the likeliest token's
    probability, the mean distance between that probability and how often the token is right."""
    sums = torch.zeros(3, BINS, dtype=torch.float64)
    size = chunk_tokens(head_of(model).vocabulary)
    for row in rows:
        ids_BT = batch_ids(corpus, Part.HELD_OUT, [row], torch.device("cpu"))
        states_ND, labels_N = final_states(model, ids_BT)[0, :-1], ids_BT[0, 1:]
        for cut in (slice(at, at + size) for at in range(0, len(labels_N), size)):
            sure_C, first_C = head_of(model).logits(states_ND[cut]).softmax(-1).max(-1)
            bins_C = (sure_C * BINS).long().clamp_max(BINS - 1)
            right_C = (first_C == labels_N[cut]).double()
            sums.index_add_(1, bins_C, torch.stack([torch.ones_like(right_C), sure_C.double(), right_C]))
    return ((sums[1] - sums[2]).abs().sum() / sums[0].sum()).item()


def quality_rows(taught: dict[str, list[Taught]], sizes: dict[str, str]) -> Iterator[list[str]]:
    """A row a codec; differences are those of the same seed, their median where there are several."""
    first = taught[CODECS[0]]
    for name, found in taught.items():
        pairs = list(zip(found, first, strict=True))
        nats = median(own.metrics.held_out_ce - base.metrics.held_out_ce for own, base in pairs)
        points = median(own.error - base.error for own, base in pairs)
        near = abs(nats) <= NEAR_NATS and abs(points) <= NEAR_POINTS
        yield [
            name,
            sizes[name],
            spread([own.metrics.held_out_ce for own in found], 4),
            spread([own.metrics.kl_to_parent for own in found], 4),
            spread([own.error for own in found], 2),
            f"{nats:+.4f}",
            f"{points:+.2f}",
            "" if name == CODECS[0] else "yes" if near else "no",
        ]
