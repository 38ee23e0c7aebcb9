"""`cascade up` as a person uses it: start, trigger, look into the bucket, end, start again."""

from __future__ import annotations

import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen
from uuid import UUID

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_URL, temporary_settings

from cascade.stack.ports import HOST, found, is_free
from tests.e2e.conftest import Command
from tests.waiting import LONG, alive, wait_until

CASCADE = [sys.executable, "-m", "cascade.cli"]


def test_a_busy_port_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with socket.create_server((HOST, found(None))) as listener:
        port = listener.getsockname()[1]
        for option in ("--port", "--store-port"):
            command = [*CASCADE, "up", "--home", str(tmp_path), option, str(port)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=LONG)
            assert done.returncode == 2
            assert f"error: somebody listens on port {port} already" in done.stderr
            assert f"value: {port}" in done.stderr
            assert f"where: {option}" in done.stderr
            assert "way out: give another port" in done.stderr
    assert {path.name for path in tmp_path.iterdir()} <= {"lock", "keys.json", "store", "logs"}


def test_a_store_that_cannot_be_used_is_refused_before_anything_starts(
    command: Command, tmp_path: Path
) -> None:
    arguments = [*CASCADE, "up", "--home", str(tmp_path / "home"), "--store", "gs://bucket"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=LONG)
    assert done.returncode == 2
    assert "error: this kind of location is not supported" in done.stderr
    arguments = [*arguments[:-1], str(tmp_path / "store"), "--store-port", "9000"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=LONG)
    assert done.returncode == 2
    assert "error: no store is started where one is given" in done.stderr


@dataclass
class Running:
    """A stack, and what it has said about itself."""

    process: subprocess.Popen[str]
    said: dict[str, str]
    seconds: float

    @property
    def ports(self) -> list[int]:
        """Of the server and of the store."""
        return [int(port) for port in re.findall(r"127\.0\.0\.1:(\d+)", " ".join(self.said.values()))]

    @property
    def environment(self) -> dict[str, str]:
        """What a shell has that sources the file."""
        printed = subprocess.run(
            ["sh", "-c", f". {self.said['environment'].removeprefix('source ')}; env"],
            capture_output=True,
            text=True,
            check=True,
        )
        return dict(line.split("=", 1) for line in printed.stdout.splitlines() if "=" in line)

    def end(self, number: signal.Signals) -> int:
        """Send the signal; the exit code."""
        self.process.send_signal(number)
        return self.process.wait(LONG)


@contextmanager
def up(home: Path, *options: str) -> Iterator[Running]:
    """`cascade up` in a folder whose name a shell would split, ready; killed if the test does not end it."""
    variables = {**os.environ, "CASCADE_CACHE": str(home / "cache"), "PREFECT_API_URL": "http://elsewhere"}
    command, began = [*CASCADE, "up", "--home", str(home / "the stack"), *options], time.monotonic()
    process = subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    said: dict[str, str] = {}
    try:
        for line in process.stdout:
            name, _, value = line.partition(":")
            said[name] = value.strip()
            if line.startswith("ready in"):
                break
        assert "smoke build" in said, said
        yield Running(process, said, time.monotonic() - began)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def processes_of(folder: Path) -> set[int]:
    """Those whose command line or environment names the folder."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
            if str(folder).encode() in words and int(entry.name) != os.getpid():
                found.add(int(entry.name))
    return found


def gone(stack: Running, folder: Path) -> bool:
    """Whether nothing of the stack is left."""
    return not any(alive(pid) for pid in processes_of(folder)) and all(is_free(port) for port in stack.ports)


def run(client: SyncPrefectClient, name: str, **parameters: Any) -> FlowRun:
    """Trigger a deployment through the API, and wait until its run has ended."""
    deployment = client.read_deployment_by_name(name)
    started = client.create_flow_run_from_deployment(
        deployment.id, parameters={**deployment.parameters, **parameters}
    )
    assert wait_until(lambda: ended(client, started.id), LONG)
    return client.read_flow_run(started.id)


def ended(client: SyncPrefectClient, run: UUID) -> bool:
    state = client.read_flow_run(run).state
    return state is not None and state.is_final()


def log_of(client: SyncPrefectClient, run: FlowRun) -> str:
    chosen = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run.id]))
    return "\n".join(line.message for line in client.read_logs(log_filter=chosen))


@pytest.mark.slow
def test_a_person_starts_it_builds_ends_it_and_starts_it_again(tmp_path: Path) -> None:
    with up(tmp_path) as stack:
        # The command as it is printed, in a shell.
        smoke = subprocess.run(
            ["sh", "-c", stack.said["smoke build"]], capture_output=True, text=True, timeout=LONG
        )
        assert smoke.returncode == 0, smoke.stdout + smoke.stderr
        assert "Completed" in smoke.stdout
        shown = subprocess.run(
            [*CASCADE, "show", f"{stack.said['store']}/smoke"],
            env={**os.environ, **stack.environment},
            capture_output=True,
            text=True,
        )
        assert shown.returncode == 0, shown.stderr
        assert "small" in shown.stdout
        assert "families" in urlopen(stack.said["bucket browser"]).read().decode()
        with temporary_settings({PREFECT_API_URL: stack.environment["PREFECT_API_URL"]}):
            every_deployment_runs()
        assert stack.end(signal.SIGINT) == 130
        assert wait_until(lambda: gone(stack, tmp_path))
    print(f"ready in {stack.seconds:.0f} s cold")
    with up(tmp_path) as again:
        print(f"ready in {again.seconds:.0f} s warm")
        assert again.environment["AWS_SECRET_ACCESS_KEY"] == stack.environment["AWS_SECRET_ACCESS_KEY"]
        log = (tmp_path / "the stack" / "logs" / "bootstrap.log").read_text()
        assert {line.partition(":")[0] for line in log.splitlines()} == {"unchanged"}
        api = again.environment["PREFECT_API_URL"]
        with temporary_settings({PREFECT_API_URL: api}), get_client(sync_client=True) as client:
            states = [str(run.state_name) for run in client.read_flow_runs()]
            assert states == ["Completed"] * 7
            trained = run_until_training(client)
        assert again.end(signal.SIGTERM) == 143
        assert wait_until(lambda: gone(again, tmp_path))
    # The server was told what became of it before it ended.
    with closing(sqlite3.connect(tmp_path / "the stack" / "prefect" / "prefect.db")) as database:
        told = database.execute("select state_name from flow_run where id = ?", [str(trained)])
        assert told.fetchall() == [("Cancelled",)]


def every_deployment_runs() -> None:
    """Each ends as Completed, the builds reuse what the smoke build has made."""
    with get_client(sync_client=True) as client:
        recipe = client.read_deployment_by_name("build-family/smoke").parameters["recipe"]
        for name, parameters in {
            "build-family/build-family": {"recipe": recipe},
            "build-family/build-family-weekly": {"recipe": recipe},
            "evaluate-family/evaluate-family": {"family": "smoke"},
            "rebuild-stage/rebuild-stage": {"family": "smoke", "stage": "small"},
            "promote/promote": {"family": "smoke"},
            "collect-garbage/collect-garbage": {},
        }.items():
            done = run(client, name, **parameters)
            assert str(done.state_name) == "Completed", f"{name}: {log_of(client, done)}"


def run_until_training(client: SyncPrefectClient) -> UUID:
    """Start a training that takes long; the run, once it trains."""
    deployment = client.read_deployment_by_name("build-family/smoke")
    recipe = deployment.parameters["recipe"]
    for stage in recipe["stages"]:
        stage["distill"] |= {"tokens": 10_000_000, "epochs": 1000}
    recipe["teacher"]["signals"] = "online"
    started = client.create_flow_run_from_deployment(
        deployment.id, parameters={**deployment.parameters, "recipe": recipe}
    )
    assert wait_until(lambda: "10,000" in log_of(client, started), LONG)
    return started.id


def allowed_origin(url: str, origin: str) -> str | None:
    """The origin whose pages a browser lets use the answer."""
    with urlopen(Request(url, headers={"Origin": origin})) as answer:
        allowed: str | None = answer.headers["Access-Control-Allow-Origin"]
        return allowed


@pytest.mark.slow
def test_a_killed_stack_leaves_nothing_behind(tmp_path: Path) -> None:
    with up(tmp_path, "--store", str(tmp_path / "our families")) as stack:
        assert stack.said["store"] == str(tmp_path / "our families")
        assert "bucket browser" not in stack.said
        server = stack.said["Prefect UI"]
        for origin in (server, server.replace(HOST, "localhost")):
            assert allowed_origin(f"{server}/api/health", origin) == origin
        assert allowed_origin(f"{server}/api/health", "http://elsewhere.example") is None
        assert stack.end(signal.SIGKILL) == -signal.SIGKILL
        assert wait_until(lambda: gone(stack, tmp_path))
