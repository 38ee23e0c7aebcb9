"""The stack's questions to a Prefect server that is busy, breaks off, refuses or is gone."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from cascade.errors import CascadeError, MachineFault
from cascade.stack import api as questions
from cascade.stack.api import Api
from cascade.stack.ports import HOST, found
from cascade.stack.up import cancel_each, cancel_runs

Answer = tuple[int, bytes]
BUSY = (503, b"")
# Announced are ten bytes more than come.
SHORT = (-200, b"[]")
NO_JSON = (200, b"<html>")


class Server:
    """Answers as it is told, and keeps what it was asked. waiting: these answers come first."""

    def __init__(self, port: int) -> None:
        self.asked: list[str] = []
        self.waiting: list[Answer] = []
        self.decide: Callable[[str], Answer] = lambda path: (200, b"[]")
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                outer.asked.append(self.path)
                code, content = outer.waiting.pop(0) if outer.waiting else outer.decide(self.path)
                self.send_response(abs(code))
                self.send_header("Content-Length", str(len(content) + (10 if code < 0 else 0)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer((HOST, port), Handler)


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server(0)
    thread = threading.Thread(target=server.http.serve_forever)
    thread.start()
    yield server
    server.http.shutdown()
    thread.join()
    server.http.server_close()


@pytest.fixture
def api(server: Server, monkeypatch: pytest.MonkeyPatch) -> Api:
    monkeypatch.setattr(questions, "PAUSE_SECONDS", 0.01)
    return Api(server.http.server_address[1])


@pytest.mark.parametrize("answer", [BUSY, SHORT, NO_JSON], ids=["busy", "short", "no JSON"])
def test_a_server_that_is_busy_for_a_moment_is_asked_again(server: Server, api: Api, answer: Answer) -> None:
    server.waiting = [answer, answer]
    assert api.heartbeat("cpu", "cascade") is None
    assert len(server.asked) == 3


@pytest.mark.parametrize("answer", [BUSY, SHORT, NO_JSON], ids=["busy", "short", "no JSON"])
def test_one_that_stays_so_does_not_answer(
    server: Server, api: Api, answer: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Every question takes a second, of which it has one and a half.
    clock = SimpleNamespace(monotonic=lambda: float(len(server.asked)), sleep=lambda seconds: None)
    monkeypatch.setattr(questions, "time", clock)
    monkeypatch.setattr(questions, "PATIENCE_SECONDS", 1.5)
    server.decide = lambda path: answer
    with pytest.raises(MachineFault, match="does not answer") as caught:
        api.taken_runs("cpu")
    assert caught.value.where == api.url
    assert len(server.asked) == 2


def test_one_that_is_gone_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(questions, "PATIENCE_SECONDS", 0.1)
    api = Api(found(None))
    assert not api.answers()
    with pytest.raises(MachineFault, match="does not answer"):
        api.taken_runs("cpu")


def test_a_refusal_is_said_to_be_one_and_not_repeated(server: Server, api: Api) -> None:
    server.decide = lambda path: (404, b"")
    with pytest.raises(CascadeError, match="refuses") as caught:
        api.cancel("one")
    assert not isinstance(caught.value, MachineFault)
    assert caught.value.value == "HTTP Error 404: Not Found"
    assert caught.value.where == f"{api.url}/flow_runs/one/set_state"
    assert len(server.asked) == 1


def test_a_run_that_was_deleted_keeps_no_other_from_being_cancelled(server: Server, api: Api) -> None:
    there = ["deleted", "second", "third"]

    def decide(path: str) -> Answer:
        run = path.split("/")[3]
        if run == "filter":
            return 200, json.dumps([{"id": one} for one in there]).encode()
        there.remove(run)
        return (404 if run == "deleted" else 200), b"{}"

    server.decide = decide
    cancel_runs(api, "cpu")
    assert there == []
    there[:] = ["deleted", "second"]
    cancel_each(api, "cpu", ended=True)
    assert there == []
