"""A bucket whose quota is used up: the error says so at once, and with room the same command goes on."""

from __future__ import annotations

import http.client
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch

from cascade.errors import CascadeError
from cascade.storage.artifacts import problems, publish, read_manifest
from cascade.storage.checkpoints import TrainingCheckpoints
from cascade.storage.locations import Location, open_location
from cascade.storage.manifest import Draft
from tests.e2e.conftest import Command
from tests.s3_server import S3Server
from tests.tiny_family import tiny_tree, write_recipe

DRAFT = Draft(kind="pruned", key="ab" * 32, family="tiny", stage="a")
HOP_BY_HOP = {"connection", "expect", "transfer-encoding"}


@dataclass
class Quota:
    """What a bucket still takes, and how it refuses the rest."""

    bytes: int
    status: int
    code: str
    refused: int = 0


def handler(upstream: str, quota: Quota) -> type[BaseHTTPRequestHandler]:
    """Forwards every request, but for what would store more than the quota."""

    class Forward(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: object) -> None:
            """Nothing is logged."""

        def forward(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            body = self.rfile.read(length)
            if self.command in ("PUT", "POST"):
                if length > quota.bytes:
                    quota.refused += 1
                    error = f"<Error><Code>{quota.code}</Code><Message>no room</Message></Error>".encode()
                    self.answer(quota.status, [("Content-Type", "application/xml")], error)
                    return
                quota.bytes -= length
            connection = http.client.HTTPConnection(upstream)
            kept = {name: value for name, value in self.headers.items() if name.lower() not in HOP_BY_HOP}
            connection.request(self.command, self.path, body, kept)
            response = connection.getresponse()
            self.answer(response.status, response.getheaders(), response.read())
            connection.close()

        def answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
            self.send_response_only(status)
            for name, value in headers:
                if name.lower() not in HOP_BY_HOP and (
                    name.lower() != "content-length" or self.command == "HEAD"
                ):
                    self.send_header(name, value)
            if self.command != "HEAD":
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = forward

    return Forward


@contextmanager
def limited(server: S3Server, quota: Quota) -> Iterator[str]:
    """The address of a store with this quota, in front of the real one."""
    front = ThreadingHTTPServer(("127.0.0.1", 0), handler(urlsplit(server.endpoint).netloc, quota))
    front.daemon_threads = True
    threading.Thread(target=front.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{front.server_port}"
    finally:
        front.shutdown()
        front.server_close()


# As the standard has it, Ceph, MinIO with a full disk, and MinIO with a quota.
REFUSALS = [
    (507, "InsufficientStorage"),
    (403, "QuotaExceeded"),
    (507, "XMinioStorageFull"),
    (400, "XMinioAdminBucketQuotaExceeded"),
    (507, "Whatever"),
]


@pytest.fixture
def quota(s3: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Quota]:
    """1 MB of room."""
    quota = Quota(10**6, 507, "InsufficientStorage")
    with limited(s3_server, quota) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        yield quota


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A small file and one of 1.5 MB."""
    (tmp_path / "work").mkdir()
    (tmp_path / "work/config.json").write_text("{}")
    (tmp_path / "work/weights").write_bytes(os.urandom(1_500_000))
    return tmp_path / "work"


def require_four_parts(error: CascadeError, place: Location) -> None:
    """The error says that it is the store that is full, and what to do."""
    assert type(error) is CascadeError
    assert "the store is full, or its quota is used up" in error.what
    assert str(error.value).startswith(place.uri)
    assert "127.0.0.1" in error.where
    assert "cascade gc" in error.remedy
    assert not error.retryable


@pytest.mark.parametrize(("status", "code"), REFUSALS)
def test_an_artifact_that_does_not_fit_is_not_done_and_fits_later(
    status: int, code: str, s3: str, quota: Quota, work: Path
) -> None:
    quota.status, quota.code = status, code
    place = open_location(f"{s3}/tiny/a/pruned/abababababab")
    began = time.monotonic()
    with pytest.raises(CascadeError) as caught:
        publish(work, place, DRAFT)
    require_four_parts(caught.value, place)
    # To ask a full store again and again helps nobody.
    assert quota.refused <= 9
    assert time.monotonic() - began < 60
    assert read_manifest(place) is None
    assert place.walk() == ["config.json"]
    quota.bytes = 10**9
    publish(work, place, DRAFT)
    assert problems(place) == []


def test_an_older_checkpoint_stays_when_the_newer_one_does_not_fit(
    s3: str, quota: Quota, tmp_path: Path
) -> None:
    checkpoints = TrainingCheckpoints(open_location(f"{s3}/training"))
    checkpoints.save(1, {"weight": torch.zeros(8)}, {"state": "older"})
    with pytest.raises(CascadeError) as caught:
        checkpoints.save(2, {"weight": torch.zeros(400_000)}, {"state": "newer"})
    require_four_parts(caught.value, checkpoints.location)
    found = checkpoints.latest(tmp_path)
    assert found is not None
    assert found[0] == {"state": "older"}


@pytest.mark.slow
def test_a_build_into_a_full_bucket_goes_on_when_there_is_room(
    s3: str, quota: Quota, tiny_parent: Path, tiny_corpus: Path, tmp_path: Path, command: Command
) -> None:
    """Full again and again, at other moments; in the end the children are those of a build with room."""
    tree = tiny_tree(tiny_parent, tiny_corpus)
    tree["stages"] = tree["stages"][:1]
    tree["stages"][0]["distill"]["tokens"] = 4096
    recipe = str(write_recipe(tmp_path / "recipe.yaml", tree))
    failures, quota.bytes = 0, 100_000
    while True:
        code, said = command("build", recipe, "--direct", "--store", s3, "--checkpoint-seconds", "0")
        if code == 0:
            break
        failures += 1
        assert code == 1, said
        assert "the store is full, or its quota is used up" in said
        assert "Traceback" not in said
        # More each time: how many snapshots a build stores until it stops depends on the machine.
        quota.bytes += 1_500_000 * failures
        assert failures < 20
    assert failures >= 3
    assert command("verify", s3)[0] == 0
    folder = tmp_path / "folder"
    assert command("build", recipe, "--direct", "--store", str(folder))[0] == 0
    (weights,) = folder.glob("tiny/large/distilled/*/model.safetensors")
    same = open_location(s3) / weights.relative_to(folder).as_posix()
    assert same.read_bytes() == weights.read_bytes()
