"""What a Prefect server has of runs, and which events it received."""

from __future__ import annotations

import uuid
from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    FlowRunFilter,
    FlowRunFilterId,
    LogFilter,
    LogFilterFlowRunId,
)
from prefect.client.schemas.objects import Artifact
from prefect.events import emit_event

from tests.waiting import wait_until


def log_lines(client: SyncPrefectClient, run: UUID) -> list[str]:
    """The messages of a flow run's log."""
    chosen = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run]))
    return [log.message for log in client.read_logs(chosen)]


def artifacts(client: SyncPrefectClient, run: UUID) -> list[Artifact]:
    """All that a flow run shows."""
    chosen = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run]))
    return client.read_artifacts(artifact_filter=chosen)


def task_runs(client: SyncPrefectClient, run: UUID) -> dict[str, int]:
    """Name of the last state -> how often the task was tried."""
    chosen = FlowRunFilter(id=FlowRunFilterId(any_=[run]))
    found = client.read_task_runs(flow_run_filter=chosen)
    return {str(task.state.name): task.run_count for task in found if task.state}


def events(client: SyncPrefectClient, chosen: dict[str, Any]) -> list[dict[str, Any]]:
    """The newest that a filter finds, oldest first."""
    body = {"filter": {**chosen, "order": "DESC"}, "limit": 50}
    return list(reversed(client.request("POST", "/events/filter", json=body).json()["events"]))


def events_of(client: SyncPrefectClient, family: str) -> list[dict[str, Any]]:
    """All of ours about one family."""
    about = {"labels": {"cascade.family": [family]}}
    return events(client, {"event": {"prefix": ["cascade."]}, "resource": about})


def wait_for_events(client: SyncPrefectClient) -> None:
    """Until the server has what this process emitted so far; it stores events in their order."""
    last = f"test.{uuid.uuid4()}"
    emit_event(last, {"prefect.resource.id": last})
    assert wait_until(lambda: bool(events(client, {"event": {"name": [last]}})))
