"""Seconds and memory of the distillation loss from hidden states, beside its peers."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import version
from statistics import median

from tests.bench.loss_trial import METHODS, NEEDS_COMPILER, OURS, THREADS, D, E, N
from tests.bench.options import Options
from tests.bench.report import report, spread

FEWEST = 3
VOCABULARIES = (32_000, 128_256)
# Extra memory in MiB at the largest vocabulary.
TARGET = 400
MIB = 2**20
AGREE = 1e-3
PACKAGES = ("trl", "liger-kernel", "nvidia-modelopt")
Figures = dict[str, list[float]]


def run(options: Options) -> str:
    """All methods in turn, for every vocabulary and seed again, each in a process of its own."""
    repeats = max(FEWEST, options.seeds)
    methods = [*METHODS, *(NEEDS_COMPILER if shutil.which("g++") else ())]
    rows: list[list[str]] = []
    for vocabulary in VOCABULARIES:
        found: dict[str, Figures] = {method: {"seconds": [], "extra": []} for method in methods}
        for seed in range(repeats):
            figures = {method: trial(method, vocabulary, seed) for method in methods}
            require_agreement(figures)
            for method in methods:
                found[method]["seconds"].append(figures[method]["seconds"])
                found[method]["extra"].append(figures[method]["extra"] / MIB)
        rows += [row(vocabulary, method, found) for method in methods]
    return report(
        "loss",
        ["vocabulary: method", "seconds", "of cascade's", "extra peak memory in MiB", "target"],
        rows,
        [
            f"forward KL and backward from hidden states, {N} tokens, hidden {D} and {E}, float32, "
            f"{THREADS} threads; {', '.join(f'{package} {version(package)}' for package in PACKAGES)}",
            f"medians of {repeats} seeds, each in a fresh process, the methods in turn; all gave the same "
            f"loss and norms of both gradients within {AGREE:g}",
            "the memory includes both gradients; compilation is not counted",
        ],
    )


def trial(method: str, vocabulary: int, seed: int) -> dict[str, float]:
    """The figures of one process."""
    command = [sys.executable, "-m", "tests.bench.loss_trial", method, str(vocabulary), str(seed)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(f"loss: {vocabulary}, {method}, seed {seed}: {figures}", file=sys.stderr, flush=True)
    return figures


def require_agreement(figures: Mapping[str, Mapping[str, float]]) -> None:
    """A fast loss that is another one is no peer."""
    for method, found in figures.items():
        for name in ("loss", "student", "head"):
            if not math.isclose(found[name], figures[OURS][name], rel_tol=AGREE):
                raise SystemExit(f"{method}: {name} is {found[name]:g}, not {figures[OURS][name]:g}")


def row(vocabulary: int, method: str, found: Mapping[str, Figures]) -> list[str]:
    """One line of the table."""
    seconds, extra = found[method]["seconds"], found[method]["extra"]
    ratios = [other / mine for mine, other in zip(found[OURS]["seconds"], seconds, strict=True)]
    target = ""
    if method == OURS:
        fastest = min(median(other["seconds"]) for name, other in found.items() if not name.startswith(OURS))
        target = f"faster than every peer: {'met' if median(seconds) < fastest else 'missed'}"
        if vocabulary == VOCABULARIES[-1]:
            target += f", at most {TARGET} MiB: {'met' if median(extra) <= TARGET else 'missed'}"
    return [f"{vocabulary}: {method}", spread(seconds, 2), spread(ratios, 2), spread(extra, 0), target]
