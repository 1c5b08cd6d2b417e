from __future__ import annotations

import errno
import logging
import os
import tty
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from guest_agent import transports
from guest_agent.transports import (
    BACKOFF_MOST,
    FULL_FIRST,
    OpenTransport,
    PortStream,
    open_port,
    run_agent,
    transport_of,
)


class Port:
    """A port without a driver: what each call does is scripted, and readiness to be read is always promised.

    Nobody may ask whether it can be written to: whoever reads would never hear of what that finds there to be read.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reads: list[bytes | OSError] = []
        self.written = bytearray()
        self.write_errors: list[OSError] = []
        self.calls = 0
        monkeypatch.setattr(transports.os, "read", self.read)
        monkeypatch.setattr(transports.os, "write", self.write)
        monkeypatch.setattr(trio.lowlevel, "wait_readable", self.ready)
        monkeypatch.setattr(trio.lowlevel, "wait_writable", lambda fd: pytest.fail("asked"))

    async def ready(self, fd: int) -> None:
        await trio.lowlevel.checkpoint()

    def read(self, fd: int, count: int) -> bytes:
        self.calls += 1
        result = self.reads.pop(0) if self.reads else b""
        if isinstance(result, OSError):
            raise result
        return result

    def write(self, fd: int, data: memoryview) -> int:
        self.calls += 1
        if self.write_errors:
            raise self.write_errors.pop(0)
        part = bytes(data[:3])
        self.written += part
        return len(part)


@pytest.fixture
async def stream() -> AsyncIterator[PortStream]:
    reading, writing = os.pipe()
    os.close(writing)
    async with PortStream(reading) as stream:
        yield stream


async def test_a_host_that_is_not_there_is_waited_for_without_spinning(
    stream: PortStream, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    port = Port(monkeypatch)
    with trio.move_on_after(60) as scope:
        await stream.receive_some()
    assert scope.cancelled_caught
    assert 60 / BACKOFF_MOST <= port.calls <= 60 / BACKOFF_MOST + 10
    port.reads = [b"", BlockingIOError(errno.EAGAIN, "again"), b"hello"]
    assert await stream.receive_some() == b"hello"


async def test_writing_while_disconnected_backs_off_and_then_writes_everything(
    stream: PortStream, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    port = Port(monkeypatch)
    port.write_errors = [BlockingIOError(errno.EAGAIN, "again") for _ in range(100)]
    started = trio.current_time()
    await stream.send_all(b"0123456789")
    assert trio.current_time() - started == pytest.approx(93 * BACKOFF_MOST, rel=0.05)
    assert port.written == b"0123456789"


async def test_a_host_that_takes_a_while_is_tried_again_soon(
    stream: PortStream, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    """At no time is the ring found full for longer than it has been full already."""
    port = Port(monkeypatch)
    for full in (1, 4):
        port.write_errors = [BlockingIOError(errno.EAGAIN, "again") for _ in range(full)]
        started = trio.current_time()
        assert not stream.send_nowait(b"x")
        await stream.send_all(b"012")
        assert trio.current_time() - started == pytest.approx((2 ** (full - 1) - 1) * FULL_FIRST)
    await stream.wait_send_all_might_not_block()
    assert port.written == b"012012"


async def test_a_port_that_is_gone_breaks_the_stream(
    stream: PortStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = Port(monkeypatch)
    port.reads = [OSError(errno.ENODEV, "gone")]
    with pytest.raises(trio.BrokenResourceError, match="gone"):
        await stream.receive_some()
    port.write_errors = [OSError(errno.ENODEV, "gone")]
    with pytest.raises(trio.BrokenResourceError, match="gone"):
        await stream.send_all(b"x")


async def test_a_terminal_stands_in_for_a_port(nursery: trio.Nursery) -> None:
    master, slave = os.openpty()
    os.set_blocking(master, False)
    tty.setraw(slave)
    async with PortStream(slave) as port, trio.lowlevel.FdStream(master) as host:
        payload = os.urandom(100_000)
        nursery.start_soon(port.send_all, payload)
        got = b""
        while len(got) < len(payload):
            got += await host.receive_some()
        assert got == payload
        await host.send_all(b"ping")
        assert await port.receive_some() == b"ping"


async def test_closing_wakes_a_reader_and_is_final() -> None:
    reading, writing = os.pipe()
    stream = PortStream(reading)
    async with trio.open_nursery() as nursery:

        async def read() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await stream.receive_some()

        nursery.start_soon(read)
        await wait_all_tasks_blocked()
        await stream.aclose()
    with pytest.raises(trio.ClosedResourceError):
        await stream.send_all(b"x")
    os.close(writing)


@pytest.mark.parametrize("number", [errno.EBUSY, errno.ENOENT])
async def test_a_port_that_is_busy_or_late_is_waited_for(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    path, attempts, real_open = tmp_path / "port", 0, os.open
    path.touch()

    def busy_open(name: Path, flags: int) -> int:
        nonlocal attempts
        attempts += 1
        if attempts < 5:
            raise OSError(number, "not yet")
        return real_open(name, flags)

    monkeypatch.setattr(transports.os, "open", busy_open)
    async with await open_port(path):
        assert attempts == 5


async def test_what_cannot_be_a_port_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        await open_port(tmp_path)


# --- the command line ------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [[], ["/dev/vport0p1"]])
async def test_a_port_is_what_is_named_or_the_usual_one(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def note(path: Path) -> Path:
        await trio.lowlevel.checkpoint()
        return path

    monkeypatch.setattr(transports, "open_port", note)
    open_transport = transport_of(arguments, Path("/dev/usual"))
    assert open_transport is not None
    assert await open_transport() == Path(arguments[0] if arguments else "/dev/usual")


async def test_a_socket_stands_in_for_a_port(tmp_path: Path) -> None:
    listening = trio.socket.socket(trio.socket.AF_UNIX)
    await listening.bind(str(tmp_path / "socket"))
    listening.listen(1)
    open_transport = transport_of(["--connect-unix", str(tmp_path / "socket")], Path("/dev/usual"))
    assert open_transport is not None
    async with trio.SocketListener(listening) as listener, await open_transport() as ours:
        async with await listener.accept() as theirs:
            await theirs.send_all(b"hello")
            assert await ours.receive_some() == b"hello"


@pytest.mark.parametrize("wrong", [["--connect-unix"], ["--help"], ["a", "b"]])
def test_what_makes_no_sense_is_answered_with_what_does(
    wrong: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    async def never(open_transport: OpenTransport) -> None:
        raise AssertionError("it was started")

    assert run_agent(wrong, "an.agent", Path("/dev/usual"), never) == 2
    said = capsys.readouterr().err
    assert "usage: python3 -m an.agent [PORT | --connect-unix PATH]" in said
    assert "(default: /dev/usual)" in said


@pytest.mark.parametrize(("word", "level"), [("", logging.INFO), ("debug", logging.DEBUG)])
def test_an_agent_is_run_with_its_transport_and_logs_what_it_was_asked_to(
    word: str, level: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    levels: list[int] = []
    monkeypatch.setenv("AGENTCTL_LOG", word)
    monkeypatch.setattr(logging, "basicConfig", lambda *, level, **_: levels.append(level))
    given: list[OpenTransport] = []

    async def run(open_transport: OpenTransport) -> None:
        await trio.lowlevel.checkpoint()
        given.append(open_transport)

    assert run_agent([], "an.agent", Path("/dev/usual"), run) == 0
    assert len(given) == 1
    assert levels == [level]
