"""Seconds and memory of one cut, beside torch-pruning's own pruner."""

from __future__ import annotations

import json
import subprocess
import sys
from statistics import median

from cascade.planning.plan import describe
from tests.bench.options import Options
from tests.bench.report import report, spread
from tests.bench.trial import METHODS, RATIO, target_of

FEWEST = 3
# Seconds, and extra memory relative to the model.
TARGET = (3.0, 1.2)
OURS = ("cascade", "FFN")
CASES = [*((method, "FFN") for method in METHODS), ("cascade", "default axes")]
Figures = dict[str, list[float]]


def run(options: Options) -> str:
    """All cases in turn, for every seed again, each in a process of its own."""
    repeats = max(FEWEST, options.seeds)
    found: dict[tuple[str, str], Figures] = {case: {"seconds": [], "extra": []} for case in CASES}
    for seed in range(repeats):
        for case in CASES:
            figures = trial(*case, seed)
            found[case]["seconds"].append(figures["seconds"])
            found[case]["extra"].append(figures["extra"] / figures["size"])
    return report(
        "cut",
        ["method, shape", "seconds", "of cascade's", "extra peak memory / model", "target"],
        [row(case, figures, found[OURS]) for case, figures in found.items()],
        [
            f"Qwen2.5-0.5B's sizes, random weights, float32, to {RATIO:.0%} of the non-embedding parameters",
            f"medians of {repeats} seeds, each in a fresh process, the methods in turn",
            f"FFN: {describe(target_of('FFN'))}",
            f"default axes: {describe(target_of('default axes'))}",
            "cascade is given scores, leaves the model as it is and builds a second one; its seconds include "
            "the proof that cuts of the class are exact, which a second cut in a process does without",
            "torch-pruning changes the model in place; its seconds include its scores and its graph, from "
            "which attention is kept out because it hangs on grouped queries",
        ],
    )


def trial(method: str, shape: str, seed: int) -> dict[str, float]:
    """The figures of one process."""
    command = [sys.executable, "-m", "tests.bench.trial", method, shape, str(seed)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(f"cut: {method}, {shape}, seed {seed}: {figures}", file=sys.stderr, flush=True)
    return figures


def row(case: tuple[str, str], figures: Figures, ours: Figures) -> list[str]:
    """One line of the table."""
    seconds, extra = figures["seconds"], figures["extra"]
    ratios = [mine / other for mine, other in zip(seconds, ours["seconds"], strict=True)]
    met = median(seconds) < TARGET[0] and median(extra) < TARGET[1]
    target = f"under {TARGET[0]:g} s and {TARGET[1]:g}: {'met' if met else 'missed'}"
    return [
        ", ".join(case),
        spread(seconds, 2),
        spread(ratios, 2),
        spread(extra, 2),
        target if case[0].startswith("cascade") else "",
    ]
