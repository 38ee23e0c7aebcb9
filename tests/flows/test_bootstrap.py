"""Bootstrap on a real server and a real store: it makes what is missing, and leaves alone what is there."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentUpdate, WorkPoolCreate, WorkPoolUpdate
from prefect.exceptions import ObjectNotFound
from prefect.server.events.schemas.automations import EventTrigger
from prefect.settings import PREFECT_API_URL, temporary_settings

from cascade.errors import InputError, MachineFault
from cascade.storage.locations import check_store, open_location
from flows import bootstrap as program
from flows.bootstrap import GPU_LIMIT, ZOMBIES, bootstrap, zombie_automation
from flows.deployments import definitions
from tests.deployment_file import NAMES
from tests.schemas import nodes


@pytest.fixture
def client(prefect_server: str) -> Iterator[SyncPrefectClient]:
    """Of a server as it was before any bootstrap."""
    with get_client(sync_client=True) as client:
        for deployment in client.read_deployments():
            client.delete_deployment(deployment.id)
        for pool in client.read_work_pools():
            client.delete_work_pool(pool.name)
        for automation in client.read_automations():
            client.delete_automation(automation.id)
        for limit in client.read_global_concurrency_limits():
            if limit.name == GPU_LIMIT:
                client.delete_global_concurrency_limit_by_name(limit.name)
        yield client


def run(store: str, **more: str) -> list[str]:
    """What bootstrap says."""
    lines: list[str] = []
    bootstrap({"CASCADE_STORE": store, **more}, lines.append)
    return lines


def verbs(lines: list[str]) -> set[str]:
    return {line.partition(":")[0] for line in lines}


def test_the_first_run_makes_everything_and_the_second_nothing(client: SyncPrefectClient, s3: str) -> None:
    store = f"s3://made-{uuid.uuid4().hex[:12]}/families"
    made = run(store, CASCADE_GPU_SLOTS="3")
    assert verbs(made) == {"made"}
    assert len(made) == 1 + 2 + 1 + 1 + len(NAMES)
    check_store(open_location(store))
    pools = {pool.name: (pool.type, pool.concurrency_limit) for pool in client.read_work_pools()}
    assert pools == {"cpu": ("process", None), "gpu": ("process", 3)}
    assert client.read_global_concurrency_limit_by_name(GPU_LIMIT).limit == 3
    (automation,) = client.read_automations_by_name(ZOMBIES)
    assert automation.enabled
    for name in NAMES:
        deployment = client.read_deployment_by_name(name)
        assert deployment.parameters["store"] == store
        assert deployment.work_pool_name == "cpu"
        assert deployment.pull_steps == []
        # Prefect's form mixes the branches of a union.
        found = nodes(deployment.parameter_openapi_schema)
        assert [node for node in found if "oneOf" in node or "const" in node] == []
        assert set(deployment.parameters) == set(deployment.parameter_openapi_schema["properties"])
    assert verbs(run(store, CASCADE_GPU_SLOTS="3")) == {"unchanged"}


def test_what_somebody_has_set_stays(client: SyncPrefectClient, s3: str) -> None:
    client.create_work_pool(WorkPoolCreate(name="gpu", type="kubernetes"))
    run(s3)
    client.update_work_pool("cpu", WorkPoolUpdate(concurrency_limit=2))
    weekly = client.read_deployment_by_name("build-family/build-family-weekly")
    (schedule,) = weekly.schedules
    assert (schedule.active, schedule.slug) == (False, "weekly")
    client.update_deployment_schedule(weekly.id, schedule.id, active=True)
    client.update_deployment(weekly.id, DeploymentUpdate(description="ours"))
    assert verbs(run(s3, CASCADE_GPU_SLOTS="7")) == {"unchanged"}
    assert client.read_work_pool("gpu").type == "kubernetes"
    assert client.read_work_pool("cpu").concurrency_limit == 2
    assert client.read_deployment(weekly.id).description == "ours"

    # Another store is put into every form, and the schedule stays switched on.
    lines = run(f"{s3}-other")
    assert [line for line in lines if line.startswith("updated")] == [
        f"updated: deployment {name.partition('/')[2]}" for name in NAMES
    ]
    weekly = client.read_deployment(weekly.id)
    assert weekly.parameters["store"] == f"{s3}-other"
    assert [(one.active, one.slug) for one in weekly.schedules] == [(True, "weekly")]
    assert weekly.concurrency_options
    assert weekly.concurrency_options.collision_strategy == "CANCEL_NEW"
    assert weekly.global_concurrency_limit
    assert weekly.global_concurrency_limit.limit == 1


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "CASCADE_STORE is not set"),
        ({"CASCADE_STORE": "families", "CASCADE_GPU_SLOTS": "many"}, "the number of GPUs is wrong"),
        ({"CASCADE_STORE": "families", "CASCADE_GPU_SLOTS": "0"}, "the number of GPUs is wrong"),
        ({"CASCADE_STORE": "gs://bucket"}, "not supported"),
    ],
)
def test_wrong_variables_are_said_before_anything_is_made(variables: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        bootstrap(variables, print)


def test_a_pool_of_another_name_has_to_be_there(client: SyncPrefectClient, tmp_path: Any) -> None:
    with pytest.raises(InputError, match="no such work pool") as caught:
        run(str(tmp_path), CASCADE_POOL="farm")
    assert caught.value.value == "farm"
    client.create_work_pool(WorkPoolCreate(name="farm", type="process"))
    run(str(tmp_path), CASCADE_POOL="farm")
    assert client.read_deployment_by_name("build-family/smoke").work_pool_name == "farm"
    with pytest.raises(ObjectNotFound):
        client.read_deployment_by_name("build-family/quickstart")


def test_without_a_server_it_says_so(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "SERVER_SECONDS", 0.0)
    with (
        temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}),
        pytest.raises(MachineFault, match="does not answer"),
    ):
        run(str(tmp_path))


def test_the_program_ends_with_our_error_and_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "environ", {})
    assert program.main() == 2
    assert "way out: set it to the store" in capsys.readouterr().err


def test_a_run_that_has_said_goodbye_is_not_lost() -> None:
    automation = zombie_automation().model_dump(mode="json")
    trigger = EventTrigger.model_validate(automation["trigger"])
    assert trigger.starts_after("prefect.flow-run.heartbeat")
    assert not trigger.starts_after("prefect.flow-run.Suspended")
    for state in ("heartbeat", "Completed", "Cancelled", "Suspended", "Paused", "AwaitingRetry", "Crashed"):
        assert trigger.expects(f"prefect.flow-run.{state}")
    assert not trigger.expects("prefect.task-run.Completed")


def test_every_definition_is_filled_in() -> None:
    found = definitions("s3://bucket/prefix", "farm")
    assert len(found) == len(NAMES)
    assert "{{" not in str(found)
    assert {one["work_pool"]["name"] for one in found} == {"farm"}
