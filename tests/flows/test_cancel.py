"""A cancel and a lost machine, with a server, a worker, a flow and a trainer as they run in earnest: what
ends, what is kept, and where the next run goes on."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolUpdate
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId
from prefect.client.schemas.objects import FlowRun, State
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelling

from cascade.recipe import Recipe
from cascade.stack.api import Api
from cascade.stack.environment import client_environment
from cascade.stack.home import Home, opened
from cascade.stack.ports import found
from cascade.stack.processes import Service, descendants
from cascade.stack.up import PREFECT, bootstrap, prefect_server, require_registered
from flows.bootstrap import CPU, SILENT_SECONDS
from tests.flows.seen import log_lines
from tests.tiny_family import brief_tree
from tests.waiting import LONG, alive, wait_until

pytestmark = pytest.mark.slow

# From the request until the trainer has saved its state and ended, as the issue of a cancel promises.
CANCEL_SECONDS = 30.0
# Nobody waits for the end of this training.
TOKENS = 10_000_000


@dataclass
class Site:
    """A server with all that `python -m flows.bootstrap` makes, a store in a folder, and one slot."""

    client: SyncPrefectClient
    home: Home
    environment: dict[str, str]
    store: Path
    recipe: dict[str, Any]

    @contextmanager
    def worker(self, name: str) -> Iterator[Service]:
        """A worker; nothing that it started outlives the block."""
        command = [*PREFECT, "worker", "start", "--pool", CPU, "--name", name]
        with Service(f"the worker {name}", command, self.environment, self.home.log(name)) as worker:
            started: list[int] = []
            try:
                yield worker
            finally:
                started = descendants(worker.process.pid)
                worker.stop()
                for pid in filter(alive, started):
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)

    def start(self, family: str, checkpoint_seconds: float) -> FlowRun:
        """Trigger a build, as the form does."""
        deployment = self.client.read_deployment_by_name("build-family/build-family")
        options = {**deployment.parameters["options"], "checkpoint_seconds": checkpoint_seconds}
        parameters = {"store": str(self.store), "options": {**options, "device": "cpu"}}
        recipe = Recipe.model_validate({**self.recipe, "family": family}).model_dump(mode="json")
        return self.client.create_flow_run_from_deployment(
            deployment.id, parameters={**parameters, "recipe": recipe}
        )

    def until(self, run: FlowRun, name: str) -> State[Any]:
        """Wait for a state."""
        assert wait_until(lambda: self.state(run).name == name, LONG), f"{self.state(run)}\n{self.said(run)}"
        return self.state(run)

    def state(self, run: FlowRun) -> State[Any]:
        """Its present one."""
        state = self.client.read_flow_run(run.id).state
        assert state is not None
        return state

    def said(self, run: FlowRun) -> str:
        """The run's log, and those of the workers where it says nothing."""
        own = "\n".join(log_lines(self.client, UUID(str(run.id))))
        return own or "\n".join(
            path.read_text()[-2000:] for path in self.home.log("").parent.glob("*worker*")
        )

    def until_said(self, run: FlowRun, words: str) -> str:
        """Wait for a line in its log; what it matched."""
        assert wait_until(lambda: re.search(words, self.said(run)) is not None, LONG), self.said(run)
        match = re.search(words, self.said(run))
        assert match
        return match[0]

    def end(self, run: FlowRun) -> None:
        """Ask it to end, as the button in the UI does."""
        self.client.set_flow_run_state(run.id, Cancelling())

    def snapshots(self, family: str) -> list[int]:
        """Steps of the stored states of its training."""
        records = self.store.glob(f"{family}/large/training/*/step-*/record.json")
        return sorted(int(path.parent.name.removeprefix("step-")) for path in records)


@pytest.fixture(scope="module")
def site(tiny_parent: Path, tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    tree = brief_tree(tiny_parent, tiny_corpus)
    (stage, *_) = tree["stages"]
    stage["distill"] |= {"tokens": TOKENS, "epochs": 1000}
    tree["stages"] = [stage]
    with opened(folder / "home") as home:
        api = Api(found(None))
        variables = {"PREFECT_API_URL": api.url, "CASCADE_STORE": str(folder / "families")}
        environment = client_environment(home.prefect, variables, gpus=0)
        environment["CASCADE_CACHE"] = str(folder / "cache")
        with prefect_server(home, api) as server, temporary_settings({PREFECT_API_URL: api.url}):
            server.wait_until(api.answers, LONG)
            with bootstrap(home, environment) as registration:
                require_registered(registration)
            with get_client(sync_client=True) as client:
                client.update_work_pool(CPU, WorkPoolUpdate(concurrency_limit=1))
                yield Site(client, home, environment, folder / "families", tree)


def node_processes(worker: Service) -> list[int]:
    """The trainer, and the process that has forked it."""
    return [pid for pid in descendants(worker.process.pid) if b"cascade.node" in command_line(pid)]


def command_line(pid: int) -> bytes:
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path("/proc", str(pid), "cmdline").read_bytes()
    return b""


def test_a_cancel_saves_the_training_and_leaves_no_process(site: Site) -> None:
    with site.worker("worker") as worker:
        run = site.start("cancelled", checkpoint_seconds=3600)
        site.until_said(run, rf"/{TOKENS:,} tokens loss")
        nodes, started = node_processes(worker), descendants(worker.process.pid)
        assert len(nodes) == 2
        assert site.snapshots("cancelled") == []
        began = time.monotonic()
        site.end(run)
        assert wait_until(lambda: not any(map(alive, nodes)), LONG)
        seconds = time.monotonic() - began
        site.until(run, "Cancelled")
        assert wait_until(lambda: not any(map(alive, started)), LONG)
        print(f"cancelled: the trainer ended after {seconds:.1f} s")
        assert seconds < CANCEL_SECONDS
        (step,) = site.snapshots("cancelled")
        assert step > 0
        site.until_said(run, "stopped: the next run of this recipe goes on")
        progress = site.client.read_artifacts(
            artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run.id]))
        )
        assert progress
        assert not [one for one in progress if " left" in str(one.description)]

        again = site.start("cancelled", checkpoint_seconds=3600)
        site.until_said(again, rf"resumed after step {step} of")
        site.end(again)
        site.until(again, "Cancelled")


def test_a_lost_worker_frees_its_slot_and_another_goes_on(site: Site) -> None:
    with site.worker("lost-worker") as lost:
        run = site.start("lost", checkpoint_seconds=1)
        assert wait_until(lambda: bool(site.snapshots("lost")), LONG), site.said(run)
        nodes, started = node_processes(lost), descendants(lost.process.pid)
        for pid in [lost.process.pid, *(pid for pid in started if pid not in nodes)]:
            os.kill(pid, signal.SIGKILL)
        # Nobody tells the node; the kernel does.
        assert wait_until(lambda: not any(map(alive, started)), LONG)
        step = site.snapshots("lost")[-1]
    assert site.state(run).name == "Running"
    with site.worker("next-worker"):
        later = site.start("lost", checkpoint_seconds=1)
        crashed = site.until(run, "Crashed")
        assert crashed.message == f"No heartbeat for {SILENT_SECONDS} s: its machine is gone."
        site.until_said(later, rf"resumed after step {step} of")
        begun = site.client.read_flow_run(later.id).start_time
        assert begun
        # There is one slot, and the lost run held it until then.
        assert begun > crashed.timestamp
        site.end(later)
        site.until(later, "Cancelled")
