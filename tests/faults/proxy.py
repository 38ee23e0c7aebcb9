"""A proxy between S3 clients and a real server that does to requests what networks and busy services do."""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from types import TracebackType
from typing import Self

HEAD_BYTES = 2**16
PAUSE_SECONDS = 0.05


class Fault(StrEnum):
    """What happens to one request."""

    NONE = "none"
    INTERNAL = "answered 500"
    UNAVAILABLE = "answered 503 SlowDown"
    RESET = "reset after half of what it sends"
    LOST = "done, its answer lost"
    CUT = "half of its answer, under the right Content-Length"
    SHORT = "half of its answer, under a Content-Length that agrees"
    SLOW = "its answer in drops"


REFUSALS = {
    Fault.INTERNAL: ("500 Internal Server Error", "InternalError"),
    Fault.UNAVAILABLE: ("503 Slow Down", "SlowDown"),
}


@dataclass(frozen=True)
class Request:
    """The first line of a request."""

    method: str
    target: str


Plan = Callable[[Request], Fault]


@dataclass
class FaultyProxy:
    """Forwards to a port of this machine; `plan` says what happens to each request.

    Use it as a context manager. Every request gets connections of its own.
    seen: what was asked, and what was done to it.
    """

    upstream: int
    plan: Plan = lambda request: Fault.NONE
    seen: list[tuple[Request, Fault]] = field(default_factory=list)

    def __enter__(self) -> Self:
        self._loop, self._kept = asyncio.new_event_loop(), socket.socket()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.port = self._run(self._open(0))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._run(self._close())
        self._kept.close()
        self._run(self._drain())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def endpoint(self) -> str:
        """The URL for clients."""
        return f"http://127.0.0.1:{self.port}"

    def refuse(self) -> None:
        """From now on nobody listens here."""
        self._run(self._close())

    def listen(self) -> None:
        """And now somebody does again."""
        self._run(self._open(self.port))

    def outage(self, seconds: float) -> threading.Timer:
        """Refuse connections for a while; the timer that ends it has been started."""
        self.refuse()
        timer = threading.Timer(seconds, self.listen)
        timer.start()
        return timer

    def _run(self, work: object) -> int:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)  # type: ignore[arg-type]

    async def _open(self, port: int) -> int:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", port, limit=HEAD_BYTES)
        self._kept.close()
        return int(self._server.sockets[0].getsockname()[1])

    async def _close(self) -> int:
        self._server.close()
        # Bound and not listening: the port refuses whoever comes, and nobody else is given it meanwhile.
        self._kept.close()
        self._kept = socket.socket()
        self._kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._kept.bind(("127.0.0.1", self.port))
        return 0

    async def _drain(self) -> int:
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return 0

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._answer(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            # Either side went away, as in every network.
            pass
        finally:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        request = Request(*head.decode("latin-1").split(" ", 2)[:2])
        fault = self.plan(request)
        self.seen.append((request, fault))
        fields = parsed(head)
        if "expect" in fields:
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        length = int(fields.get("content-length", 0))
        if fault is Fault.RESET:
            await reader.readexactly(length // 2)
            reset(writer)
            return
        body = await reader.readexactly(length)
        if fault in REFUSALS:
            writer.write(refusal(*REFUSALS[fault], request))
            await writer.drain()
            return
        await self._reply(await self._forward(head, body), fault, request, writer)

    async def _forward(self, head: bytes, body: bytes) -> bytes:
        """The server's whole answer."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.upstream)
        try:
            first, *lines = head.split(b"\r\n")
            kept = [line for line in lines if not line.lower().startswith((b"connection:", b"expect:"))]
            writer.write(b"\r\n".join([first, b"Connection: close", *kept]) + body)
            return await reader.read(-1)
        finally:
            writer.close()

    async def _reply(
        self, answer: bytes, fault: Fault, request: Request, writer: asyncio.StreamWriter
    ) -> None:
        if fault is Fault.LOST:
            reset(writer)
            return
        head, _, body = answer.partition(b"\r\n\r\n")
        if fault in (Fault.CUT, Fault.SHORT):
            body = body[: len(body) // 2]
        if fault is Fault.SHORT and request.method != "HEAD":
            head = relabelled(head, len(body))
        pieces = [
            body[place : place + 1 + len(body) // 3] for place in range(0, len(body), 1 + len(body) // 3)
        ]
        writer.write(head + b"\r\n\r\n")
        for piece in pieces if fault is Fault.SLOW else [body]:
            writer.write(piece)
            await writer.drain()
            if fault is Fault.SLOW:
                await asyncio.sleep(PAUSE_SECONDS)


def parsed(head: bytes) -> dict[str, str]:
    """Header fields by their name in lowercase."""
    lines = head.decode("latin-1").split("\r\n")[1:]
    return {
        name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines) if value
    }


def relabelled(head: bytes, length: int) -> bytes:
    """The head of an answer that claims this length, and no checksum."""
    kept = [
        line
        for line in head.split(b"\r\n")
        if not line.lower().startswith((b"content-length:", b"x-amz-checksum"))
    ]
    return b"\r\n".join([*kept, b"Content-Length: %d" % length])


def refusal(status: str, code: str, request: Request) -> bytes:
    """An answer of a service that cannot help now."""
    body = f"<Error><Code>{code}</Code><Message>not now</Message></Error>".encode()
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"Connection: close\r\n\r\n" + (b"" if request.method == "HEAD" else body)


def reset(writer: asyncio.StreamWriter) -> None:
    """End the connection with RST instead of FIN."""
    connection: socket.socket = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


class Once:
    """Does each of the faults to the next request of this method whose target holds this text."""

    def __init__(self, *faults: Fault, method: str = "", text: str = "") -> None:
        self.left, self.method, self.text = list(faults), method, text

    def __call__(self, request: Request) -> Fault:
        """See `Plan`."""
        meant = request.method.startswith(self.method) and self.text in request.target
        return self.left.pop(0) if meant and self.left else Fault.NONE


class First:
    """Does the fault to whatever is asked for the first time."""

    def __init__(self, fault: Fault) -> None:
        self.fault, self.known = fault, set[Request]()

    def __call__(self, request: Request) -> Fault:
        """See `Plan`."""
        first = request not in self.known
        self.known.add(request)
        return self.fault if first else Fault.NONE


class After:
    """Does the fault to all that is asked after so many requests."""

    def __init__(self, good: int, fault: Fault) -> None:
        self.good, self.fault, self.met = good, fault, False

    def __call__(self, request: Request) -> Fault:
        """See `Plan`."""
        self.good -= 1
        self.met = self.good < 0
        return self.fault if self.met else Fault.NONE


class Storm:
    """Every request meets a fault with this probability, in a seeded order, until it is over."""

    def __init__(self, seed: int, share: float) -> None:
        self.random, self.share = random.Random(seed), share
        self.lock = threading.Lock()

    def __call__(self, request: Request) -> Fault:
        """See `Plan`."""
        with self.lock:
            if self.random.random() >= self.share:
                return Fault.NONE
            return self.random.choice([fault for fault in Fault if fault is not Fault.NONE])
