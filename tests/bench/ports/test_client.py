from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.bench import processes
from tests.bench.ports import client
from tests.bench.ports.client import MeasureFailed, Moved, percentile
from tests.free_ports import free_port


@pytest.fixture
def port() -> Iterator[int]:
    """A real server's."""
    port = free_port()
    script = Path(client.__file__).with_name("fallback.py")
    process = processes.spawn(
        [sys.executable, str(script), str(port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"listening\n"
    yield port
    processes.end(process)


@contextlib.contextmanager
def wrong_server(converse: Callable[[socket.socket], None]) -> Iterator[int]:
    """Answers one connection as ``converse`` does."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            sock, _ = listener.accept()
            with sock:
                converse(sock)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            thread.join(20)


@pytest.mark.parametrize(
    ("values", "fraction", "found"),
    [
        ([5.0], 0.99, 5.0),
        ([3.0, 1.0, 2.0], 0.5, 2.0),
        ([4.0, 1.0, 3.0, 2.0], 0.5, 2.0),
        ([float(n) for n in range(1, 101)], 0.99, 99.0),
        ([float(n) for n in range(1, 201)], 0.99, 198.0),
    ],
)
def test_a_percentile_is_one_of_the_values(values: list[float], fraction: float, found: float) -> None:
    assert percentile(values, fraction) == found


def test_rates_are_in_millions_of_bytes() -> None:
    assert Moved(5_000_000, 2.0).rate == 2.5


@pytest.mark.parametrize("streams", [1, 8])
def test_pushing_counts_what_arrived(port: int, streams: int) -> None:
    moved = client.push(port, streams, 0.05, 10**12)
    assert moved.amount >= streams * client.CHUNK
    assert moved.seconds >= 0.05


@pytest.mark.parametrize("streams", [1, 8])
def test_pulling_takes_until_the_last_byte(port: int, streams: int) -> None:
    moved = client.pull(port, streams, 0.05, 10**12)
    assert moved.amount > 0
    assert moved.seconds >= 0.05


@pytest.mark.parametrize("move", [client.push, client.pull])
def test_no_more_is_moved_than_was_asked_for(
    port: int, move: Callable[[int, int, float, int], Moved]
) -> None:
    moved = move(port, 3, 20.0, 3_000_000)
    assert moved.amount == 3_000_000
    assert moved.seconds < 20.0


def test_each_exchange_has_its_time(port: int) -> None:
    times = client.round_trips(port, 20)
    assert len(times) == 20
    assert all(0 < seconds < 20 for seconds in times)


def test_each_connection_has_its_time(port: int) -> None:
    times = client.connects(port, 5)
    assert len(times) == 5
    assert all(0 < seconds < 20 for seconds in times)


def test_bytes_that_got_lost_are_an_error() -> None:
    def lose(sock: socket.socket) -> None:
        sock.sendall(sock.recv(1))
        while sock.recv(1 << 20):
            pass
        sock.sendall((7).to_bytes(8, "big"))

    with wrong_server(lose) as port, pytest.raises(MeasureFailed, match="bytes 7 arrived"):
        client.push(port, 1, 0.02, 10**6)


def test_a_connection_that_ends_early_is_an_error() -> None:
    def end(sock: socket.socket) -> None:
        sock.sendall(sock.recv(1))
        sock.recv(8)

    with wrong_server(end) as port, pytest.raises(MeasureFailed, match="ended after 0 of 1000000 bytes"):
        client.pull(port, 1, 5.0, 10**6)
    with wrong_server(end) as port, pytest.raises(MeasureFailed, match="closed"):
        client.round_trips(port, 2)


def test_a_reset_is_an_error() -> None:
    def reset(sock: socket.socket) -> None:
        sock.sendall(sock.recv(1))
        sock.recv(1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    with wrong_server(reset) as port, pytest.raises(MeasureFailed, match="failed"):
        client.pull(port, 1, 5.0, 10**6)


def test_somebody_else_behind_the_port_is_an_error() -> None:
    with wrong_server(lambda sock: sock.sendall(b"220 mail")) as port:
        with pytest.raises(MeasureFailed, match="something else"):
            client.round_trips(port, 1)


def test_who_says_nothing_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "PATIENCE", 0.05)
    over = threading.Event()

    def be_silent(sock: socket.socket) -> None:
        over.wait(20)

    with wrong_server(be_silent) as port:
        with pytest.raises(MeasureFailed, match="too long"):
            client.round_trips(port, 1)
        over.set()


def test_who_does_not_end_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "DRAIN", 0.05)
    over = threading.Event()

    def stay(sock: socket.socket) -> None:
        sock.sendall(sock.recv(1))
        over.wait(20)

    with wrong_server(stay) as port:
        with pytest.raises(MeasureFailed, match="too long"):
            client.pull(port, 1, 0.02, 10**6)
        over.set()


def test_nobody_behind_the_port_is_an_error() -> None:
    with pytest.raises(MeasureFailed, match="refused"):
        client.connects(free_port(), 1)
