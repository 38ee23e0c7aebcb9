"""A node as a task on a real server: what is logged, shown, retried, and what a cancel ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect import flow, runtime
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    FlowRunFilter,
    FlowRunFilterId,
    LogFilter,
    LogFilterFlowRunId,
)
from prefect.client.schemas.objects import Artifact

from cascade.family import runner
from cascade.family.graph import Kind
from cascade.family.job import Job, RunOptions
from flows import publish, tasks
from flows.family import run_as_task
from tests.flows.test_publish import INDEX
from tests.unit.family.test_runner import alive, wait_until

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
    options = RunOptions(str(tmp_path), str(tmp_path), "run", "", 60.0, False)
    return Job(Kind.PRUNED, "tiny", "small", "0" * 64, str(tmp_path / "place"), {}, {}, {}, options)


@flow
def build_twice(job: Job) -> tuple[str, list[bool]]:
    """Make the artifact, publish an index, and find the artifact done; the flow run's id first."""
    first = run_as_task(job)
    publish.publish_index(INDEX)
    return str(runtime.flow_run.id), [first.reused, run_as_task(job).reused]


def log_lines(client: SyncPrefectClient, run: UUID) -> list[str]:
    chosen = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run]))
    return [log.message for log in client.read_logs(chosen)]


def artifacts(client: SyncPrefectClient, run: UUID) -> dict[str, Artifact]:
    """The newest artifact of every key: each attempt shows a progress of its own."""
    chosen = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run]))
    found = client.read_artifacts(artifact_filter=chosen)
    return {str(artifact.key): artifact for artifact in sorted(found, key=lambda found: str(found.created))}


def task_runs(client: SyncPrefectClient, run: UUID) -> dict[str, int]:
    """Name of the last state -> how often the task was tried."""
    chosen = FlowRunFilter(id=FlowRunFilterId(any_=[run]))
    found = client.read_task_runs(flow_run_filter=chosen)
    return {str(task.state.name): task.run_count for task in found if task.state}


def test_a_killed_node_is_tried_again_and_all_of_it_is_shown(
    prefect_server: str, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "node.py"
    script.write_text(textwrap.dedent(NODE))
    start = runner.node_process
    command = [sys.executable, str(script), str(tmp_path), job.uri]
    monkeypatch.setattr(runner, "node_process", lambda real: start(command))
    monkeypatch.setattr(tasks, "run_node", tasks.run_node.with_options(retry_delay_seconds=0))
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
    assert "stored 0.0 MB in 0.5 s" in lines
    assert any("killed by SIGKILL" in line for line in lines)
    assert {key: artifact.type for key, artifact in shown.items()} == {
        "tiny-small-pruned": "progress",
        "tiny-small": "table",
        "tiny-family": "markdown",
    }
    assert shown["tiny-small-pruned"].data == 100.0
    assert "0.755" in str(shown["tiny-small"].data)
    assert "| small | 500 |" in str(shown["tiny-family"].data)


@flow
def lose_the_artifact(job: Job) -> tuple[str, list[float]]:
    """Somebody deletes the progress artifact in the middle of a training; when updates are due, too."""
    report = publish.RunReport(job)
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
    assert due[1] - due[0] > publish.AFTER_FAILURE_SECONDS / 2
    with get_client(sync_client=True) as client:
        assert wait_until(lambda: "2/3 tokens" in log_lines(client, UUID(name)))
        lines = log_lines(client, UUID(name))
    assert sum("Prefect cannot show this" in line for line in lines) == 1


def test_a_cancel_ends_the_node_too(prefect_server: str, job: Job, tmp_path: Path) -> None:
    note = tmp_path / "pid"
    command = [sys.executable, "-c", textwrap.dedent(SLEEPING_FLOW), job.dump(), str(note)]
    environment: dict[str, Any] = {**os.environ, "PREFECT_API_URL": prefect_server}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    up = wait_until(lambda: note.exists() and note.read_text().endswith("."), seconds=120)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert up, output
    assert process.returncode != 0
    assert not alive(int(note.read_text().rstrip(".")))
