"""A node that writes signals is killed and started again: what was finished is not made twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from cascade.family.build import run_options
from cascade.family.job import Job, job_of
from cascade.family.plan import plan_family
from cascade.family.runner import NodeHost
from cascade.recipe import Options, Recipe
from cascade.report import SILENT
from cascade.storage.artifacts import problems, read_manifest
from tests.tiny_family import tiny_tree
from tests.waiting import LONG, wait_until

PER_SHARD = 8
# Shards of a few rows; every row that the teacher runs over is noted, and SLOW makes time for a signal.
NODE = f"""
    import os, sys, time
    from cascade import node
    from cascade.distillation.signals import teachers, writing
    writing._rows_per_shard = lambda codec, length: {PER_SHARD}
    writing.BATCH_TOKENS = 1
    inner = teachers.OnlineTeacher.states
    def states(teacher, part, rows):
        time.sleep(float(os.environ["SLOW"]))
        with open(os.environ["NOTES"], "a") as notes:
            notes.writelines(f"{{part}} {{row}}\\n" for row in rows)
        return inner(teacher, part, rows)
    teachers.OnlineTeacher.states = states
    sys.exit(node.main())
"""


def start(job: Job, notes: Path, slow: float) -> subprocess.Popen[bytes]:
    """The node's process, in a session of its own as an orchestrator starts it."""
    path = notes.with_suffix(".json")
    path.write_text(job.dump())
    with notes.with_suffix(".log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(NODE), str(path)],
            env={**os.environ, "NOTES": str(notes), "SLOW": str(slow)},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def run(job: Job, notes: Path) -> list[str]:
    """To its good end; the rows that the teacher ran over, but for the four that it measures on."""
    assert start(job, notes, slow=0).wait(timeout=LONG) == 0, notes.with_suffix(".log").read_text()
    return notes.read_text().splitlines()[4:]


def signals_job(recipe: Recipe, store: Path, cache: Path) -> Job:
    """The job, once what it reads has been made."""
    run, graph = run_options(recipe, str(store), Options(cache=str(cache))), plan_family(recipe, cache)
    with NodeHost() as host:
        for node in (graph.corpus, graph.parent):
            host.run(job_of(node, run), SILENT)
    assert graph.signals is not None
    return job_of(graph.signals, run)


@pytest.mark.slow
def test_killed_signals_go_on_from_their_finished_shards(
    tiny_parent: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    tree = tiny_tree(tiny_parent, tiny_corpus) | {"teacher": {"signals": "head_and_tail"}}
    recipe = Recipe.model_validate(tree)
    job = signals_job(recipe, tmp_path / "store", tmp_path / "cache")
    kept = Path(str(job.training))
    process = start(job, tmp_path / "first", slow=0.05)
    assert wait_until(lambda: len(list(kept.glob("*.json"))) >= 2 or process.poll() is not None)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, (tmp_path / "first.log").read_text()
    assert read_manifest(job.location) is None
    shards = {path.name.removesuffix(".json") for path in kept.glob("*.json")}
    assert len(shards) >= 2

    again = run(job, tmp_path / "second")
    done = {f"train {row}" for row in range(PER_SHARD * len(shards))}
    assert done.isdisjoint(again)
    assert not kept.exists()
    assert problems(job.location) == []

    other = signals_job(recipe, tmp_path / "other", tmp_path / "cache")
    whole = run(other, tmp_path / "whole")
    assert set(again) == set(whole) - done
    one, two = read_manifest(job.location), read_manifest(other.location)
    assert one is not None
    assert two is not None
    assert one.files == two.files
