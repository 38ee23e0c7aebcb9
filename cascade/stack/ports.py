"""Ports of the loopback interface: the usual one if it is free, any other if not."""

from __future__ import annotations

import random
import socket
from collections.abc import Container, Iterator
from itertools import chain

from cascade.errors import InputError

HOST = "127.0.0.1"
# SeaweedFS derives every gRPC port from its HTTP port; below 32768 no outgoing connection takes one.
GRPC_OFFSET = 10_000
CANDIDATES = range(12_000, 22_000)


def is_free(port: int) -> bool:
    """Whether nobody listens on the port at this moment."""
    with socket.socket() as probe:
        # A port whose last connections are still closing can be listened on.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def is_free_pair(port: int) -> bool:
    """Whether the port and the gRPC port that SeaweedFS derives from it are free."""
    return is_free(port) and is_free(port + GRPC_OFFSET)


def require_free(port: int, option: str, *, pair: bool = False) -> int:
    """The port; InputError if somebody listens on it, or with `pair` on its gRPC port."""
    for number in (port, port + GRPC_OFFSET) if pair else (port,):
        if not is_free(number):
            derived = f", which belongs to {port}" if number != port else ""
            raise InputError(
                f"somebody listens on port {number} already{derived}",
                value=port,
                where=option,
                remedy="give another port, or leave the option out: a free one is found",
            )
    return port


def found(usual: int | None, taken: Container[int] = (), *, pair: bool = False) -> int:
    """The usual port, or else any free one, but none of `taken`; with `pair` its gRPC port is free too."""
    free = is_free_pair if pair else is_free
    candidates = shuffled() if usual is None else chain([usual], shuffled())
    return next(port for port in candidates if port not in taken and free(port))


def shuffled() -> Iterator[int]:
    """Ports to try, in another order every time: two that look at the same time choose differently."""
    # Not the global generator: tests that seed it would all choose the same ports.
    yield from random.SystemRandom().sample(CANDIDATES, len(CANDIDATES))


def own_origins(port: int) -> str:
    """What a browser calls the pages of a port: no others may ask it, whatever a person has open beside."""
    return f"http://{HOST}:{port},http://localhost:{port}"
