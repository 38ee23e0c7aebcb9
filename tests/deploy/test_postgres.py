"""The bootstrap against a real Prefect server on a real PostgreSQL, as the compose file starts them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cascade.stack.ports import HOST, found
from tests.deploy.composed import SERVICES
from tests.deploy.postgres import PACKAGE, Postgres, programs
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
DEPLOYMENTS = {
    *("build-family", "build-family-weekly", "smoke", "rebuild-stage"),
    *("evaluate-family", "promote", "collect-garbage"),
}


@pytest.fixture
def postgres() -> Iterator[Postgres]:
    """PostgreSQL; skips, and says what is missing, where it is not installed."""
    if programs() is None:
        pytest.skip(f"PostgreSQL is not installed: apt-get install {PACKAGE}")
    # Not under pytest's folder, which only its own user may enter.
    folder = Path(tempfile.mkdtemp(prefix="cascade-postgres-"))
    folder.chmod(0o755)
    try:
        with Postgres(folder / "cluster") as server:
            yield server
    finally:
        shutil.rmtree(folder)


@contextmanager
def server(environment: dict[str, str], port: int, log: Path) -> Iterator[None]:
    """A Prefect server, started with compose's command."""
    command = [str(part) for part in SERVICES["server"]["command"]]
    assert command[0] == "prefect"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            env={**environment, "PREFECT_SERVER_API_PORT": str(port)},
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
    try:
        assert wait_until(lambda: process.poll() is not None or ready(port))
        assert process.poll() is None, log.read_text()
        yield
    finally:
        process.terminate()
        process.wait(60)


def ready(port: int) -> bool:
    """What compose's health check of the server asks."""
    _, _, _, code = SERVICES["server"]["healthcheck"]["test"]
    address = code.split("'")[1].replace(":4200", f":{port}")
    assert address == f"http://{HOST}:{port}/api/ready"
    try:
        with urllib.request.urlopen(address, timeout=8) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def bootstrapped(environment: dict[str, str]) -> list[str]:
    """The lines of the bootstrap, run with compose's command."""
    command = [str(part) for part in SERVICES["bootstrap"]["command"]]
    assert command[0] == "python"
    done = subprocess.run(
        [sys.executable, *command[1:]], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_the_bootstrap_makes_everything_once(postgres: Postgres, s3: str, tmp_path: Path) -> None:
    _, *check = SERVICES["postgres"]["healthcheck"]["test"]
    assert postgres.healthy(check)
    port = found(None)
    own = {name: text for name, text in os.environ.items() if not name.startswith("PREFECT_")}
    own |= {"PREFECT_HOME": str(tmp_path / "home"), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    client = {
        **own,
        "PREFECT_API_URL": f"http://{HOST}:{port}/api",
        "CASCADE_STORE": s3,
        "CASCADE_GPU_SLOTS": "3",
    }
    with server({**own, **postgres.environment}, port, tmp_path / "log"):
        first, second = bootstrapped(client), bootstrapped(client)
    made = [line for line in first if line.startswith("made: ")]
    assert len(made) >= len(DEPLOYMENTS) + 4
    assert len(first) == len(second)
    assert all(line.startswith("unchanged: ") for line in second), second
    # Asked of the database itself: it is where the server keeps them.
    names = set(postgres.query("SELECT name FROM deployment", "prefect").split())
    assert names == DEPLOYMENTS
    pools = postgres.query("SELECT name, type FROM work_pool ORDER BY name", "prefect").split()
    assert pools == ["cpu|process", "gpu|process"]
    limits = postgres.query("SELECT tag, concurrency_limit FROM concurrency_limit", "prefect")
    limits += postgres.query('SELECT name, "limit" FROM concurrency_limit_v2', "prefect")
    assert "gpu|3" in limits.split()
    assert postgres.query("SELECT count(*) FROM automation", "prefect").strip() == "1"
