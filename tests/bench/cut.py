"""Seconds and memory of one cut, beside torch-pruning's own pruner."""

from __future__ import annotations

import json
import subprocess
import sys
from statistics import median

from cascade.planning.plan import describe
from tests.bench.options import Options
from tests.bench.report import report, spread
from tests.bench.trial import METHODS, RATIO, target

FEWEST = 3
# Seconds, and extra memory relative to the model.
TARGET = (3.0, 1.2)
OURS = "cascade"
Figures = dict[str, list[float]]


def run(options: Options) -> str:
    """All methods in turn, for every seed again, each in a process of its own."""
    repeats = max(FEWEST, options.seeds)
    found: dict[str, Figures] = {method: {"seconds": [], "extra": []} for method in METHODS}
    for seed in range(repeats):
        for method in METHODS:
            figures = trial(method, seed)
            found[method]["seconds"].append(figures["seconds"])
            found[method]["extra"].append(figures["extra"] / figures["size"])
    return report(
        "cut",
        ["method", "seconds", "of cascade's", "extra peak memory / model", "target"],
        [row(method, figures, found[OURS]) for method, figures in found.items()],
        [
            f"Qwen2.5-0.5B's sizes, random weights, float32, to {RATIO:.0%} of the non-embedding parameters "
            f"by its FFN alone: {describe(target())}",
            f"medians of {repeats} seeds, each in a fresh process, the methods in turn",
            "cascade is given scores, leaves the model as it is and builds a second one; its seconds include "
            "the proof that cuts of the class are exact, which a second cut in a process does without",
            "torch-pruning changes the model in place; its seconds include its scores and its graph, from "
            "which attention is kept out because it hangs on grouped queries",
        ],
    )


def trial(method: str, seed: int) -> dict[str, float]:
    """The figures of one process."""
    command = [sys.executable, "-m", "tests.bench.trial", method, str(seed)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(f"cut: {method}, seed {seed}: {figures}", file=sys.stderr, flush=True)
    return figures


def row(method: str, figures: Figures, ours: Figures) -> list[str]:
    """One line of the table."""
    seconds, extra = figures["seconds"], figures["extra"]
    ratios = [mine / other for mine, other in zip(seconds, ours["seconds"], strict=True)]
    goals = [(median(seconds), TARGET[0], " s"), (median(extra), TARGET[1], "")]
    verdicts = [f"{most:g}{unit}: {'met' if got < most else 'missed'}" for got, most, unit in goals]
    target_text = ", ".join(verdicts) if method == OURS else ""
    return [method, spread(seconds, 2), spread(ratios, 2), spread(extra, 2), target_text]
