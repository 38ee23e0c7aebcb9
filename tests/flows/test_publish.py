"""What a build shows in Prefect, and what its tasks retry."""

from __future__ import annotations

import logging
from typing import Any, cast
from uuid import UUID

import httpx
import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId
from prefect.client.schemas.objects import State, TaskRun
from prefect.exceptions import ObjectNotFound
from prefect.states import Failed

from cascade.cards.card import Card
from cascade.errors import CascadeError, InputError, IntegrityError, Interrupted, MachineFault, StorageFault
from flows import publish
from flows.publish import prefect_key, publish_card
from flows.tasks import run_node, worth_retrying
from tests.waiting import wait_until


def error_of(kind: type[CascadeError]) -> CascadeError:
    return kind("x", where="here", remedy="none")


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (error_of(StorageFault), True),
        (error_of(MachineFault), True),
        (error_of(Interrupted), True),
        (error_of(InputError), False),
        (error_of(IntegrityError), False),
        (error_of(CascadeError), False),
        (ValueError("x"), False),
    ],
)
def test_only_faults_of_storage_and_machines_are_retried(error: Exception, again: bool) -> None:
    state = Failed(data=error)
    assert worth_retrying(run_node, cast(TaskRun, None), state) is again


@pytest.mark.parametrize(
    "error", [httpx.ConnectError("connection refused"), httpx.ReadTimeout("slow"), ObjectNotFound(OSError())]
)
def test_a_card_that_cannot_be_shown_is_one_warning(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(publish, "create_markdown_artifact", fail)
    monkeypatch.setattr(publish, "get_run_logger", lambda: logging.getLogger("test"))
    publish_card(Card("tiny", "", "# Family tiny\n"), "families", "the-run")
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "the work goes on" in record.message
    assert type(error).__name__ in record.message


def test_keys_have_no_underscores() -> None:
    """The kind `on_policy` has one, and Prefect refuses it."""
    assert prefect_key("tiny", "small", "on_policy") == "tiny-small-on-policy"


@flow
def failing(ours: bool) -> None:
    """Ends with an error of ours, or with a bug."""
    raise (
        InputError("no such thing", value="x", where="here", remedy="write y")
        if ours
        else ValueError("a bug")
    )


def lines_of(state: State[Any]) -> list[str]:
    """What the server has of a run, up to its last line."""
    run = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[UUID(str(state.state_details.flow_run_id))]))

    def lines() -> list[str]:
        return [log.message for log in client.read_logs(run)]

    with get_client(sync_client=True) as client:
        assert wait_until(lambda: any(line.startswith("Finished in state Failed") for line in lines()))
        return lines()


@pytest.mark.parametrize("ours", [True, False])
def test_an_error_of_ours_is_told_without_a_traceback(prefect_server: str, ours: bool) -> None:
    lines = lines_of(failing(ours, return_state=True))
    assert any("Traceback" in line for line in lines) is not ours
    assert any(("no such thing" if ours else "a bug") in line for line in lines)
