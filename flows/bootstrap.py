"""`python -m flows.bootstrap`: what a Prefect server needs before a family can be built from its UI.

From the environment: PREFECT_API_URL, CASCADE_STORE, CASCADE_POOL (cpu), CASCADE_GPU_SLOTS (1), AWS_*. It
makes what is missing: the store's bucket, the work pools, the limit on GPUs, the automation that finds lost
runs, and the deployments. What is there stays as somebody has set it in the UI, so a second run changes
nothing; a new version of this package brings its deployments up to date, with their schedules left as they
are. Exit codes as of `cascade`.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from datetime import timedelta

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import (
    GlobalConcurrencyLimitCreate,
    WorkPoolCreate,
)
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL
from prefect.workers.process import ProcessWorker

from cascade.errors import CascadeError, InputError, MachineFault
from cascade.storage.locations import open_location, provide_store
from flows.deployments import definitions, register
from flows.gpu import GPU_LIMIT

CPU, GPU = "cpu", "gpu"
ZOMBIES = "cascade: lost runs are crashed"
# Three heartbeats of PREFECT_FLOWS_HEARTBEAT_FREQUENCY=30.
SILENT_SECONDS = 90
SERVER_SECONDS = 300.0
POLL_SECONDS = 0.5

Say = Callable[[str], None]


def bootstrap(environment: Mapping[str, str], say: Say) -> None:
    """Make what is missing, with one line for each thing.

    Raises InputError for wrong variables and for a store or a pool that cannot be used, StorageFault when the
    store fails, MachineFault when the server does not answer.
    """
    store = store_of(environment)
    pool, slots = environment.get("CASCADE_POOL") or CPU, slots_of(environment)
    if not PREFECT_API_URL.value():
        raise missing("PREFECT_API_URL", "the address of a Prefect server", "http://127.0.0.1:4200/api")
    made = provide_store(open_location(store))
    say(f"{'made' if made else 'unchanged'}: store {store}")
    with get_client(sync_client=True) as client:
        wait_for(client)
        ensure_pool(client, CPU, None, say)
        ensure_pool(client, GPU, slots, say)
        if pool not in (CPU, GPU):
            require_pool(client, pool)
        ensure_limit(client, slots, say)
        ensure_automation(client, say)
        for definition in definitions(store, pool):
            say(f"{register(client, definition)}: deployment {definition['name']}")


def missing(name: str, what: str, example: str) -> InputError:
    """A variable that has to be there."""
    return InputError(
        f"{name} is not set", where="environment", remedy=f"set it to {what}, such as {example}"
    )


def store_of(environment: Mapping[str, str]) -> str:
    """The absolute address of the store."""
    store = environment.get("CASCADE_STORE", "")
    if not store:
        raise missing("CASCADE_STORE", "the store", "s3://bucket/prefix")
    return open_location(store).uri


def slots_of(environment: Mapping[str, str]) -> int:
    """How many GPUs all workers have together."""
    text = environment.get("CASCADE_GPU_SLOTS") or "1"
    if not text.isascii() or not text.isdecimal() or not 0 < int(text) < 10**6:
        raise InputError(
            "the number of GPUs is wrong",
            value=text,
            where="CASCADE_GPU_SLOTS",
            remedy="give a whole number from 1: the GPUs that all workers have together",
        )
    return int(text)


def wait_for(client: SyncPrefectClient) -> None:
    """Wait until the server answers; MachineFault when it does not in `SERVER_SECONDS`."""
    deadline = time.monotonic() + SERVER_SECONDS
    while error := unreachable(client):
        if time.monotonic() > deadline:
            raise MachineFault(
                f"the Prefect server does not answer: {error}",
                value=PREFECT_API_URL.value(),
                where="PREFECT_API_URL",
                remedy="start the server, or correct the address",
            )
        time.sleep(POLL_SECONDS)


def unreachable(client: SyncPrefectClient) -> str:
    """Why the server cannot be reached; "" when it can."""
    try:
        client.hello().raise_for_status()
    except httpx.HTTPStatusError as error:
        if error.response.status_code not in (401, 403):
            return str(error)
        raise InputError(
            "the Prefect server does not accept us",
            value=error.response.status_code,
            where=str(PREFECT_API_URL.value()),
            remedy="set PREFECT_API_KEY or PREFECT_API_AUTH_STRING",
        ) from None
    except httpx.HTTPError as error:
        return str(error) or type(error).__name__
    return ""


def ensure_pool(client: SyncPrefectClient, name: str, slots: int | None, say: Say) -> None:
    """A work pool whose runs are processes of the worker; one that is there keeps its type and its limit."""
    try:
        found = client.read_work_pool(name)
        say(f"unchanged: work pool {name} ({found.type}, {limit_text(found.concurrency_limit)})")
        return
    except ObjectNotFound:
        pass
    client.create_work_pool(
        WorkPoolCreate(
            name=name,
            type=ProcessWorker.type,
            description="One run a GPU." if slots else "Runs that need no GPU.",
            base_job_template=ProcessWorker.get_default_base_job_template(),
            concurrency_limit=slots,
        )
    )
    say(f"made: work pool {name} ({ProcessWorker.type}, {limit_text(slots)})")


def limit_text(limit: int | None) -> str:
    """How many runs a pool allows, for a person."""
    return "any number of runs" if limit is None else f"{limit} at once"


def require_pool(client: SyncPrefectClient, name: str) -> None:
    """Raise InputError for a pool of another name that is not there: its type is not ours to choose."""
    try:
        client.read_work_pool(name)
    except ObjectNotFound:
        raise InputError(
            "there is no such work pool",
            value=name,
            where="CASCADE_POOL",
            remedy=f"name {CPU} or {GPU}, or make it first: prefect work-pool create {name} --type ...",
        ) from None


def ensure_limit(client: SyncPrefectClient, slots: int, say: Say) -> None:
    """The global limit that a node on a GPU takes a slot of, whatever pool it runs in."""
    try:
        found = client.read_global_concurrency_limit_by_name(GPU_LIMIT)
        say(f"unchanged: limit {GPU_LIMIT} ({found.limit})")
    except ObjectNotFound:
        client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=GPU_LIMIT, limit=slots))
        say(f"made: limit {GPU_LIMIT} ({slots})")


def ensure_automation(client: SyncPrefectClient, say: Say) -> None:
    """Marks a run as crashed whose machine is gone, which frees the slots that it holds."""
    if client.read_automations_by_name(ZOMBIES):
        say(f"unchanged: automation {ZOMBIES!r}")
        return
    client.create_automation(zombie_automation())
    say(f"made: automation {ZOMBIES!r}")


def zombie_automation() -> AutomationCore:
    """After a heartbeat, a run has to be heard of again: by the next one, or by any change of its state.

    A run that is suspended, or waits for a retry, sends no heartbeat; its last event says so.
    """
    return AutomationCore(
        name=ZOMBIES,
        description=f"A run that was not heard of for {SILENT_SECONDS} s has lost its machine.",
        trigger=EventTrigger(
            after={"prefect.flow-run.heartbeat"},
            expect={"prefect.flow-run.*"},
            match={"prefect.resource.id": ["prefect.flow-run.*"]},
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=SILENT_SECONDS),
        ),
        actions=[
            ChangeFlowRunState(
                name=None,
                state=StateType.CRASHED,
                message=f"No heartbeat for {SILENT_SECONDS} s: its machine is gone.",
                force=False,
            )
        ],
    )


def main() -> int:
    """Bootstrap from this process's environment; the exit code."""
    try:
        bootstrap(os.environ, print)
    except CascadeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
