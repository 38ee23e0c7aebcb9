"""What a family cost, in FLOPs of all that was run, beside its arithmetic floor and beside separate runs."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.bench.family import index_of
from tests.bench.options import Options
from tests.bench.report import report
from tests.tiny import make_parent

# As Ministral 3 makes 14B, 8B and 3B of 24B (2601.08584).
STAGES = {"s58": 14 / 24, "s33": 8 / 24, "s12": 3 / 24}
TOKENS, SEQUENCE, CALIBRATION = 1_000_000, 128, 16_384
SIGNALS = ("hidden", "head_and_tail")
# With a head of 2 % of the parameters, about the share that Ministral's has.
PARENT = {
    "num_hidden_layers": 6,
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
GOAL = 1.05
Json = dict[str, Any]


def run(options: Options) -> str:
    """The same family for two kinds of signals."""
    tokens = options.tokens or TOKENS
    rows, shares = [], ", ".join(f"{share:.0%}" for share in STAGES.values())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parent = make_parent(folder / "parent", **PARENT)
        for signals in SIGNALS:
            found = index_of(tree_of(parent, options.text or "embedded", tokens, signals), folder)["ledger"]
            rows.append(row(signals, found))
            print(f"ledger: {rows[-1]}", file=sys.stderr, flush=True)
    return report(
        "ledger: a parent and three children",
        ["signals", "teacher", "training", "all else", "over the floor", f"at most {GOAL}", "separate runs"],
        rows,
        [
            f"random weights, 1.5M parameters; children of {shares}, {tokens:,} tokens each, calibrated on "
            f"{CALIBRATION:,}",
            "GFLOPs of all that was run, from the manifests; all else: calibration, repairs and evaluations",
            "over the floor: the family's FLOPs over those of one teacher pass and the children's training",
            "separate runs: every child with its teacher beside it, over the family's FLOPs; by arithmetic "
            f"alone 24B, 14B, 8B and 3B parameters give {arithmetic(24, 14, 8, 3):.2f}",
        ],
    )


def tree_of(parent: Path, text: str, tokens: int, signals: str) -> Json:
    """A recipe."""
    return {
        "family": f"{signals.replace('_', '-')}",
        "parent": str(parent),
        "corpus": {"sources": [text], "sequence_length": SEQUENCE, "held_out_tokens": 2048},
        "teacher": {"signals": signals},
        "stages": [
            {
                "name": name,
                "prune": {"ratio": share, "calibration_tokens": CALIBRATION},
                "distill": {"tokens": tokens, "epochs": 8},
            }
            for name, share in STAGES.items()
        ],
    }


def row(signals: str, ledger: Json) -> list[str]:
    """One family."""
    nodes = list(nodes_of(ledger))
    teacher = sum(node["teacher_flops"] for node in nodes)
    trained = sum(node["flops"] - node["teacher_flops"] for node in nodes if "distilled" in node["name"])
    whole = ledger["family"]["flops"]
    over = ledger["over_floor"]
    figures = [teacher, trained, whole - teacher - trained]
    return [
        signals,
        *(f"{figure / 1e9:,.0f}" for figure in figures),
        f"{over:.3f}",
        "met" if over <= GOAL else "missed",
        f"{ledger['separate_over_family']:.2f}",
    ]


def nodes_of(ledger: Json) -> Iterator[Json]:
    """All that was run."""
    for entry in ledger["entries"]:
        yield from entry["nodes"]


def arithmetic(parent: float, *children: float) -> float:
    """Separate runs over the floor with 2 FLOPs a parameter forward and 4 backward, on equal tokens."""
    training = 6 * sum(children)
    return (training + len(children) * 2 * parent) / (training + 2 * parent)
