"""`cascade up`: a store, a Prefect server, the deployments and a worker, until somebody ends it.

Prefect is never imported here: its parts are processes.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from cascade.cards.links import BROWSER
from cascade.errors import CascadeError, InputError
from cascade.family.job import KILL_SECONDS
from cascade.stack.api import Api
from cascade.stack.environment import client_environment, server_environment
from cascade.stack.home import NAME, Home, opened
from cascade.stack.machine import gpu_count
from cascade.stack.ports import found, require_free
from cascade.stack.processes import Service, descendants, end_descendants, in_keeper
from cascade.stack.seaweed import Seaweed
from cascade.storage.locations import open_location, provide_store

UI_PORT = 4200
START_SECONDS = 300.0
# A flow that is asked to end gives its trainer this time; it then has to say so to the server.
FLOW_SECONDS = KILL_SECONDS + 10
# The worker has to hear of it first.
CANCEL_SECONDS = FLOW_SECONDS + 25
WATCH_SECONDS = 0.5
SMOKE = "build-family/smoke"
PREFECT = (sys.executable, "-m", "prefect", "--no-prompt")

Say = Callable[[str], None]


@dataclass(frozen=True)
class Wishes:
    """What a person asked for. store: a URI of one's own, "" for one in `home`. Ports: 0 for any free one."""

    home: Path
    store: str = ""
    port: int = 0
    store_port: int = 0


@dataclass(frozen=True)
class Stack:
    """What runs. variables: what another shell needs, which `environment`, a file, sets there."""

    api: Api
    home: Home
    variables: dict[str, str]
    environment: Path
    services: list[Service]


def up(wishes: Wishes, say: Say) -> None:
    """Start everything, say where it is, and keep it until a signal comes or a part of it ends.

    Raises InputError for what is wrong, before anything runs; CascadeError when a part does not start, or
    ends.
    """
    if wishes.store and wishes.store_port:
        raise InputError(
            "no store is started where one is given",
            value=wishes.store_port,
            where="--store-port",
            remedy="leave out --store-port, or --store",
        )
    in_keeper()
    began = time.monotonic()
    with opened(wishes.home) as home, ExitStack() as parts:
        say(f"starting in {home.path}")
        try:
            stack = started(home, wishes, parts, say)
            say(summary(stack))
            say(f"ready in {time.monotonic() - began:.0f} s; Ctrl-C ends all of it")
            watch(stack.services)
        except (KeyboardInterrupt, SystemExit):
            say("stopping: what runs is cancelled and keeps its last snapshot")
            raise


def watch(services: list[Service]) -> NoReturn:
    """Raise CascadeError as soon as one of them ends."""
    while True:
        for service in services:
            service.require_running()
        time.sleep(WATCH_SECONDS)


def started(home: Home, wishes: Wishes, parts: ExitStack, say: Say) -> Stack:
    """Start the parts, each of which ends with `parts`, the last one first."""
    api = Api(require_free(wishes.port, "--port") if wishes.port else found(UI_PORT))
    seaweed = None if wishes.store else own_store(home, wishes.store_port)
    if wishes.store:
        provide_store(open_location(wishes.store))
    # It takes longest: the others start meanwhile, and wait for it.
    server = parts.enter_context(prefect_server(home, api))
    variables = {"PREFECT_API_URL": api.url, **access(home, wishes.store, seaweed, parts)}
    environment = client_environment(home.prefect, variables, gpu_count(say))
    registration = parts.enter_context(bootstrap(home, environment))
    server.wait_until(api.answers, START_SECONDS)
    require_registered(registration)
    worker = parts.enter_context(prefect_worker(home, environment, api))
    services = [server, worker, *([seaweed.service] if seaweed else [])]
    return Stack(api, home, variables, home.write_environment(variables), services)


def own_store(home: Home, port: int) -> Seaweed:
    """The store in `home`, not started yet."""
    if port:
        require_free(port, "--store-port", pair=True)
    return Seaweed(home.store, NAME, (home.identity,), s3_port=port, log=home.log("store"))


def access(home: Home, uri: str, seaweed: Seaweed | None, parts: ExitStack) -> dict[str, str]:
    """The store's variables; it is started if it is ours. The keys of another one are not repeated."""
    if seaweed is None:
        return {"CASCADE_STORE": open_location(uri).uri}
    parts.enter_context(seaweed)
    keys = seaweed.variables(home.identity)
    return {**keys, "CASCADE_STORE": f"s3://{NAME}/families", BROWSER: seaweed.browser}


@contextmanager
def prefect_server(home: Home, api: Api) -> Iterator[Service]:
    """The server with its UI; it is ready when it `answers`."""
    environment = server_environment(home.prefect, api)
    command = [*PREFECT, "server", "start"]
    with Service("the Prefect server", command, environment, home.log("server")) as server:
        yield server


def bootstrap(home: Home, environment: dict[str, str]) -> Service:
    """What registers pools, limits and deployments as soon as the server answers."""
    command = [sys.executable, "-m", "flows.bootstrap"]
    return Service("bootstrap", command, environment, home.log("bootstrap"))


def require_registered(registration: Service) -> None:
    """Wait until bootstrap has ended; raise CascadeError with its own words if it did not end well."""
    try:
        code = registration.process.wait(START_SECONDS)
    except subprocess.TimeoutExpired:
        raise registration.failed(f"bootstrap was not ready in {START_SECONDS:.0f} s") from None
    if code:
        raise registration.failed("the deployments could not be registered")


@contextmanager
def prefect_worker(home: Home, environment: dict[str, str], api: Api) -> Iterator[Service]:
    """A worker that takes runs from the pool; on leaving, its runs are cancelled and have ended."""
    pool = environment["CASCADE_POOL"]
    before, others = api.heartbeat(pool, NAME), descendants(os.getpid())
    command = [*PREFECT, "worker", "start", "--pool", pool, "--name", NAME]
    log, orphaned = home.log("worker"), signal.SIGTERM
    worker = Service("the Prefect worker", command, environment, log, orphaned=orphaned)
    try:
        with worker:
            worker.wait_until(lambda: api.heartbeat(pool, NAME) != before, START_SECONDS)
            try:
                yield worker
            finally:
                # Without a server only the worker is told. It kills its runs, of which the trainers hear from
                # the kernel, or waits for them until it is killed itself: then we tell them.
                with suppress(CascadeError):
                    cancel_runs(api, pool)
    finally:
        end_descendants(others, FLOW_SECONDS, asked=not worker.killed)
        # On a busy machine the worker does not come to say so itself.
        with suppress(CascadeError):
            cancel_each(api, pool, ended=True)


def cancel_runs(api: Api, pool: str) -> None:
    """Cancel what runs, and wait until it has ended: the worker alone would leave without a word about it."""
    deadline = time.monotonic() + CANCEL_SECONDS
    cancel_each(api, pool)
    while api.taken_runs(pool) and time.monotonic() < deadline:
        time.sleep(WATCH_SECONDS)


def cancel_each(api: Api, pool: str, *, ended: bool = False) -> None:
    """Ask every run of a pool to end, or say that it has. A refusal, as for a deleted run, stops no other."""
    for run in api.taken_runs(pool):
        with suppress(CascadeError):
            api.cancel(run["id"], ended=ended)


def summary(stack: Stack) -> str:
    """Where everything is, and the one command that builds something small."""
    command = f"{prefect_command()} deployment run '{SMOKE}' --watch"
    lines = {
        "Prefect UI": stack.api.ui,
        "bucket browser": stack.variables.get(BROWSER, "").format(bucket=NAME, prefix=""),
        "store": stack.variables["CASCADE_STORE"],
        "environment": f"source {shlex.quote(str(stack.environment))}",
        "logs": str(stack.home.logs),
        "smoke build": f"PREFECT_API_URL={stack.api.url} {command}",
    }
    return "\n".join(f"{name + ':':<16}{text}" for name, text in lines.items() if text)


def prefect_command() -> str:
    """How a shell calls this environment's Prefect."""
    beside = Path(sysconfig.get_path("scripts")) / "prefect"
    on_path = shutil.which("prefect")
    return "prefect" if on_path and Path(on_path) == beside else shlex.quote(str(beside))
