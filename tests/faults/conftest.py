"""A store behind a proxy that can fail."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

from cascade.storage import connection, patience
from cascade.storage.locations import Location, open_location
from tests.e2e.conftest import command
from tests.faults.proxy import FaultyProxy
from tests.s3_server import S3Server

__all__ = ["command"]


@pytest.fixture
def proxy(s3: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """Between this process, with those it starts, and the real server; waits begin at 10 ms."""
    monkeypatch.setattr(patience, "FIRST_WAIT", 0.01)
    # An earlier proxy may have had the same port.
    connection._connect_once.cache_clear()
    with FaultyProxy(urlsplit(s3_server.endpoint).port or 0) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        monkeypatch.setenv(patience.SETTING, "20")
        yield proxy


@pytest.fixture
def place(proxy: FaultyProxy, s3: str) -> Location:
    """An empty place behind the proxy."""
    return open_location(s3)
