"""Long runs as they are watched: what processes hold, stage by stage."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

Sample = dict[str, Any]
ROOT = Path(__file__).parents[2]
# `python -I` does without it: the process that serves nodes, not the gate's own.
QUICK_GATE = "import cascade.evaluation.gate as gate\ngate.SCRIPT = gate.Path({script!r})\n"


def watched(how: str, stages: int, folder: Path, **variables: str) -> list[Sample]:
    """Samples of a chain of so many stages, one before every node; see `tests.faults.long_run`.

    variables: for the environment.
    """
    temporary = folder / "tmp"
    temporary.mkdir()
    gate = QUICK_GATE.format(script=str(Path(__file__).with_name("quick_gate.py")))
    (folder / "sitecustomize.py").write_text(gate)
    environment = {
        **os.environ,
        "TMPDIR": str(temporary),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]),
        **variables,
    }
    command = [sys.executable, "-m", "tests.faults.long_run", how, str(stages), str(folder)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    lines = (folder / "samples.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def slope(values: list[float]) -> float:
    """Growth a stage: the median slope between all pairs (Theil, Sen), which single jumps do not move."""
    pairs = [
        (later - earlier, j - i)
        for i, earlier in enumerate(values)
        for j, later in enumerate(values)
        if j > i
    ]
    return statistics.median(rise / run for rise, run in pairs)
