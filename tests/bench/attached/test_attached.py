from __future__ import annotations

import importlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from tests.bench.attached import delay, report
from tests.bench.attached.report import Attached, Line
from tests.bench.files.report import Report, Sample, complete
from tests.free_ports import free_port

# Importing a module of this name by statement would be taken for the program itself.
bench = importlib.import_module("tests.bench.attached.__main__")


def test_by_default_three_lines_are_compared() -> None:
    chosen = bench.parse([])
    assert chosen.lines == [0.0, 0.02, 0.1]
    assert chosen.names == ["agentctl", "sshfs"]
    assert chosen.workloads == bench.WORKLOADS


@pytest.mark.parametrize(
    "arguments",
    [
        ["--round-trips", "x"],
        ["--round-trips", "-1"],
        ["--peers", "nfs"],
        ["--rounds", "0"],
        ["--only", "nothing", "--edits", "0"],
    ],
)
def test_what_makes_no_sense_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        bench.parse(arguments)
    assert caught.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_a_report_is_what_was_written() -> None:
    one = complete(
        Report(
            command=[],
            started="",
            seconds=1.0,
            rounds=1,
            peers=["agentctl", "sshfs"],
            workloads=["grep cold"],
            environment={},
            sizes={},
            procedure="",
            unavailable={},
            complete=True,
            samples=[Sample(1, "grep cold", "agentctl", 1.0), Sample(1, "grep cold", "sshfs", 4.0)],
        )
    )
    found = Attached([Line(0.02, one)])
    assert report.load(report.dump(found)) == found
    assert "20 ms" in report.tables(found.lines)
    assert "0.250x" in report.tables(found.lines)


@contextmanager
def line(seconds: float) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of a connection through one."""
    listen, target = free_port(), free_port()
    with socket.create_server(("127.0.0.1", target)) as listener:
        script = str(Path(delay.__file__))
        process = subprocess.Popen([sys.executable, script, str(listen), str(target), str(seconds)])
        try:
            near = connected(listen)
            listener.settimeout(20)
            far, _ = listener.accept()
            with closing(near), closing(far):
                near.settimeout(20)
                far.settimeout(20)
                yield near, far
        finally:
            process.kill()
            process.wait(20)


def connected(port: int) -> socket.socket:
    deadline = time.monotonic() + 20
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), 20)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def test_a_line_holds_what_passes_in_both_directions_and_keeps_its_order() -> None:
    with line(0.1) as (near, far):
        for source, target in ((near, far), (far, near)):
            started = time.monotonic()
            source.sendall(b"first ")
            source.sendall(b"second")
            received = b""
            while len(received) < 12:
                received += target.recv(100)
            assert received == b"first second"
            assert time.monotonic() - started >= 0.1


def test_what_follows_is_not_held_by_what_is_before_it() -> None:
    """Fifty messages, each after the one before was taken: they take one delay, and not fifty."""
    with line(1.0) as (near, far):
        started = time.monotonic()
        for _ in range(50):
            near.sendall(b"x" * 1000)
            time.sleep(0.005)
        left = 50_000
        while left:
            left -= len(far.recv(left))
        assert 1.0 <= time.monotonic() - started < 20


def test_the_end_of_one_side_reaches_the_other_behind_what_it_has_sent() -> None:
    with line(0.05) as (near, far):
        near.sendall(b"last")
        near.shutdown(socket.SHUT_WR)
        received = b""
        while data := far.recv(100):
            received += data
        assert received == b"last"
        far.sendall(b"answer")
        assert near.recv(100) == b"answer"
