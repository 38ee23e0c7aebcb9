"""A node of the graph as a Prefect task."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from prefect import State, Task, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import TaskRun
from prefect.states import Completed

from cascade.errors import CascadeError
from cascade.family.job import load_job
from cascade.family.runner import NodeHost
from flows.gpu import gpu_slot
from flows.progress import RunReport

REUSED = "Reused"
RETRIES = 3
RETRY_SECONDS = [5.0, 30.0, 120.0]

_host: ContextVar[NodeHost | None] = ContextVar("host", default=None)


@contextmanager
def hosting() -> Iterator[NodeHost]:
    """The host of the flow that is running, or one of its own, which ends with the block."""
    running = _host.get()
    if running:
        yield running
        return
    with NodeHost() as host:
        token = _host.set(host)
        try:
            yield host
        finally:
            _host.reset(token)


def worth_retrying(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """Storage and machine faults may pass; wrong input and failed work stay as they are."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, CascadeError) and error.retryable


# The store says what is done, not Prefect's result cache: a retry, a new run and another machine agree.
@task(
    task_run_name="{name}",
    retries=RETRIES,
    retry_delay_seconds=RETRY_SECONDS,
    retry_condition_fn=worth_retrying,
    cache_policy=NO_CACHE,
    persist_result=False,
)
def run_node(name: str, job: str) -> State[None]:
    """Run one job (JSON) in a node's process; the state is called Reused when it was done before."""
    order = load_job(job)
    report = RunReport(order)
    try:
        with hosting() as host:
            outcome = host.run(order, report, lambda: gpu_slot(order, report))
    except BaseException as error:
        if not isinstance(error, Exception):
            report.note("stopped: the next run of this recipe goes on from what it has stored")
        report.stop()
        raise
    if outcome.reused:
        report.note(f"reused {order.uri}, made by run {outcome.manifest.run}")
        return Completed(name=REUSED, message=f"made by run {outcome.manifest.run}")
    report.finish()
    return Completed(message=order.uri)
