"""Events on a real server: what they carry, and an automation of ours that acts on one."""

from __future__ import annotations

import json
import uuid
from pathlib import Path

import pytest
import yaml
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterId,
    FlowRunFilter,
)
from prefect.client.schemas.objects import FlowRun
from prefect.events.schemas.automations import AutomationCore

from flows import events
from tests.flows.seen import events_of
from tests.unit.cards.indexes import index
from tests.waiting import wait_until

AUTOMATION = Path(__file__).parents[2] / "deploy" / "automations" / "evaluate-promoted.yaml"


@pytest.fixture
def family() -> str:
    """A name that no other test uses."""
    return f"family-{uuid.uuid4().hex[:8]}"


def test_a_stage_is_told_with_its_figures_and_once(prefect_server: str, family: str, tmp_path: Path) -> None:
    row = index()["stages"][0] | {"race": [{"curve": []}]}
    store, run = str(tmp_path), f"run-of-{family}"
    for _ in range(2):
        events.stage_started(family, {"name": "large", "node": "large/importance"}, store, run)
        events.stage_completed(family, row, store, run)
    events.stage_rejected(
        family, row | {"shortfalls": [{"figure": "kl_to_parent", "value": 0.4}]}, store, run
    )
    events.stage_reused(family, row, store, run + "-again")
    with get_client(sync_client=True) as client:
        assert wait_until(lambda: len(events_of(client, family)) == 4)
        found = {event["event"]: event for event in events_of(client, family)}
    kinds = ("started", "completed", "rejected", "reused")
    assert set(found) == {f"cascade.stage.{kind}" for kind in kinds}
    assert {event["resource"]["prefect.resource.id"] for event in found.values()} == {
        f"cascade.stage.{family}.large"
    }
    completed = found["cascade.stage.completed"]["payload"]
    figures = {name: completed[name] for name in ("checkpoint", "held_out_ce", "kl_to_parent", "parameters")}
    assert figures == {name: row[name] for name in figures}
    assert completed["uri"] == f"{tmp_path}/{family}"
    assert (completed["store"], completed["stage"], completed["run"]) == (store, "large", run)
    # A race is in family.json.
    assert "race" not in completed
    assert found["cascade.stage.rejected"]["payload"]["shortfalls"] == [
        {"figure": "kl_to_parent", "value": 0.4}
    ]
    related = [one["prefect.resource.id"] for one in found["cascade.stage.started"]["related"]]
    assert f"cascade.family.{family}" in related


@flow(name="evaluate-family")
def stand_in(store: str, family: str) -> None:
    """Takes the parameters of the deployment that the automation runs."""


def test_the_automation_of_deploy_runs_a_deployment_when_a_family_is_promoted(
    prefect_server: str, family: str
) -> None:
    with get_client(sync_client=True) as client:
        deployment = client.create_deployment(client.create_flow(stand_in), name=family)
        text = AUTOMATION.read_text().replace("DEPLOYMENT_ID", str(deployment))
        automation = AutomationCore.model_validate(yaml.safe_load(text))
        made = client.request("POST", "/automations/", json=json.loads(automation.model_dump_json())).json()
        chosen = DeploymentFilter(id=DeploymentFilterId(any_=[deployment]))
        tree = index() | {"family": family}
        try:
            runs, tries = list[FlowRun](), 0
            # A busy server may know of an automation only after what comes first.
            while not runs and tries < 20:
                tries += 1
                # Another alias is none of its business.
                events.family_promoted(tree, "s3://bucket/root", "latest")
                events.family_promoted(tree, "s3://bucket/root", "stable")
                wait_until(lambda: bool(client.read_flow_runs(deployment_filter=chosen)), 15)
                runs = client.read_flow_runs(flow_run_filter=FlowRunFilter(), deployment_filter=chosen)
            assert 0 < len(runs) <= tries
            events.family_completed(tree, "s3://bucket/root")
            assert wait_until(lambda: len(events_of(client, family)) == 2 * tries + 1)
        finally:
            client.request("DELETE", f"/automations/{made['id']}")
        promoted = [one for one in events_of(client, family) if one["event"] == "cascade.family.promoted"]
    assert all(run.parameters == {"store": "s3://bucket/root", "family": family} for run in runs)
    assert [event["resource"]["cascade.alias"] for event in promoted] == ["latest", "stable"] * tries
    assert promoted[1]["payload"]["stages"][1]["held_out_ce"] == tree["stages"][1]["held_out_ce"]
