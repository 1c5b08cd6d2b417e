"""The delay line, and the sshd, that other tests rely on."""

from __future__ import annotations

import fcntl
import socket
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.delay_line import DelayLine
from tests.remote.sshd import Client, Sshd, account, program

PATIENCE = 30.0


@pytest.fixture
def echo() -> Iterator[str]:
    """The address of somebody who says everything back."""

    def serve(peer: socket.socket) -> None:
        with peer:
            while data := peer.recv(65536):
                peer.sendall(data)

    def accept(listener: socket.socket) -> None:
        while True:
            try:
                peer, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(peer,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, args=(listener,), daemon=True).start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)


def connect(line: DelayLine) -> socket.socket:
    return socket.create_connection(("127.0.0.1", line.port), timeout=PATIENCE)


def ask(peer: socket.socket, question: bytes) -> float:
    """Seconds until it came back."""
    started = time.monotonic()
    peer.sendall(question)
    received = b""
    while len(received) < len(question):
        received += peer.recv(65536)
    assert received == question
    return time.monotonic() - started


def test_a_rate_is_for_all_connections_of_a_direction(echo: str) -> None:
    with DelayLine(echo, 0.0, rate=1e6) as line, connect(line) as one, connect(line) as other:
        started = time.monotonic()
        talks = [threading.Thread(target=ask, args=(peer, bytes(250_000))) for peer in (one, other)]
        for talk in talks:
            talk.start()
        for talk in talks:
            talk.join()
        # Less what the last piece had still to go when it came.
        assert time.monotonic() - started >= 0.5


def test_what_waits_for_its_turn_is_bounded(echo: str) -> None:
    with DelayLine(echo, 0.0, rate=1000) as line, connect(line) as peer:
        peer.setblocking(False)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        sent = 0
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            try:
                sent += peer.send(bytes(65536))
            except BlockingIOError:
                break
        assert sent < 8 << 20


def test_each_byte_is_late_both_ways(echo: str) -> None:
    with DelayLine(echo, 0.5) as line, connect(line) as peer:
        assert ask(peer, b"?") >= 1.0
        line.set_delay(0.0)
        assert min(ask(peer, b"?") for _ in range(20)) < 1.0


def test_a_delay_is_no_limit_of_what_is_under_way(echo: str) -> None:
    """More than the kernel's buffers hold is sent before anything has arrived."""
    with DelayLine(echo) as line, connect(line) as peer:
        ask(peer, b"there?")
        line.set_delay(1000.0)
        for _ in range(64):
            peer.sendall(bytes(1024 * 1024))
        peer.settimeout(0.2)
        with pytest.raises(TimeoutError):
            peer.recv(1)


def test_what_follows_is_not_held_by_what_is_before_it(echo: str) -> None:
    """Fifty messages, each after the one before was taken: they take one delay, and not fifty."""
    with DelayLine(echo, 0.5) as line, connect(line) as peer:
        for _ in range(50):
            peer.sendall(b"x" * 1000)
            time.sleep(0.005)
        started, left = time.monotonic(), 50_000
        while left:
            left -= len(peer.recv(left))
        assert time.monotonic() - started < 25


def test_the_end_of_one_side_reaches_the_other_behind_what_it_has_sent(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        with DelayLine(path, 0.05) as line, connect(line) as near, listener.accept()[0] as far:
            near.sendall(b"last")
            near.shutdown(socket.SHUT_WR)
            far.settimeout(PATIENCE)
            received = b""
            while data := far.recv(100):
                received += data
            assert received == b"last"
            far.sendall(b"answer")
            assert near.recv(100) == b"answer"


def test_what_was_under_way_when_it_was_cut_arrives_when_it_is_restored(echo: str) -> None:
    with DelayLine(echo) as line, connect(line) as peer:
        ask(peer, b"there?")
        line.cut()
        peer.sendall(b"still there?")
        peer.settimeout(0.2)
        with pytest.raises(TimeoutError):
            peer.recv(1)
        peer.settimeout(PATIENCE)
        line.restore()
        assert peer.recv(100) == b"still there?"


def unacknowledged(peer: socket.socket) -> int:
    """Bytes of which its kernel has not heard that they arrived: SIOCOUTQ, tcp(7)."""
    answer = fcntl.ioctl(peer, termios.TIOCOUTQ, bytes(4))
    return int.from_bytes(answer, sys.byteorder)


def test_a_line_that_vanishes_acknowledges_nothing_until_it_is_restored(echo: str) -> None:
    with DelayLine(echo) as line, connect(line) as peer:
        ask(peer, b"there?")
        line.vanish()
        peer.sendall(b"still there?")
        with pytest.raises(TimeoutError):
            socket.create_connection(("127.0.0.1", line.port), timeout=0.5)
        assert unacknowledged(peer) == len(b"still there?")
        line.restore()
        assert peer.recv(100) == b"still there?"
        with connect(line) as another:
            ask(another, b"there?")


def test_what_is_forgotten_is_silent_for_ever_and_what_comes_anew_is_carried(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        with DelayLine(path) as line, connect(line) as peer:
            with listener.accept()[0] as accepted:
                accepted.sendall(b"here")
                assert peer.recv(100) == b"here"
                line.forget()
                accepted.settimeout(PATIENCE)
                assert accepted.recv(100) == b""
            peer.sendall(b"still there?")
            peer.settimeout(0.5)
            with pytest.raises(TimeoutError):
                peer.recv(100)
            assert unacknowledged(peer) > 0
            with connect(line) as another, listener.accept()[0] as accepted:
                accepted.sendall(b"here")
                assert another.recv(100) == b"here"


def test_a_reset_line_ends_connections_and_takes_new_ones(echo: str) -> None:
    with DelayLine(echo) as line, connect(line) as peer:
        ask(peer, b"there?")
        line.reset()
        with pytest.raises(ConnectionResetError):
            peer.recv(1)
        with connect(line) as another:
            ask(another, b"there?")


def test_a_refusing_line_does_so_until_it_is_restored(echo: str) -> None:
    with DelayLine(echo) as line:
        line.refuse()
        with pytest.raises(ConnectionRefusedError):
            connect(line)
        line.restore()
        with connect(line) as peer:
            ask(peer, b"there?")


def test_the_far_end_may_be_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        with DelayLine(path) as line, connect(line) as peer:
            with listener.accept()[0] as accepted:
                accepted.sendall(b"here")
            assert peer.recv(100) == b"here"
            assert peer.recv(100) == b""


def test_a_session_with_the_sshd(tmp_path: Path) -> None:
    client = Client.make(tmp_path / "home")
    home = tmp_path / "there"
    with Sshd(environment={"HOME": str(home)}) as sshd:
        client.may_enter(sshd)
        with DelayLine(f"{sshd.address}:{sshd.port}") as line:
            client.trust(sshd, line.port)
            for port in (sshd.port, line.port):
                argv = [
                    program("ssh"),
                    *client.options(),
                    "-p",
                    str(port),
                    f"{account()}@{sshd.address}",
                    "echo $HOME",
                ]
                done = subprocess.run(
                    argv, capture_output=True, stdin=subprocess.DEVNULL, timeout=60, check=False
                )
                assert (done.returncode, done.stdout.decode().strip()) == (0, str(home)), done.stderr
