"""Broken inputs, tried in a process of its own: each has a time limit, all of them a limit on memory.

`tried` starts the process and hands it cases; a case ends as LOADED, REFUSED (an error of ours) or ESCAPED:
any other exception, no answer in time, more memory than there may be, or the end of the process.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import typer

LOADED, REFUSED, ESCAPED = "loaded", "refused", "escaped"
# Of computing: a case takes a tenth of a second, so what needs this long hangs. What waits for ever computes
# nothing and is given as many times longer: other work on the machine is no bug of ours.
CASE_SECONDS = 20
PATIENCE = 30
# Of address space beyond what the libraries take: a file of kilobytes has no use for it.
SPARE_BYTES = 1 << 30


@dataclass(frozen=True)
class Case:
    """kind: which of LOADERS takes the path."""

    name: str
    kind: str
    path: str


@dataclass(frozen=True)
class Outcome:
    """said: the error as the user sees it, or what escaped. error: its record, if it is one of ours."""

    name: str
    verdict: str
    said: str = ""
    error: dict[str, Any] | None = None


def load_recipe(path: Path, cache: Path) -> None:
    """As every command does."""
    from cascade.recipe_files import load_recipe

    load_recipe(str(path))


def plan(path: Path, cache: Path) -> None:
    """As `cascade plan` does, and `cascade build` first of all."""
    from cascade.family.plan import plan_family
    from cascade.recipe_files import load_recipe

    plan_family(load_recipe(str(path)), cache)


def load_parent(path: Path, cache: Path) -> None:
    """As planning does, and then the node that stores the parent."""
    from cascade.family.found import found_model
    from cascade.models.decoder import decoder_of
    from cascade.models.folders import save_model
    from cascade.models.sources import load_model
    from tests.tiny_family import tiny_recipe

    found = found_model(tiny_recipe(path, path), str(path), cache)
    model = load_model(found.source)
    decoder_of(model)
    save_model(model, found.tokenizer, cache / "saved")


def read_corpus(path: Path, cache: Path) -> None:
    """As planning and then the node of the corpus do."""
    from cascade.data.sources import Source, documents, fingerprint

    fingerprint(Source(str(path)))
    for _ in documents(Source(str(path))):
        pass


def fetch_artifact(path: Path, cache: Path) -> None:
    """As a node does with its inputs, and `cascade verify` and `cascade show` with what is named."""
    from cascade.cli import show, verify
    from cascade.storage.artifacts import fetch
    from cascade.storage.locations import open_location

    fetch(open_location(str(path)), cache)
    verify(str(path))
    show(str(path))
    show(str(path), as_json=True)


def show_family(path: Path, cache: Path) -> None:
    """As `cascade verify` and `cascade show` do, in all its forms."""
    from cascade.cli import show, verify

    verify(str(path))
    show(str(path))
    show(str(path), as_json=True)
    show(str(path), ledger=True)


def fail(path: Path, cache: Path) -> None:
    """As code does that never thought of this input."""
    raise KeyError("some field")


def hang(path: Path, cache: Path) -> None:
    """As code does that believes a count."""
    while True:
        pass


def hog(path: Path, cache: Path) -> None:
    """As code does that believes a length."""
    bytearray(2 * SPARE_BYTES)


def die(path: Path, cache: Path) -> None:
    """As code in C does."""
    os.abort()


LOADERS: dict[str, Callable[[Path, Path], None]] = {
    function.__name__: function
    for function in (
        *(load_recipe, plan, load_parent, read_corpus, fetch_artifact, show_family),
        *(fail, hang, hog, die),
    )
}


def tried(cases: Iterable[Case], folder: Path, seconds: int = CASE_SECONDS) -> list[Outcome]:
    """The outcome of every case, in order; folder: for the process's scratch files."""
    left, outcomes = list(cases), []
    while left:
        done = run(left, folder, seconds)
        outcomes += done
        left = left[len(done) :]
    return outcomes


def run(cases: list[Case], folder: Path, seconds: int) -> list[Outcome]:
    """Outcomes until all are done, or up to the case that ended the process."""
    folder.mkdir(exist_ok=True)
    listed, log = folder / "cases.json", folder / "outcomes.jsonl"
    listed.write_text(json.dumps([asdict(case) for case in cases]))
    log.write_text("")
    command = [sys.executable, "-m", "tests.faults.trial", str(listed), str(log), str(seconds)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CASCADE_CACHE": str(folder)}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace")
    done = [Outcome(**json.loads(line)) for line in log.read_text().splitlines()]
    if len(done) < len(cases):
        died = f"the process ended with {ended.returncode}\n{ended.stderr[-2000:]}"
        done.append(Outcome(cases[len(done)].name, ESCAPED, died))
    return done


def main(listed: str, log: str, seconds: int) -> None:
    """Try the cases of a file one after another; both alarms end the process."""
    cases = [Case(**record) for record in json.loads(Path(listed).read_text())]
    # Before there is a limit: a case is timed, not its imports.
    import cascade.cli
    import cascade.family.aliases
    import cascade.family.audit

    if {case.kind for case in cases} & {"plan", "load_parent", "read_corpus"}:
        import cascade.data.tables
        import cascade.family.work  # noqa: F401

    (size,) = [
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmSize")
    ]
    limit = int(size.split()[1]) * 1024 + SPARE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    with open(log, "a", encoding="utf-8") as stream:
        for case in cases:
            signal.setitimer(signal.ITIMER_PROF, seconds)
            signal.alarm(PATIENCE * seconds)
            outcome = attempt(case, Path(log).parent / "cache")
            signal.alarm(0)
            signal.setitimer(signal.ITIMER_PROF, 0)
            stream.write(json.dumps(asdict(outcome)) + "\n")
            stream.flush()


def attempt(case: Case, cache: Path) -> Outcome:
    """One case in this process."""
    from cascade.errors import CascadeError

    try:
        LOADERS[case.kind](Path(case.path), cache)
    except CascadeError as error:
        return Outcome(case.name, REFUSED, str(error), error.record() | {"exit_code": error.exit_code})
    except typer.Exit as end:
        # `verify` prints what it finds.
        return Outcome(case.name, REFUSED if end.exit_code else LOADED)
    except BaseException:
        return Outcome(case.name, ESCAPED, traceback.format_exc()[-3000:])
    return Outcome(case.name, LOADED)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
