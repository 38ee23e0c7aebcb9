"""A node on a GPU holds a slot of the server's limit while it works, and only then."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

import httpx
import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL, temporary_settings

from cascade.errors import InputError, MachineFault
from cascade.family.job import Job, RunOptions
from cascade.family.runner import NodeHost
from cascade.kinds import Kind
from cascade.storage.artifacts import publish
from cascade.storage.locations import open_location
from cascade.storage.manifest import Draft
from flows.gpu import GPU_LIMIT, gpu_slot
from tests.reports import Recorder
from tests.waiting import wait_until


@pytest.fixture
def client(prefect_server: str) -> Iterator[SyncPrefectClient]:
    """Of a server without the limit."""
    with get_client(sync_client=True) as client:
        with suppress(ObjectNotFound):
            client.delete_global_concurrency_limit_by_name(GPU_LIMIT)
        yield client


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """A training on a GPU."""
    options = RunOptions(str(tmp_path), str(tmp_path / "cache"), "run", "cuda:0", 60.0, False)
    return Job(Kind.DISTILLED, "tiny", "small", "0" * 64, str(tmp_path / "place"), {}, {}, {}, options)


def taken(client: SyncPrefectClient) -> int:
    return client.read_global_concurrency_limit_by_name(GPU_LIMIT).active_slots


def test_the_second_waits_for_a_slot_and_says_so(client: SyncPrefectClient, job: Job) -> None:
    client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=GPU_LIMIT, limit=1))
    first, second, entered = Recorder(), Recorder(), threading.Event()

    def wait() -> None:
        with gpu_slot(job, second):
            entered.set()

    thread = threading.Thread(target=wait)
    with gpu_slot(job, first):
        assert taken(client) == 1
        thread.start()
        assert wait_until(lambda: bool(second.lines))
        assert second.lines == ["all 1 slots of the limit `gpu` are taken: waiting for a GPU"]
        assert not entered.wait(3)
    thread.join(300)
    assert entered.is_set()
    assert first.lines == []
    assert wait_until(lambda: taken(client) == 0)


def test_a_server_that_fails_is_asked_again_and_its_message_can_be_missed(
    client: SyncPrefectClient, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The build's own failures are not taken for the server's."""
    client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=GPU_LIMIT, limit=1))
    report, broken = Recorder(), httpx.ReadTimeout("slow")

    def fail(*arguments: object, **options: object) -> NoReturn:
        raise broken

    with pytest.raises(httpx.ReadTimeout), gpu_slot(job, report):
        raise broken
    with monkeypatch.context() as patch:
        patch.setattr(SyncPrefectClient, "read_global_concurrency_limit_by_name", fail)
        with gpu_slot(job, report):
            pass
    assert ["the work goes on" in line for line in report.lines] == [True]
    monkeypatch.setattr("flows.gpu.concurrency", fail)
    with pytest.raises(MachineFault, match="no slot"), gpu_slot(job, report):
        raise AssertionError


def test_a_server_without_the_limit_is_an_error(client: SyncPrefectClient, job: Job) -> None:
    with pytest.raises(InputError, match="no limit for GPUs") as caught, gpu_slot(job, Recorder()):
        raise AssertionError
    assert "flows.bootstrap" in caught.value.remedy


def test_a_node_on_a_cpu_and_an_embedded_server_need_none(client: SyncPrefectClient, job: Job) -> None:
    with gpu_slot(Job(**{**vars(job), "kind": Kind.CORPUS}), Recorder()):
        pass
    with temporary_settings({PREFECT_API_URL: None}), gpu_slot(job, Recorder()):
        pass


def test_what_is_done_already_takes_no_slot(job: Job, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    draft = Draft(kind="distilled", key="0" * 64, family="tiny", stage="small", run="the-first")
    publish(tmp_path / "work", open_location(job.uri), draft)

    @contextmanager
    def slot() -> Iterator[None]:
        raise AssertionError
        yield

    with NodeHost() as host:
        assert host.run(job, Recorder(), slot).reused
