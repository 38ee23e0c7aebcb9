"""Seconds that Prefect adds to a build, by node and by family, and what its flow holds over many nodes."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from cascade.stack.api import Api
from cascade.stack.environment import client_environment
from cascade.stack.home import opened
from cascade.stack.ports import found
from cascade.stack.up import START_SECONDS, prefect_server
from tests.bench.options import Options
from tests.bench.report import report, spread
from tests.faults.long_run import chain
from tests.faults.watching import slope, watched
from tests.tiny_family import write_recipe

# Four nodes a stage, and four of the parent.
STAGES, MEMORY_STAGES = 4, 13
WAYS = {"direct": ["--direct"], "Prefect": []}
COLD, WARM = "cold: every node is made", "warm: every node is reused"
NODE_GOAL, FAMILY_GOAL = 2.0, 30.0
# Of what the flow's process holds after so many nodes; what is imported late comes with the first.
SETTLED_NODES, GROWTH_GOAL = 10, 0.05
Seconds = dict[str, dict[str, list[float]]]


def run(options: Options) -> str:
    """The same family with and without Prefect, once from nothing and once when all is there."""
    seconds: Seconds = {state: {way: [] for way in WAYS} for state in (COLD, WARM)}
    with tempfile.TemporaryDirectory() as name, server(Path(name)) as environment:
        folder = Path(name)
        for number in range(options.seeds):
            nodes = timed(folder / f"trial-{number}", environment, seconds)
        (folder / "memory").mkdir()
        sizes = memory(folder / "memory", environment)
    plural = "s" if options.seeds > 1 else ""
    return report(
        f"overhead: a family of {nodes} nodes",
        ["", *(f"{way}, s" for way in WAYS), "added, s", "added a node, s", "goal"],
        [row(state, seconds[state], nodes) for state in seconds],
        [
            f"{STAGES} children of a tiny parent; `cascade build` from its start to its end with and without "
            f"`--direct`, against a server that runs, one after the other; {options.seeds} "
            f"repetition{plural}, medians, differences within a repetition",
            memory_note(sizes),
        ],
    )


@contextmanager
def server(folder: Path) -> Iterator[dict[str, str]]:
    """A server of its own; the environment of whoever uses it."""
    with opened(folder / "home") as home:
        api = Api(found(None))
        with prefect_server(home, api) as service:
            service.wait_until(api.answers, START_SECONDS)
            yield client_environment(home.prefect, {"PREFECT_API_URL": api.url}, gpus=0)


def timed(folder: Path, environment: Mapping[str, str], seconds: Seconds) -> int:
    """Build both ways from nothing, then both again; the number of nodes."""
    folder.mkdir()
    recipe = write_recipe(folder / "recipe.yaml", chain(folder, STAGES))
    for state, times in seconds.items():
        for way, flags in WAYS.items():
            places = ["--store", str(folder / way), "--cache", str(folder / f"{way}-cache")]
            command = [sys.executable, "-m", "cascade.cli", "build", str(recipe), *places, *flags]
            began = time.monotonic()
            subprocess.run(command, env=environment, check=True, capture_output=True)
            times[way].append(time.monotonic() - began)
            print(f"overhead: {state}, {way}: {times[way][-1]:.1f} s", file=sys.stderr, flush=True)
    made = [json.loads((folder / way / "tiny" / "family.json").read_text())["artifacts"] for way in WAYS]
    assert all(artifact["reused"] for artifacts in made for artifact in artifacts)
    return len(made[0])


def row(state: str, times: Mapping[str, list[float]], nodes: int) -> list[str]:
    """One state of the store."""
    pairs = list(zip(times["direct"], times["Prefect"], strict=True))
    added = [prefect - direct for direct, prefect in pairs]
    each = [seconds / nodes for seconds in added]
    goals = [verdict(f"under {NODE_GOAL:g} s a node", median(each) < NODE_GOAL)]
    if state == WARM:
        whole = median(times["Prefect"])
        goals.append(verdict(f"under {FAMILY_GOAL:g} s in all", whole < FAMILY_GOAL))
    measured = [spread(times[way], 1) for way in WAYS]
    return [state, *measured, spread(added, 1), spread(each, 2), ", ".join(goals)]


def verdict(goal: str, met: bool) -> str:
    """As its neighbours say it."""
    return f"{goal}: {'met' if met else 'missed'}"


def memory(folder: Path, environment: Mapping[str, str]) -> list[int]:
    """Bytes that the flow's process holds before each node, and at the end."""
    variables = {name: environment[name] for name in ("PREFECT_API_URL", "PREFECT_HOME")}
    samples = watched("flow", MEMORY_STAGES, folder, **variables)
    return [sample["orchestrator"]["resident"] for sample in samples]


def memory_note(sizes: list[int]) -> str:
    """How much it grows."""
    settled, end = sizes[SETTLED_NODES], sizes[-1]
    flat = end <= settled * (1 + GROWTH_GOAL)
    growth = slope([float(size) for size in sizes[SETTLED_NODES:]])
    return (
        f"memory of the flow's process over {len(sizes) - 1} nodes: {settled / 2**20:.1f} MiB after "
        f"{SETTLED_NODES}, {end / 2**20:.1f} MiB at the end, {growth / 1024:.1f} KiB a node; "
        + verdict(f"at most {GROWTH_GOAL:.0%} more", flat)
    )
