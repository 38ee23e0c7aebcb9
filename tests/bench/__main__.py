"""`python -m tests.bench [--text FILE] [--parent P] [--seeds N] [--tokens N] [name ...]`: Markdown tables."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import import_module

from tests.bench.options import PARENT, Options

# Each is a module of this name with a function `run`, imported when it is run: listing needs no torch.
BENCHMARKS = {
    "cut": "seconds and memory of one cut, beside torch-pruning's own pruner",
    "calibration": "seconds of the calibration pass, beside a plain forward pass",
    "checkpoints": "time that a training loses to a snapshot, stored at once and in the background",
    "loss": "seconds and memory of the distillation loss, beside trl, liger-kernel and nvidia-modelopt",
    "race": "regret and tokens of a race of candidates, beside training every one to the end",
    "overhead": "seconds that Prefect adds to a build by node and by family, and what its flow holds",
    "family": "a cascade beside one_shot, ce_only and scratch at equal tokens",
    "ledger": "FLOPs of a family beside its floor, and beside separate runs",
    "signals": "speed of a step with stored signals beside cross-entropy, and what is learned by codec",
    "pruning": "held-out cross-entropy after pruning and after distillation, beside presets and peers",
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    listed = "\n".join(f"  {name:12} {what}" for name, what in BENCHMARKS.items())
    found = argparse.ArgumentParser(
        prog="python -m tests.bench",
        description=f"Benchmarks, all of them unless some are named:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("names", nargs="*", metavar="name", help=", ".join(BENCHMARKS))
    found.add_argument("--text", default="", help="plain text file to measure on; default: embedded")
    found.add_argument("--parent", default=PARENT, help=f"default: {PARENT}")
    found.add_argument("--seeds", type=at_least_one, default=1, help="repetitions with other random numbers")
    found.add_argument(
        "--tokens", type=at_least_one, default=None, help="distilled (pruning) or measured (calibration)"
    )
    return found


def at_least_one(text: str) -> int:
    """A count; raises ValueError, which argparse reports."""
    if (count := int(text)) < 1:
        raise ValueError
    return count


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is named and print each table as soon as it is there."""
    command = parser()
    given = command.parse_args(arguments)
    if unknown := set(given.names) - BENCHMARKS.keys():
        command.error(f"no such benchmark: {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}")
    options = Options(given.text, given.parent, given.seeds, given.tokens)
    for name in given.names or BENCHMARKS:
        print(import_module(f"tests.bench.{name}").run(options), flush=True)


if __name__ == "__main__":
    main()
