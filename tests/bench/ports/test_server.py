"""Both servers, compiled and in Python, hold the same conversation."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bench import processes
from tests.bench.ports import server
from tests.bench.ports.server import Server
from tests.free_ports import free_port

ENDLESS = (1 << 60).to_bytes(8, "big")
HAS_COMPILER = any(map(shutil.which, server.COMPILERS))


@contextlib.contextmanager
def running(built: Server) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    port = free_port()
    process = processes.spawn(built.command(port), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"listening\n"
        yield port, process
    finally:
        processes.end(process)


@pytest.fixture(params=["C", "Python"])
def built(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    if request.param == "Python":
        monkeypatch.setattr(server, "COMPILERS", ())
    elif not HAS_COMPILER:
        pytest.skip("no C compiler")
    found = server.build(tmp_path)
    if request.param not in found.kind:
        pytest.skip("no static libc")
    return found


def connected(port: int, mode: bytes) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", port), 20.0)
    sock.sendall(mode)
    assert sock.recv(1) == mode
    return sock


def everything(sock: socket.socket) -> bytes:
    data = b""
    while more := sock.recv(1 << 20):
        data += more
    return data


def test_a_sink_counts_what_came(built: Server) -> None:
    with running(built) as (port, _), connected(port, b"S") as sock:
        sock.sendall(bytes(3_000_001))
        sock.shutdown(socket.SHUT_WR)
        assert everything(sock) == (3_000_001).to_bytes(8, "big")


def test_a_sink_of_nothing_counts_nothing(built: Server) -> None:
    with running(built) as (port, _), connected(port, b"S") as sock:
        sock.shutdown(socket.SHUT_WR)
        assert everything(sock) == bytes(8)


def test_what_comes_with_the_first_byte_counts_as_well(built: Server) -> None:
    with running(built) as (port, _), socket.create_connection(("127.0.0.1", port), 20.0) as sock:
        sock.sendall(b"Sxyz")
        sock.shutdown(socket.SHUT_WR)
        assert everything(sock) == b"S" + (3).to_bytes(8, "big")


def test_an_echo_says_it_again(built: Server) -> None:
    with running(built) as (port, _), connected(port, b"E") as sock:
        for word in (b".", b"hello", b"."):
            sock.sendall(word)
            assert sock.recv(100) == word
        sock.shutdown(socket.SHUT_WR)
        assert everything(sock) == b""


def test_a_generator_sends_what_it_was_asked_for(built: Server) -> None:
    with running(built) as (port, _), connected(port, b"G") as sock:
        number = (3_000_001).to_bytes(8, "big")
        sock.sendall(number[:3])
        sock.settimeout(0.1)
        with pytest.raises(TimeoutError):
            sock.recv(1)
        sock.settimeout(20.0)
        sock.sendall(number[3:])
        assert len(everything(sock)) == 3_000_001


def test_a_generator_ends_when_told(built: Server) -> None:
    with running(built) as (port, _), connected(port, b"G") as sock:
        sock.sendall(ENDLESS)
        taken = 0
        while taken < 5_000_000:
            taken += len(sock.recv(1 << 20))
        sock.shutdown(socket.SHUT_WR)
        everything(sock)


def test_one_connection_that_does_not_read_stops_no_other(built: Server) -> None:
    with running(built) as (port, _), connected(port, b"G") as stuck, connected(port, b"E") as echo:
        stuck.sendall(ENDLESS)
        for _ in range(20):
            echo.sendall(b".")
            assert echo.recv(1) == b"."


def test_a_client_that_vanishes_costs_only_itself(built: Server) -> None:
    with running(built) as (port, process):
        with connected(port, b"G") as sock:
            sock.sendall(ENDLESS)
            sock.recv(1)  # and leaves the rest unread: a reset
        with connected(port, b"E"):
            assert process.poll() is None


def test_an_unknown_wish_is_refused(built: Server) -> None:
    with running(built) as (port, _), connected(port, b"?") as sock:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            sock.sendall(b"what now")
            assert everything(sock) == b""


def test_the_server_ends_with_its_input(built: Server) -> None:
    with running(built) as (_, process):
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(20) == 0


def test_a_compiler_that_fails_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "COMPILERS", ("false",))
    found = server.build(tmp_path)
    assert found.kind == "Python"
    assert found.command(80, "/there") == ["python3", "/there", "80"]
