"""Fixtures shared by every test: a real S3 server, a tiny parent, and a home of their own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.architectures import ARCHITECTURES, CORE
from tests.s3_server import S3Server
from tests.tiny import make_corpus, make_parent

# Tiny matrices gain nothing from a second thread and lose a lot when the machine is busy. Nodes inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of every architecture are slow, but for those of a few that differ most."""
    for item in items:
        name = (
            item.callspec.params.get("name")
            if isinstance(item, pytest.Function) and hasattr(item, "callspec")
            else None
        )
        if name in ARCHITECTURES and name not in CORE:
            item.add_marker(pytest.mark.slow)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many broken inputs were tried: tests note their number as the property `tried`."""
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    noted = [note for report in reports for note in getattr(report, "user_properties", ())]
    if tried := sum(value for name, value in noted if name == "tried"):
        terminalreporter.write_line(f"broken inputs tried: {tried}")


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """One SeaweedFS for the whole session, on free loopback ports."""
    with S3Server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """The URI of an empty prefix in a real bucket, with the credentials in the environment."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://{s3_server.bucket}/{request.node.name.replace('[', '-').replace(']', '')}"


@pytest.fixture(scope="session")
def tiny_parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with grouped queries and tied embeddings, as a Hugging Face folder."""
    return make_parent(tmp_path_factory.mktemp("tiny") / "parent")


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small corpus file with one JSON document a line, field `text`."""
    return make_corpus(tmp_path_factory.mktemp("tiny") / "corpus.jsonl")


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[str]:
    """The API's URL of a real Prefect server with a database of its own; one for the whole session."""
    # Imported here: most tests do without Prefect, which takes seconds to load.
    from prefect.settings import PREFECT_API_URL
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=300):
        yield str(PREFECT_API_URL.value())
