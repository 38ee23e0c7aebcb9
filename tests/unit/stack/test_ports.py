"""Ports: the usual one, any other when it is taken, and a clear word about one that was asked for."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from cascade.errors import InputError
from cascade.stack.ports import CANDIDATES, GRPC_OFFSET, HOST, found, is_free, require_free


@pytest.fixture
def taken() -> Iterator[int]:
    """A port with a listener, and the one that it belongs to is free."""
    with socket.create_server((HOST, found(None, pair=True) + GRPC_OFFSET)) as listener:
        yield listener.getsockname()[1]


def test_a_taken_port_is_a_four_part_error(taken: int) -> None:
    with pytest.raises(InputError, match=f"port {taken}") as caught:
        require_free(taken, "--port")
    assert caught.value.exit_code == 2
    assert (caught.value.value, caught.value.where) == (str(taken), "--port")
    assert "another port" in caught.value.remedy


def test_a_taken_grpc_port_names_the_port_it_belongs_to(taken: int) -> None:
    asked = taken - GRPC_OFFSET
    with pytest.raises(InputError, match=f"port {taken} already, which belongs to {asked}"):
        require_free(asked, "--store-port", pair=True)
    if is_free(asked):
        assert require_free(asked, "--store-port") == asked


def test_the_usual_port_is_taken_if_it_is_free_and_wanted(taken: int) -> None:
    usual = found(None)
    assert found(usual) == usual
    for other in (found(taken), found(usual, [usual]), found(taken - GRPC_OFFSET, pair=True)):
        assert other in CANDIDATES
        assert other not in (taken, usual, taken - GRPC_OFFSET)
        assert is_free(other)


def test_a_port_whose_connections_are_closing_is_free() -> None:
    with socket.create_server((HOST, 0)) as listener:
        port = listener.getsockname()[1]
        with socket.create_connection((HOST, port)):
            accepted, _ = listener.accept()
            # Whoever closes first keeps the port in TIME_WAIT.
            accepted.close()
    assert is_free(port)
