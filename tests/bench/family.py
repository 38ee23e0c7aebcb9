"""Whole families: a cascade beside its controls at equal tokens, and what its seeds save at equal loss."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from cascade.planning.axes import Axis
from tests.bench.options import Options
from tests.bench.report import report, spread

TOKENS, SEQUENCE, HELD_OUT = 16_384, 256, 8192
STAGES = {"s75": 0.75, "s50": 0.5}
CONTROLS = ("one_shot", "ce_only", "scratch")
FAMILY, ALONE = "family", "alone"
OWN = "cascade: cut from s75"
SHORT = "one_shot with the last stage's tokens"
Json = dict[str, Any]


def run(options: Options) -> str:
    """For every seed a family with its controls, and its last child cut at once with less training."""
    tokens = options.tokens or TOKENS
    found = []
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as folder:
            found.append(built(options, tokens, seed, Path(folder)))
        rows = {name: f"{row['held_out_ce']:.4f}" for name, row in found[-1].items()}
        print(f"family: seed {seed}: {rows}", file=sys.stderr, flush=True)
    plural = "s" if options.seeds > 1 else ""
    return report(
        "family: the 50 % child",
        ["trained as", "tokens in all", "CE pruned", "CE", "KL to parent", "CE - cascade's"],
        [row(name, found) for name in found[0]],
        [
            f"{options.parent}, float32, {Path(options.text).name or 'embedded'}, rows of {SEQUENCE} tokens, "
            f"documents apart; parent's CE {found[0][OWN]['parent_ce']:.4f} on the held-out rows",
            f"s75, then s50 out of it, {tokens:,} tokens each, taught by the parent from `hidden` signals; "
            f"{options.seeds} seed{plural}; medians, differences within a seed",
            saving(found, tokens),
        ],
    )


def built(options: Options, tokens: int, seed: int, folder: Path) -> dict[str, Json]:
    """Rows of `family.json`: the last child's, its controls', and that of a child with half their tokens."""
    tree = {
        "family": FAMILY,
        "parent": options.parent,
        "corpus": {
            "sources": [options.text or "embedded"],
            "sequence_length": SEQUENCE,
            "held_out": 0.1,
            "held_out_tokens": HELD_OUT,
        },
        "stages": [
            {"name": name, "prune": {"ratio": ratio}, "distill": {"tokens": tokens, "epochs": 4}}
            for name, ratio in STAGES.items()
        ],
        "controls": list(CONTROLS),
        "seed": seed,
    }
    family = index_of(tree, folder)
    child = {**family["stages"][-1], "parent_ce": family["parent"]["held_out_ce"]}
    sizes = {axis.value: child["architecture"][axis.value] for axis in Axis if axis.value != "experts"}
    alone = {"name": "s50", "prune": {"shape": sizes}, "distill": {"tokens": tokens, "epochs": 4}}
    short = index_of({**tree, "family": ALONE, "stages": [alone], "controls": []}, folder)["stages"][-1]
    controls = {control["control"]: control for control in family["controls"]}
    child["tokens_trained"] += family["stages"][0]["tokens_trained"]
    controls["ce_only"]["tokens_trained"] += family["stages"][0]["tokens_trained"]
    return {OWN: child, **controls, SHORT: short}


def index_of(tree: Json, folder: Path) -> Json:
    """Build a recipe as a user does, and read what it became."""
    recipe, store = folder / "recipe.yaml", folder / "store"
    recipe.write_text(yaml.safe_dump(tree))
    command = [sys.executable, "-m", "cascade.cli", "build", str(recipe), "--direct"]
    places = ["--store", str(store), "--cache", str(folder / "cache")]
    subprocess.run([*command, *places], check=True, stdout=sys.stderr)
    index: Json = json.loads((store / tree["family"] / "family.json").read_text())
    return index


def row(name: str, found: Sequence[dict[str, Json]]) -> list[str]:
    """One way to train the child; over seeds."""
    own = [one[name] for one in found]
    differences = [one[name]["held_out_ce"] - one[OWN]["held_out_ce"] for one in found]
    return [
        name,
        f"{own[0]['tokens_trained']:,}",
        spread([one["pruned_held_out_ce"] for one in own], 3),
        spread([one["held_out_ce"] for one in own], 4),
        spread([one["kl_to_parent"] for one in own], 4),
        "" if name == OWN else spread(differences, 4),
    ]


def saving(found: Sequence[dict[str, Json]], tokens: int) -> str:
    """What a child cut from the parent needs to be as good as one cut from s75, over the log of tokens."""
    shares = []
    for one in found:
        short, long, own = (one[name]["held_out_ce"] for name in (SHORT, "one_shot", OWN))
        shares.append(2 ** ((short - own) / (short - long)) if short > long else math.nan)
    needed = median(shares)
    return (
        f"as good as the cascade's child: one_shot with {needed:.2f} times the {tokens:,} tokens of the last "
        "stage (a line through its losses at once and twice as many, over the logarithm of tokens; beyond "
        "1 to 2 it is extrapolated)"
    )
