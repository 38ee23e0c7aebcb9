"""The worker of a container on a real server: its health, and how its runs end when it is stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import run_deployment
from prefect.workers.process import ProcessWorker

from cascade.stack.ports import found
from tests.deploy.composed import SERVICES, seconds
from tests.deploy.waiting_flow import waiting
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
POOL = "stopped-in-good-order"


def healthy(port: int) -> bool:
    """What the image's health check asks."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=8) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@pytest.mark.slow
def test_a_stopped_container_gives_the_trainer_time_to_save(prefect_server: str, tmp_path: Path) -> None:
    with get_client(sync_client=True) as client:
        template = ProcessWorker.get_default_base_job_template()
        client.create_work_pool(WorkPoolCreate(name=POOL, type="process", base_job_template=template))
        client.create_deployment(
            flow_id=client.create_flow(waiting),
            name="waiting",
            work_pool_name=POOL,
            entrypoint="tests.deploy.waiting_flow.waiting",
            pull_steps=[],
        )
    port = found(None)
    environment = {
        **os.environ,
        "PREFECT_API_URL": prefect_server,
        "PREFECT_WORKER_WEBSERVER_PORT": str(port),
        "PREFECT_WORKER_QUERY_SECONDS": "2",
        "PYTHONPATH": str(ROOT),
    }
    worker = subprocess.Popen([sys.executable, "-m", "flows.worker", POOL], cwd=ROOT, env=environment)
    try:
        assert wait_until(lambda: healthy(port))
        run = run_deployment("waiting/waiting", parameters={"folder": str(tmp_path)}, timeout=0)
        assert isinstance(run, FlowRun)
        assert wait_until((tmp_path / "started").exists)
        worker.send_signal(signal.SIGTERM)
        # As long as compose waits before it kills.
        assert worker.wait(seconds(SERVICES["worker"]["stop_grace_period"])) == 0
    finally:
        # Killed, it would leave Prefect's worker and the run behind.
        worker.terminate()
        worker.wait()
    assert (tmp_path / "saved").exists()
    assert (tmp_path / "ended").exists()
    with get_client(sync_client=True) as client:
        state = client.read_flow_run(run.id).state
    assert state is not None
    assert state.is_crashed()


@pytest.mark.parametrize("arguments", [[], ["--limit", "1"]])
def test_a_call_without_a_pool_is_told_how_it_is_called(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "flows.worker", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "usage: python -m flows.worker POOL [OPTION...]\n"
