"""Seconds of the calibration pass, beside a plain forward pass of transformers over the same tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cascade.distillation.settings import rows_of
from cascade.importance.calibration import calibrate
from tests.bench.options import Options
from tests.bench.parents import load_parent, read_text
from tests.bench.report import report, spread

TOKENS, BATCH, PAIRS = 2048, 4, 9
TARGET = 1.15


def run(options: Options) -> str:
    """Pairs of both, in turn, after one of each that does not count."""
    model, tokenizer = load_parent(options.parent)
    text = read_text(options.text, tokenizer)
    rows = text.corpus.train[: rows_of(options.tokens or TOKENS, text.corpus.sequence_length)]
    pairs = max(PAIRS, options.seeds)
    plain, ours = in_turn(lambda: forward(model, rows), lambda: calibrate(model, rows, batch=BATCH), pairs)
    ratios = [mine / other for mine, other in zip(ours, plain, strict=True)]
    of_medians = median(ours) / median(plain)
    return report(
        "calibration",
        ["pass", "seconds", "tokens/s", "ratio of a pair", "ratio of medians", "target"],
        [
            [
                "plain forward, no LM head",
                spread(plain, 2),
                f"{rows.numel() / median(plain):.0f}",
                "1",
                "1",
                "",
            ],
            [
                "calibrate, all statistics",
                spread(ours, 2),
                f"{rows.numel() / median(ours):.0f}",
                spread(ratios, 3),
                f"{of_medians:.3f}",
                f"at most {TARGET:g}: {verdict([median(ratios), of_medians])}",
            ],
        ],
        [
            f"{options.parent}, float32, {rows.numel():,} tokens in batches of {BATCH} rows",
            f"medians of {pairs} pairs, the two in turn; no random numbers",
            text.note,
        ],
    )


def verdict(ratios: Sequence[float]) -> str:
    """Where the machine is so noisy that one way to take the middle meets the target and another does not,
    the run has decided nothing."""
    met = {ratio <= TARGET for ratio in ratios}
    return "undecided" if len(met) > 1 else "met" if met == {True} else "missed"


@torch.no_grad()
def forward(model: PreTrainedModel, rows: Tensor) -> None:
    """What any calibration has to do at least."""
    for batch_BT in rows.split(BATCH):
        model.base_model(input_ids=batch_BT.long(), use_cache=False)


def in_turn(
    first: Callable[[], object], second: Callable[[], object], pairs: int
) -> tuple[list[float], list[float]]:
    """Seconds of each, so that what disturbs the machine disturbs both."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(pairs + 1):
        for work, found in zip((first, second), times, strict=True):
            began = time.perf_counter()
            work()
            found.append(time.perf_counter() - began)
    return times[0][1:], times[1][1:]
