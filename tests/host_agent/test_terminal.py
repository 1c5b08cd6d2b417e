"""A session with a made-up guest process; our own end is a process with pipes or a terminal of its own."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]

# Our end and the guest's in one process, with a link between them. The guest process does what argv[1] says.
PROGRAM = r"""
import sys
from contextlib import aclosing, suppress
import trio, trio.testing
from host_agent import groups, show, terminal
from host_agent.client import hello
from host_agent.errors import UserError
from protocol import execio
from protocol.api import Exec, WindowSize
from protocol.errors import ErrorCode, LinkError, OpenRefused
from protocol.link import Link, Role, Service

async def packets(stream):
    decoder = execio.Decoder()
    while data := await stream.receive_some():
        for packet in decoder.receive_data(data):
            yield packet

async def guest(target, incoming):
    what = target.argv[0]
    if what == "refuse":
        raise OpenRefused(ErrorCode.NOT_FOUND, "no such command: refuse", "look at PATH")
    stream = await incoming.accept()
    async def send(*packets):
        await stream.send_all(b"".join(map(execio.encode, packets)))
    if what == "both":
        await send(execio.Stdout(b"out1\n"), execio.Stderr(b"err\n"))
        await send(execio.Stdout(b"out2\n"), execio.Exit(7))
    elif what == "cat":
        async with aclosing(packets(stream)) as received:
            async for packet in received:
                if isinstance(packet, execio.StdinEof):
                    await send(execio.Exit(0))
                    break
                await send(execio.Stdout(packet.data))
    elif what == "big":
        for _ in range(64):
            await send(execio.Stdout(bytes(execio.MAX_DATA)))
        await send(execio.Exit(0))
    elif what == "news":
        await send(execio.Stdout(b"ready\n"))
        async with aclosing(packets(stream)) as received:
            async for packet in received:
                await send(execio.Stdout(f"{packet}\r\n".encode()))
                if packet in (execio.Stdin(b"q"), execio.Signal(15)):
                    await send(execio.Exit(128 + 15))
                    break
    elif what == "cut":
        await send(execio.Stdout(b"half"))
        await stream.reset(ErrorCode.GONE, "the guest rebooted")
        return
    elif what == "endless":
        pass
    elif what == "nonsense":
        await stream.send_all(b"\xff" * 100)
    elif what == "lost":
        await send(execio.Stdout(b"half"))
        await trio.sleep(0.1)  # the stream is open on the other side, too, by then
        guest_link.cut.cancel()
    elif what == "ignoring":
        await send(execio.Exit(3))
    await stream.send_eof()
    await trio.sleep(5)

class guest_link:
    cut = None

async def main():
    ours, theirs = trio.testing.memory_stream_pair()
    service = Service()
    service.on_stream(Exec, guest)
    tty = terminal.window_size() if sys.argv[2:] == ["tty"] else None
    async with trio.open_nursery() as nursery:
        async def other_side():
            with trio.CancelScope() as guest_link.cut:
                await Link(theirs, Role.SERVER, service, hello("guest")).run()
        nursery.start_soon(other_side)
        async def our_side(task_status):
            with suppress(LinkError):  # what the command line makes of it is not this module's
                await Link(ours, Role.CLIENT, Service(), hello("us")).run(task_status)
        link = await nursery.start(our_side)
        status = await terminal.run(link, Exec([sys.argv[1]], tty=tty))
        nursery.cancel_scope.cancel()
    return status

try:
    sys.exit(groups.run(main))
except UserError as error:
    show.error(error)
    sys.exit(error.exit_code)
"""


def run(what: str, given: bytes = b"", **options: object) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM, what],
        cwd=REPOSITORY,
        input=given,
        capture_output=True,
        timeout=20,
        check=False,
        **options,  # type: ignore[call-overload]
    )


def test_output_errors_and_the_exit_status_come_apart() -> None:
    done = run("both")
    assert (done.stdout, done.stderr, done.returncode) == (b"out1\nout2\n", b"err\n", 7)


def test_input_goes_in_and_ends() -> None:
    given = bytes(range(256)) * 1000
    done = run("cat", given)
    assert (done.stdout == given, done.stderr, done.returncode) == (True, b"", 0)


def test_input_may_be_a_file_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "input"
    path.write_bytes(b"from a file")
    for name, expected in ((str(path), b"from a file"), (os.devnull, b"")):
        with open(name, "rb") as file:
            done = subprocess.run(
                [sys.executable, "-c", PROGRAM, "cat"],
                cwd=REPOSITORY,
                stdin=file,
                capture_output=True,
                timeout=20,
            )
        assert (done.stdout, done.stderr, done.returncode) == (expected, b"", 0)


def test_a_process_that_ends_without_reading_its_input() -> None:
    done = run("ignoring", bytes(1 << 20))
    assert (done.stdout, done.stderr, done.returncode) == (b"", b"", 3)


def test_a_command_that_cannot_start_is_the_guests_word() -> None:
    done = run("refuse")
    assert (done.stderr, done.returncode) == (b"error: no such command: refuse\nhint: look at PATH\n", 8)


@pytest.mark.parametrize("what", ["cut", "endless", "lost"])
def test_a_lost_connection_is_a_sentence(what: str) -> None:
    done = run(what)
    assert (
        done.stderr
        == b"error: the connection to the guest was lost while the command ran\nhint: see: agentctl status\n"
    )
    assert done.returncode == 8


def test_nonsense_from_the_guest_is_a_sentence() -> None:
    done = run("nonsense")
    assert done.stderr.startswith(
        b"error: the guest agent answered nonsense: an exec packet of unknown kind 255\n"
    )
    assert done.returncode == 8


def test_a_reader_that_goes_away_ends_it_as_it_ends_any_filter() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "big"],
        cwd=REPOSITORY,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.read(10)
    process.stdout.close()
    try:
        assert process.wait(10) == 128 + signal.SIGPIPE
        assert process.stderr is not None
        assert process.stderr.read() == b""
    finally:
        process.kill()
        process.communicate()


def test_signals_are_passed_on_where_there_is_no_terminal() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "news"],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM):
            process.send_signal(number)
            assert process.stdout.readline() == f"Signal(number={int(number)})\r\n".encode()
        assert process.wait(10) == 128 + 15
    finally:
        process.kill()
        process.communicate()


# --- with a terminal -------------------------------------------------------------------------------


@dataclass
class Terminal:
    process: subprocess.Popen[bytes]
    keyboard: int
    screen: int

    def until(self, text: bytes) -> bytes:
        shown = b""
        deadline = time.monotonic() + 10
        while text not in shown:
            readable, _, _ = select.select([self.keyboard], [], [], max(0, deadline - time.monotonic()))
            assert readable, shown
            shown += os.read(self.keyboard, 4096)
        return shown

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.screen, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    @property
    def settings(self) -> list[object]:
        return list(termios.tcgetattr(self.screen))


@contextmanager
def terminal(what: str) -> Iterator[Terminal]:
    keyboard, screen = pty.openpty()

    def own_it() -> None:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    environment = {**os.environ, "COLUMNS": "1", "LINES": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, what, "tty"],
        cwd=REPOSITORY,
        stdin=screen,
        stdout=screen,
        stderr=screen,
        preexec_fn=own_it,
        env=environment,
    )
    try:
        yield Terminal(process, keyboard, screen)
    finally:
        process.kill()
        process.wait()
        os.close(keyboard)
        os.close(screen)


def test_a_terminal_is_raw_while_it_lasts_and_given_back() -> None:
    with terminal("news") as tty:
        before = tty.settings
        tty.until(b"ready")
        lflag = tty.settings[3]
        assert isinstance(lflag, int)
        assert not lflag & (termios.ICANON | termios.ECHO | termios.ISIG)
        os.write(tty.keyboard, b"\x03")  # ^C is a key like any other
        tty.until(rb"Stdin(data=b'\x03')")
        tty.resize(50, 132)
        tty.until(b"Resize(rows=50, columns=132)")
        os.write(tty.keyboard, b"q")
        assert tty.process.wait(10) == 128 + 15
        assert tty.settings == before


@pytest.mark.parametrize("what", ["cut", "lost", "nonsense", "refuse"])
def test_a_terminal_is_given_back_when_the_connection_is_lost(what: str) -> None:
    with terminal(what) as tty:
        before = tty.settings
        assert tty.process.wait(10) == 8
        assert tty.settings == before
        # Lines end as usual again when the sentence comes.
        assert b"\r\n" in tty.until(b"hint:")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_terminal_is_given_back_when_we_are_killed(number: signal.Signals) -> None:
    with terminal("news") as tty:
        before = tty.settings
        tty.until(b"ready")
        tty.process.send_signal(number)
        assert tty.process.wait(10) == 128 + number
        assert tty.settings == before
