"""`python -m tests.faults.long_run HOW STAGES FOLDER`: a family of many stages, watched from inside.

HOW is `direct` or `flow`, as `cascade build` runs with and without `--direct`. Before every node one line
goes to FOLDER/samples.jsonl: what the orchestrator and the process that serves its nodes hold at that moment,
when no node is running.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from cascade.cli import build_direct, build_in_prefect
from cascade.console import ConsoleReport
from cascade.family.build import run_options
from cascade.family.plan import plan_family
from cascade.recipe import Options
from cascade.recipe_files import validate_recipe
from tests.tiny import make_corpus, make_parent
from tests.tiny_family import tiny_tree

FFN = 128


@dataclass(frozen=True)
class Held:
    """By a process: resident bytes, open files, threads, children that have ended and were not waited for."""

    resident: int
    files: int
    threads: int
    zombies: int


@dataclass(frozen=True)
class Sample:
    """stage: of the node that is about to run. server: None before the first node. temporary: files and
    folders in TMPDIR and scratch folders in the cache."""

    stage: str
    orchestrator: Held
    server: Held | None
    temporary: int


def held(process: Path) -> Held:
    """Of a process in /proc."""
    lines = (line.split(":", 1) for line in (process / "status").read_text().splitlines())
    status = {name: value.strip() for name, value in lines}
    zombies = [child for child in children(process) if state(child) == "Z"]
    resident = int(status["VmRSS"].split()[0]) * 1024
    return Held(resident, len(os.listdir(process / "fd")), int(status["Threads"]), len(zombies))


def children(process: Path) -> list[Path]:
    """Of all threads of a process; one that ends meanwhile leaves its children to another."""
    found: list[Path] = []
    for task in (process / "task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):
            found += [Path("/proc", number) for number in (task / "children").read_text().split()]
    return found


def state(process: Path) -> str:
    """As `ps` shows it; "" for a process that is gone."""
    try:
        return (process / "stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def serves(process: Path) -> bool:
    """Whether nodes are forked from it."""
    return b"cascade.node" in (process / "cmdline").read_bytes()


class Watching(ConsoleReport):
    """Takes a sample whenever a node begins."""

    def __init__(self, folder: Path) -> None:
        super().__init__(Console(stderr=True))
        self.folder = folder

    def start(self, title: str) -> ConsoleReport:
        """Of the node `title`."""
        own = Path("/proc", str(os.getpid()))
        servers = [child for child in children(own) if state(child) not in ("", "Z") and serves(child)]
        scratch = [
            path for path in (self.folder / "cache").iterdir() if path.name not in ("training", "latency")
        ]
        temporary = len(os.listdir(tempfile.gettempdir())) + len(scratch)
        sample = Sample(title, held(own), held(servers[0]) if servers else None, temporary)
        with (self.folder / "samples.jsonl").open("a") as stream:
            stream.write(json.dumps(asdict(sample)) + "\n")
        return super().start(title)


def chain(folder: Path, stages: int) -> dict[str, Any]:
    """A recipe of so many stages, each of one FFN neuron less and taught for a few steps."""
    tree = tiny_tree(
        make_parent(folder / "parent", num_hidden_layers=2), make_corpus(folder / "corpus.jsonl")
    )
    tree["stages"] = [
        {
            "name": f"s{number}",
            "prune": {"shape": {"ffn": FFN - 1 - number}, "calibration_tokens": 64},
            "distill": {"tokens": 64, "batch_tokens": 64},
        }
        for number in range(stages)
    ]
    return tree


def main(how: str, stages: int, folder: Path) -> None:
    """Build the family as the command line does."""
    recipe = validate_recipe(chain(folder, stages), where="the chain")
    store, options = str(folder / "store"), Options(cache=str(folder / "cache"))
    (folder / "cache").mkdir()
    report = Watching(folder)
    if how == "flow":
        index = build_in_prefect(recipe, store, options, report)
    else:
        graph = plan_family(recipe, Path(options.cache))
        index = build_direct(graph, run_options(recipe, store, options), report)
    report.start("the end")
    assert len(index["stages"]) == stages


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
