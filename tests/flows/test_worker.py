"""Deployed flows on a real worker: approval, wrong values over the API, and credentials out of a block."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from prefect.blocks.system import Secret
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import PrefectHTTPStatusError
from prefect.flow_runs import resume_flow_run
from prefect.settings import PREFECT_API_DATABASE_CONNECTION_URL
from prefect.states import Cancelling
from prefect.utilities.callables import parameter_schema

from cascade.recipe import Options, Recipe
from cascade.storage.locations import open_location
from flows.family import build_family
from tests.flows.seen import log_lines, task_runs
from tests.s3_server import S3Server
from tests.tiny_family import brief_tree
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow

Json = dict[str, Any]


class Worker:
    """A worker in a pool of its own, with a deployment of `build-family`, and what both have said."""

    def __init__(self, client: SyncPrefectClient, folder: Path, url: str) -> None:
        self.client, self.log = client, folder / "worker.log"
        pool = f"trial-{uuid.uuid4().hex[:8]}"
        client.create_work_pool(WorkPoolCreate(name=pool, type="process"))
        self.deployment = client.create_deployment(
            flow_id=client.create_flow(build_family),
            name=pool,
            entrypoint="flows.family.build_family",
            pull_steps=[{"prefect.deployments.steps.set_working_directory": {"directory": str(ROOT)}}],
            work_pool_name=pool,
            parameter_openapi_schema=parameter_schema(build_family).model_dump_for_openapi(),
            enforce_parameter_schema=True,
        )
        command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--type", "process"]
        without = {name: text for name, text in os.environ.items() if not name.startswith("AWS_")}
        environment = without | {"PREFECT_API_URL": url, "PREFECT_WORKER_QUERY_SECONDS": "1"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def stop(self) -> None:
        """End the worker and what it started; Prefect's does not always end when it is asked to."""
        self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(60)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def start(self, recipe: Json, store: str, **options: Any) -> FlowRun:
        """Trigger a run, as the form does."""
        parameters = {"recipe": recipe, "store": store, "options": options}
        return self.client.create_flow_run_from_deployment(self.deployment, parameters=parameters)

    def until(self, run: FlowRun, *names: str) -> FlowRun:
        """Wait for a state."""
        found = run

        def reached() -> bool:
            nonlocal found
            found = self.client.read_flow_run(run.id)
            return found.state is not None and found.state.name in names

        assert wait_until(reached, 600), f"{found.state}\n{self.log.read_text()[-4000:]}"
        return found

    def shown(self, key: str) -> str:
        """The newest artifact of a key."""
        chosen = ArtifactFilter(key=ArtifactFilterKey(any_=[key]))
        found = self.client.read_artifacts(artifact_filter=chosen)
        return str(max(found, key=lambda one: str(one.created)).data) if found else ""


@pytest.fixture(scope="module")
def worker(prefect_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    with get_client(sync_client=True) as client:
        worker = Worker(client, tmp_path_factory.mktemp("worker"), prefect_server)
        try:
            yield worker
        finally:
            worker.stop()


@pytest.fixture
def tree(tiny_parent: Path, tiny_corpus: Path) -> Json:
    """The recipe, as a form submits it."""
    return Recipe.model_validate(brief_tree(tiny_parent, tiny_corpus)).model_dump(mode="json")


def test_each_stage_waits_for_a_person_and_goes_on_from_there_with_credentials_of_a_block(
    worker: Worker, tree: Json, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret, block = s3_server.environment["AWS_SECRET_ACCESS_KEY"], f"trial-{uuid.uuid4().hex[:8]}"
    Secret(value=json.dumps(s3_server.environment)).save(block)  # type: ignore[unused-coroutine]
    store, cache = f"s3://{s3_server.bucket}/{block}", str(tmp_path / "cache")
    run = worker.start(tree, store, approval="each_stage", credentials=block, cache=cache)
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    place = open_location(f"{store}/tiny")

    worker.until(run, "Suspended")
    plan = worker.shown("tiny-approval")
    assert "# Approval: tiny, large" in plan
    assert "plan of family tiny" in plan
    assert "| small | ratio 0.5 |" in plan
    assert not (place / "large" / "distilled").children()
    resume_flow_run(run.id)  # type: ignore[unused-coroutine]

    assert wait_until(lambda: "tiny, small" in worker.shown("tiny-approval"), 600), worker.log.read_text()
    worker.until(run, "Suspended")
    assert "| large |" in worker.shown("tiny-approval").split("plan of family")[0]
    assert (place / "large" / "distilled").children()
    assert not (place / "small" / "distilled").children()
    resume_flow_run(run.id)  # type: ignore[unused-coroutine]

    worker.until(run, "Completed")
    assert (place / "aliases" / "stable.json").exists()
    with get_client(sync_client=True) as client:
        assert wait_until(lambda: "Reused" in task_runs(client, run.id))
        # Lines reach the server some time after they were written, in order; this is the last but one.
        assert wait_until(lambda: any("make it again" in line for line in log_lines(client, run.id)))
        lines = log_lines(client, run.id)
    assert sum("waiting for approval" in line for line in lines) == 2
    made = [line for line in lines if line.startswith("made in ")]
    assert len(made) == 12

    database = Path(str(PREFECT_API_DATABASE_CONNECTION_URL.value()).partition("///")[2])
    written = [*database.parent.glob(f"{database.name}*"), worker.log, *(tmp_path / "cache").rglob("*")]
    assert any(block.encode() in path.read_bytes() for path in written if path.parent == database.parent)
    assert not [path for path in written if path.is_file() and secret.encode() in path.read_bytes()]
    whole = open_location(store)
    assert len(whole.walk()) > 30
    assert not [path for path in whole.walk() if secret.encode() in (whole / path).read_bytes()]
    assert not [line for line in lines if secret in line]


def test_a_run_that_is_not_approved_is_cancelled_and_keeps_what_it_has(
    worker: Worker, tree: Json, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    run = worker.start(tree, str(store), approval="before_first_training", cache=str(tmp_path / "cache"))
    worker.until(run, "Suspended")
    assert "tiny, first-training" in worker.shown("tiny-approval")
    worker.client.set_flow_run_state(run.id, Cancelling())
    worker.until(run, "Cancelled")
    assert list((store / "tiny" / "large" / "pruned").iterdir())
    assert not (store / "tiny" / "large" / "distilled").exists()
    assert not (store / "tiny" / "aliases").exists()


def change(tree: Json, **recipe: Any) -> Json:
    return {**tree, **recipe}


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda tree: change(tree, stages=tree["stages"][::-1]), ["the recipe is wrong", "must fall", "0.8"]),
        (lambda tree: change(tree, parent="nowhere/at/all.gguf"), ["does not exist", "nowhere/at/all.gguf"]),
    ],
)
def test_a_wrong_value_that_a_form_cannot_see_is_the_message_of_the_run(
    worker: Worker, tree: Json, tmp_path: Path, wrong: Callable[[Json], Json], words: list[str]
) -> None:
    failed = worker.until(worker.start(wrong(tree), str(tmp_path / "store")), "Failed")
    assert failed.state is not None
    for word in (*words, "where: ", "way out: "):
        assert word in str(failed.state.message)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    "wrong",
    [
        {"seed": -1},
        {"family": "Not A Name"},
        {"stages": []},
        {"unheard": 1},
    ],
)
def test_a_wrong_value_that_a_form_can_see_makes_no_run(worker: Worker, tree: Json, wrong: Json) -> None:
    with pytest.raises(PrefectHTTPStatusError) as caught:
        worker.start({**tree, **wrong}, "store")
    assert caught.value.response.status_code in (409, 422)


def test_the_deployed_form_is_whole(worker: Worker) -> None:
    schema = worker.client.read_deployment(worker.deployment).parameter_openapi_schema
    assert schema is not None
    assert list(schema["properties"]) == ["recipe", "store", "options"]
    assert {"Recipe", "Options", "Approval", "Gate"} <= set(schema["definitions"])
    assert Options().approval in schema["definitions"]["Approval"]["enum"]
