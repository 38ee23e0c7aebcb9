"""The preflight: every way in which a store cannot be used is said in seconds, with the way out."""

from __future__ import annotations

import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import s3fs

from cascade.errors import InputError
from cascade.storage import connection
from cascade.storage.locations import Location, check_store, open_location
from tests.s3_server import S3Server


def refusal(location: Location, create: bool = True) -> InputError:
    """The InputError of the preflight, which must be quick, complete and silent about secrets."""
    started = time.monotonic()
    with pytest.raises(InputError) as caught:
        check_store(location, create)
    assert time.monotonic() - started < 15
    assert caught.value.remedy
    assert location.uri in str(caught.value)
    assert os.environ.get("AWS_SECRET_ACCESS_KEY", "no such text") not in str(caught.value)
    return caught.value


def test_a_good_store_passes_and_stays_as_it_was(store: Location) -> None:
    (store / "family.json").write_bytes(b"{}")
    check_store(store)
    check_store(store, create=False)
    assert store.walk() == ["family.json"]
    if store.local_path is None:
        assert s3fs.S3FileSystem().find(store.uri) == [f"{store.uri[5:]}/family.json"]
    else:
        assert os.listdir(store.local_path) == ["family.json"]


def test_a_store_that_does_not_exist_yet_is_not_made(store: Location) -> None:
    check_store(store / "deep/er")
    assert not store.exists()


def test_refused_connection(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    error = refusal(open_location(s3))
    assert "cannot be reached" in error.what
    assert error.where == "http://127.0.0.1:9"


@pytest.fixture
def deaf_server() -> Iterator[int]:
    """The port of a server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield int(server.getsockname()[1])


def test_an_endpoint_that_never_answers(s3: str, monkeypatch: pytest.MonkeyPatch, deaf_server: int) -> None:
    monkeypatch.setitem(connection.CHECK_LIMITS, "read_timeout", 1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{deaf_server}")
    assert "cannot be reached" in refusal(open_location(s3)).what


def test_an_endpoint_that_is_not_s3(s3: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{s3_server.ports['master']}")
    assert "does not answer like S3" in refusal(open_location(s3)).what


@pytest.mark.parametrize("url", ["localhost:8333", "http://", "ftp://host", "http://me:hush@host"])
def test_an_endpoint_that_is_no_url(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    error = refusal(open_location("s3://bucket/x"))
    assert "AWS_ENDPOINT_URL is not the plain URL" in error.what
    assert "hush" not in str(error)


@pytest.mark.usefixtures("s3")
def test_missing_bucket() -> None:
    for create in (True, False):
        assert "bucket does not exist" in refusal(open_location("s3://no-such-bucket/x"), create).what


@pytest.mark.usefixtures("s3")
def test_impossible_bucket_name() -> None:
    assert "not a valid bucket" in refusal(open_location("s3://No_Such Bucket/x")).what


@pytest.mark.parametrize("name", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_credentials(s3: str, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "this-is-wrong")
    error = refusal(open_location(s3))
    assert "does not accept the credentials" in error.what
    assert "AWS_SECRET_ACCESS_KEY" in error.remedy


@pytest.mark.parametrize("kept", ["", "AWS_ACCESS_KEY_ID"])
def test_no_credentials(s3: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kept: str) -> None:
    for name in {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"} - {kept}:
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    assert "no usable S3 credentials" in refusal(open_location(s3)).what


def test_a_key_that_may_only_read(s3: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3_server.reader_environment.items():
        monkeypatch.setenv(name, value)
    check_store(open_location(s3), create=False)
    assert "does not permit" in refusal(open_location(s3)).what


def test_a_store_without_conditional_writes(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original: Callable[..., object] = s3fs.S3FileSystem.pipe_file

    def unconditional(self: s3fs.S3FileSystem, path: str, data: bytes, mode: str, **mark: object) -> object:
        return original(self, path, data)

    # A connection made now keeps the patched method for good: none of them may be kept for other tests.
    monkeypatch.setattr(connection, "_connect_once", connection._connect_once.__wrapped__)
    monkeypatch.setattr(s3fs.S3FileSystem, "pipe_file", unconditional)
    assert "overwrites" in refusal(open_location(s3)).what
    assert not open_location(s3).exists()


def test_a_folder_that_is_not_there_cannot_be_read(tmp_path: Path) -> None:
    assert "does not exist" in refusal(open_location(str(tmp_path / "none")), create=False).what


def test_a_file_is_not_a_store(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("1")
    for path in ("file", "file/store"):
        assert "in the way" in refusal(open_location(str(tmp_path / path))).what


def test_a_folder_that_may_not_be_written() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        user = os.geteuid()
        try:
            if user == 0:
                # Nothing is read-only for root; the preflight has to run as somebody.
                os.seteuid(65534)
            error = refusal(open_location(folder) / "store")
        finally:
            os.seteuid(user)
    assert "does not permit" in error.what
