"""A node as a task on a real server: what is logged, shown, retried, and what a cancel ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect import flow, runtime
from prefect.client.orchestration import get_client

from cascade.cards.card import Card
from cascade.family import runner
from cascade.family.job import Job, RunOptions
from cascade.kinds import Kind
from flows import progress, tasks
from flows.family import run_as_task
from flows.publish import page_of, publish_card
from tests.flows.seen import artifacts, log_lines, task_runs
from tests.waiting import LONG, alive, wait_until

# Publishes a real artifact; the first attempt is killed half-way, as the kernel does when memory runs out.
NODE = """
    import json, os, signal, sys
    from pathlib import Path
    from cascade.storage.artifacts import publish
    from cascade.storage.locations import open_location
    from cascade.storage.manifest import Draft

    def send(**event):
        print(json.dumps(event), flush=True)

    folder, place = Path(sys.argv[1]), sys.argv[2]
    send(event="progress", done=1, total=4, unit="tokens", figures={"loss": 0.5})
    if not (folder / "tried").exists():
        (folder / "tried").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    send(event="log", message="hello from the node")
    (folder / "work").mkdir()
    (folder / "work" / "weights.bin").write_bytes(bytes(100))
    draft = Draft(kind="pruned", key="0" * 64, family="tiny", stage="small", run="the-first")
    publish(folder / "work", open_location(place), draft)
    send(event="done", bytes=100, seconds=0.5)
"""

SLEEPING_FLOW = """
    import sys
    from pathlib import Path
    from prefect import flow
    from cascade.family import runner
    from cascade.family.job import load_job
    from flows.family import run_as_task

    NODE = "import os, sys, time; open(sys.argv[1], 'w').write(f'{os.getpid()}.'); time.sleep(600)"
    start = runner.node_process
    runner.node_process = lambda command: start([sys.executable, "-c", NODE, sys.argv[2]])

    @flow
    def sleeping(job: str) -> None:
        run_as_task(load_job(job))

    sleeping(sys.argv[1])
"""


@pytest.fixture
def job(tmp_path: Path) -> Job:
    options = RunOptions(str(tmp_path), str(tmp_path / "cache"), "the-first", "", 60.0, False)
    return Job(Kind.PRUNED, "tiny", "small", "0" * 64, str(tmp_path / "place"), {}, {}, {}, options)


@flow
def build_twice(job: Job) -> tuple[str, list[bool]]:
    """Make the artifact, and find it done; the flow run's id first."""
    first = run_as_task(job)
    return str(runtime.flow_run.id), [first.reused, run_as_task(job).reused]


def test_a_killed_node_is_tried_again_and_all_of_it_is_shown(
    prefect_server: str, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "node.py"
    script.write_text(textwrap.dedent(NODE))
    start = runner.node_process
    command = [sys.executable, str(script), str(tmp_path), job.uri]
    monkeypatch.setattr(runner, "node_process", lambda real: start(command))
    monkeypatch.setattr(tasks, "run_node", tasks.run_node.with_options(retry_delay_seconds=0))
    # Both attempts show a progress, and it is one.
    monkeypatch.setattr(progress, "ARTIFACT_SECONDS", 0.0)
    name, reused = build_twice(job)
    assert reused == [False, True]

    run = UUID(name)
    with get_client(sync_client=True) as client:
        # The server gets logs and task states in the background.
        assert wait_until(lambda: task_runs(client, run) == {"Completed": 2, "Reused": 1})
        assert wait_until(lambda: f"reused {job.uri}, made by run the-first" in log_lines(client, run))
        shown, lines = artifacts(client, run), log_lines(client, run)
    assert "hello from the node" in lines
    assert "1/4 tokens loss 0.5" in lines
    assert "made in 0.5 s; stored 0.0 MB" in lines
    assert any("killed by SIGKILL" in line for line in lines)
    (artifact,) = shown
    assert (artifact.key, artifact.type, artifact.data) == ("tiny-small-pruned", "progress", 100.0)
    assert artifact.description == "`small/pruned`: done"


@flow
def lose_the_artifact(job: Job) -> tuple[str, list[float]]:
    """Somebody deletes the progress artifact in the middle of a training; when updates are due, too."""
    report = progress.RunReport(job)
    due = []
    for done in range(3):
        report.next_update = report.next_log = 0.0
        report.progress(done, 3, "tokens")
        due.append(report.next_update)
        if done == 0 and report.artifact:
            with get_client(sync_client=True) as client:
                client.delete_artifact(report.artifact)
    report.finish()
    return str(runtime.flow_run.id), due


def test_progress_that_cannot_be_shown_is_one_warning_and_the_work_goes_on(
    prefect_server: str, job: Job
) -> None:
    name, due = lose_the_artifact(job)
    # After a failure the next attempt waits longer: a server that is gone must not slow the node down.
    assert due[1] - due[0] > progress.AFTER_FAILURE_SECONDS / 2
    with get_client(sync_client=True) as client:
        assert wait_until(
            lambda: any(line.startswith("2/3 tokens") for line in log_lines(client, UUID(name)))
        )
        lines = log_lines(client, UUID(name))
    assert sum("Prefect cannot show this" in line for line in lines) == 1


def test_a_cancel_ends_the_node_too(prefect_server: str, job: Job, tmp_path: Path) -> None:
    note = tmp_path / "pid"
    command = [sys.executable, "-c", textwrap.dedent(SLEEPING_FLOW), job.dump(), str(note)]
    environment: dict[str, Any] = {**os.environ, "PREFECT_API_URL": prefect_server}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    up = wait_until(lambda: note.exists() and note.read_text().endswith("."))
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=LONG)
    assert up, output
    assert process.returncode != 0
    assert not alive(int(note.read_text().rstrip(".")))


@flow
def train_and_fail(job: Job) -> list[str]:
    """Progress of a training that fails: what was shown before and after."""
    report, shown = progress.RunReport(job), list[str]()
    for done in (1024, 2048):
        report.next_update = 0.0
        time.sleep(0.01)
        report.progress(done, 4096, "tokens", loss=0.5, tokens_per_second=1234.5)
    run = UUID(str(runtime.flow_run.id))
    with get_client(sync_client=True) as client:
        shown += [str(artifact.description) for artifact in artifacts(client, run)]
        report.stop()
        shown += [str(artifact.description) for artifact in artifacts(client, run)]
    return shown


def test_progress_says_how_good_how_fast_and_how_long(prefect_server: str, job: Job) -> None:
    running, stopped = train_and_fail(job)
    assert running.startswith("`small/pruned`: 2,048 of 4,096 tokens, loss 0.5, tokens/s 1,234, about ")
    assert running.endswith(" left")
    assert stopped == "`small/pruned`: stopped at 50 %"


@flow
def cancel_while_it_is_shown(job: Job) -> list[str]:
    """The server has the artifact, and its answer is not here yet."""
    report, create = progress.RunReport(job), progress.create_progress_artifact

    def interrupted(*arguments: Any, **options: Any) -> None:
        create(*arguments, **options)
        raise KeyboardInterrupt

    report.next_update = 0.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress, "create_progress_artifact", interrupted)
        with pytest.raises(KeyboardInterrupt):
            report.progress(1024, 4096, "tokens", loss=0.5)
    report.stop()
    with get_client(sync_client=True) as client:
        found = artifacts(client, UUID(str(runtime.flow_run.id)))
    return [str(artifact.description) for artifact in found]


def test_progress_promises_no_time_after_a_cancel_at_any_moment(prefect_server: str, job: Job) -> None:
    assert cancel_while_it_is_shown(job) == ["`small/pruned`: stopped at 25 %"]


@flow
def make_quickly(job: Job) -> str:
    """A node that is over before anybody would look."""
    report = progress.RunReport(job)
    report.progress(1, 1, "tokens")
    report.finish()
    return str(runtime.flow_run.id)


def test_a_short_node_shows_no_progress(
    prefect_server: str, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "ARTIFACT_SECONDS", 600.0)
    name = make_quickly(job)
    with get_client(sync_client=True) as client:
        assert artifacts(client, UUID(name)) == []


@flow
def publish_a_card_that_grows() -> str:
    """The family's card after each of two stages; the flow run's id."""
    for text in ("# one stage\n", "# two stages\n"):
        publish_card(Card("grown", "", text), "families", "the-run-of-grown")
    return str(runtime.flow_run.id)


def test_a_card_that_grows_stays_one_artifact(prefect_server: str) -> None:
    name = publish_a_card_that_grows()
    with get_client(sync_client=True) as client:
        (artifact,) = artifacts(client, UUID(name))
    assert (artifact.key, artifact.data) == ("grown-family", "# two stages\n")
    assert page_of("the-run-of-grown", "grown-family").endswith(f"/artifacts/artifact/{artifact.id}")
