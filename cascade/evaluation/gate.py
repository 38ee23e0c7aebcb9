"""The gate every child passes before it is published: stock libraries load it and it behaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from cascade.errors import CascadeError
from cascade.evaluation.stock_check import READY

SCRIPT = Path(__file__).with_name("stock_check.py")
CACHED_TOLERANCE = 1e-3
"""Largest max|whole - cached| / max|whole| of float32 logits. Rounding gives about 1e-6 on a few
layers and grows with depth; a wrong cache or position is off by the order of one."""

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "0",
    "TRANSFORMERS_VERBOSITY": "warning",
}
"""The folder must be enough by itself, and the user's own settings must not silence a warning."""


def gate(folder: Path, expected_parameters: int) -> dict[str, Any]:
    """Check a Hugging Face folder in a fresh isolated process; the figures for its manifest.

    Loads and generates without a warning, holds `expected_parameters`, embeddings are the head's own
    tensor exactly when the config says so, logits are finite, cached equals uncached.
    Raises CascadeError naming the first check that fails.
    """
    finished = subprocess.run(
        [sys.executable, "-I", str(SCRIPT), str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, **ENVIRONMENT},
        check=False,
    )
    said = finished.stderr.partition(READY)[2].strip()
    if finished.returncode != 0:
        raise _failed(folder, "loads and runs with stock transformers", (said or finished.stderr)[-2000:])
    if said:
        raise _failed(folder, "no warning", said[-2000:])
    figures: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    count = f"{figures['parameters']}, planned {expected_parameters}"
    for check, passed, value in (
        ("parameter count", figures["parameters"] == expected_parameters, count),
        ("tied embeddings are one tensor", figures["tied_in_config"] == figures["tied_in_memory"], figures),
        ("the tokenizer fits the embeddings", figures["vocabulary_fits"], figures),
        ("finite logits", figures["finite"], figures),
        ("cached logits", figures["cached_difference"] <= CACHED_TOLERANCE, figures["cached_difference"]),
        ("cached generation", figures["same_generation"] and figures["new_tokens"] > 0, figures),
    ):
        if not passed:
            raise _failed(folder, check, value)
    return figures


def _failed(folder: Path, check: str, value: object) -> CascadeError:
    return CascadeError(
        f"the child fails its gate: {check}",
        value=value,
        where=str(folder),
        remedy="nothing was published; this is a fault of the surgery or of the saved files",
    )
