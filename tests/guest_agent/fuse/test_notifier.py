"""Notifications: the bookkeeping by itself, the writer process with pipes in the place of /dev/fuse (a full pipe
blocks as a locked page does), and the kernel's own caches."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import AsyncIterator, Callable, Hashable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import trio

from guest_agent.fuse import abi, notification_writer, notifier
from guest_agent.fuse.device import Connection
from guest_agent.fuse.mounting import MountSpec
from guest_agent.fuse.notification_writer import THREADS
from guest_agent.fuse.notifier import Notifier, NotifierFull, Notifiers

if TYPE_CHECKING:
    from tests.guest_agent.fuse.conftest import Place

PIPE_BYTES = 64 * 1024

# --- bookkeeping ---------------------------------------------------------------------------------------


class Recorded:
    """A notifier whose notifications go to a list."""

    def __init__(self) -> None:
        self.written: list[tuple[Hashable, bytes]] = []
        self.called: list[str] = []
        self.notifier = Notifier(lambda _, key, notification: self.written.append((key, notification)))

    def then(self, name: str) -> Callable[[], None]:
        return lambda: self.called.append(name)


def test_what_is_asked_for_is_written_at_once_and_answered_when_done() -> None:
    it = Recorded()
    it.notifier.invalidate_data(5, it.then("a"))
    it.notifier.invalidate_entry(1, b"name", it.then("b"))
    assert it.written == [(5, abi.inval_inode(5, 0, 0)), ((1, b"name"), abi.inval_entry(1, b"name"))]
    assert it.called == []
    it.notifier.done((1, b"name"))
    it.notifier.done(5)
    assert it.called == ["b", "a"]


def test_what_is_asked_for_meanwhile_is_done_once_more_and_only_once() -> None:
    it = Recorded()
    it.notifier.invalidate_data(5, it.then("first"))
    for name in ("second", "third", "fourth"):
        it.notifier.invalidate_data(5, it.then(name))
    assert len(it.written) == 1
    it.notifier.done(5)
    assert it.called == ["first"]
    assert len(it.written) == 2
    it.notifier.done(5)
    assert it.called == ["first", "second", "third", "fourth"]
    assert len(it.written) == 2


def test_what_waits_is_bounded_and_what_is_answered_does_not_count() -> None:
    it = Recorded()
    for _ in range(notifier.MAX_WAITING):
        it.notifier.invalidate_data(5, it.then("x"))
    with pytest.raises(NotifierFull):
        it.notifier.invalidate_data(6, it.then("y"))
    it.notifier.done(5)
    it.notifier.invalidate_data(6, it.then("y"))


def test_everybody_is_called_back_when_there_is_nobody_to_notify() -> None:
    it = Recorded()
    for node, name in ((5, "a"), (5, "b"), (6, "c")):
        it.notifier.invalidate_data(node, it.then(name))
    it.notifier.abandon()
    assert sorted(it.called) == ["a", "b", "c"]


def test_a_callback_that_raises_does_not_cost_the_next_its_turn(caplog: pytest.LogCaptureFixture) -> None:
    it = Recorded()
    it.notifier.invalidate_data(4, it.then("running"))

    def fail() -> None:
        raise RuntimeError("a bug")

    it.notifier.invalidate_data(4, fail)
    it.notifier.invalidate_data(4, it.then("last"))
    it.notifier.done(4)
    it.notifier.done(4)
    assert it.called == ["running", "last"]
    assert "a bug" in caplog.text


# --- the process ---------------------------------------------------------------------------------------


@asynccontextmanager
async def running() -> AsyncIterator[Notifiers]:
    async with trio.open_nursery() as nursery:
        notifiers = Notifiers()
        await nursery.start(notifiers.run)
        yield notifiers
        nursery.cancel_scope.cancel()


@contextmanager
def packets() -> Iterator[tuple[Connection, socket.socket]]:
    """A connection whose notifications can be received, each as it was written."""
    theirs, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(5)
    with ours, Connection(theirs.detach(), MountSpec(1, "/nowhere")) as connection:
        yield connection, ours


@contextmanager
def stuck() -> Iterator[tuple[Connection, int]]:
    """A connection on which notifications block until the pipe is read."""
    reading, writing = os.pipe()
    os.write(writing, bytes(PIPE_BYTES))
    connection = Connection(writing, MountSpec(2, "/stuck"))
    os.set_blocking(writing, True)
    try:
        with connection:
            yield connection, reading
    finally:
        os.close(reading)


def children() -> list[int]:
    text = "".join(path.read_text() for path in Path("/proc/self/task").glob("*/children"))
    return [
        int(pid)
        for pid in text.split()
        if b"notification_writer" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]


async def test_a_notification_is_written_elsewhere_and_answered_here() -> None:
    done = trio.Event()
    with packets() as (connection, kernel):
        async with running() as notifiers:
            own = notifiers.attach(connection)
            own.invalidate_data(9, done.set)
            with trio.fail_after(10):
                await done.wait()
            assert kernel.recv(100) == abi.inval_inode(9, 0, 0)
            notifiers.detach(own)


async def test_an_error_of_the_kernels_is_logged_and_answered(caplog: pytest.LogCaptureFixture) -> None:
    done = trio.Event()
    reading, writing = os.pipe()
    with Connection(reading, MountSpec(1, "/nowhere")) as connection:
        async with running() as notifiers:
            notifiers.attach(connection).invalidate_data(9, done.set)
            with trio.fail_after(10):
                await done.wait()
    os.close(writing)
    assert "Bad file descriptor" in caplog.text


async def test_a_notification_that_waits_holds_up_neither_others_nor_us() -> None:
    async with running() as notifiers:
        with stuck() as (slow, pipe), packets() as (quick, kernel):
            late, soon = trio.Event(), trio.Event()
            waiting = notifiers.attach(slow)
            for node in range(THREADS + 3):
                waiting.invalidate_data(node, late.set)
            other = notifiers.attach(quick)
            other.invalidate_data(1, soon.set)
            with trio.fail_after(10):
                await soon.wait()
            assert not late.is_set()
            assert kernel.recv(100) == abi.inval_inode(1, 0, 0)
            os.read(pipe, PIPE_BYTES)
            with trio.fail_after(10):
                await late.wait()


def test_names_that_wait_do_not_stand_before_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """They may wait for the lock of a directory that a LOOKUP holds, which waits for the data."""
    unlocked = threading.Event()

    def write(fd: int, notification: bytes) -> None:
        if notification[4] == abi.Notify.INVAL_ENTRY:
            unlocked.wait(20)

    system = SimpleNamespace(write=write, close=os.close, dup=os.dup)
    monkeypatch.setattr(notification_writer, "os", system)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(10)
    with theirs, ours:
        process = threading.Thread(target=notification_writer.run, args=(theirs,), daemon=True)
        process.start()
        with open(os.devnull) as device:
            open_ = notification_writer.HEAD.pack(notification_writer.OPEN, 1, 0)
            socket.send_fds(ours, [open_], [device.fileno()])
        names = [abi.inval_entry(1, b"%d" % number) for number in range(THREADS + 1)]
        for ticket, notification in enumerate([*names, abi.inval_inode(5, 0, 0)]):
            ours.send(notification_writer.HEAD.pack(notification_writer.WRITE, 1, ticket) + notification)
        try:
            assert notification_writer.RESULT.unpack(ours.recv(100)) == (len(names), 0)
        finally:
            unlocked.set()
        tickets = [notification_writer.RESULT.unpack(ours.recv(100))[0] for _ in names]
        assert sorted(tickets) == list(range(len(names)))
        ours.shutdown(socket.SHUT_WR)
        process.join(10)
        assert not process.is_alive()


async def test_more_at_once_than_the_socket_holds() -> None:
    left = 3000
    finished = trio.Event()

    def count() -> None:
        nonlocal left
        left -= 1
        if not left:
            finished.set()

    sink = os.open("/dev/null", os.O_WRONLY)
    with Connection(sink, MountSpec(1, "/nowhere")) as connection:
        async with running() as notifiers:
            own = notifiers.attach(connection)
            for node in range(left):
                own.invalidate_data(node, count)
            with trio.fail_after(30):
                await finished.wait()


async def test_a_writer_that_dies_is_replaced_and_does_what_was_left(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.CRITICAL)
    async with running() as notifiers:
        with stuck() as (slow, pipe), packets() as (quick, _):
            up, done = trio.Event(), trio.Event()
            notifiers.attach(quick).invalidate_data(1, up.set)
            with trio.fail_after(10):
                await up.wait()
            notifiers.attach(slow).invalidate_data(3, done.set)
            (first,) = children()
            os.kill(first, signal.SIGTERM)  # which it does not heed: it ends with its server
            await trio.sleep(0.05)
            assert children() == [first]
            os.kill(first, signal.SIGKILL)
            os.read(pipe, PIPE_BYTES)
            with trio.fail_after(10):
                await done.wait()
            assert children() != [first]
            assert os.read(pipe, 100).endswith(abi.inval_inode(3, 0, 0))


async def test_whoever_waits_is_called_when_a_connection_is_given_up() -> None:
    async with running() as notifiers:
        with stuck() as (slow, _):
            called: list[int] = []
            own = notifiers.attach(slow)
            own.invalidate_data(3, lambda: called.append(3))
            notifiers.detach(own)
            assert called == [3]


async def test_a_connection_given_up_is_closed_in_the_writer_too() -> None:
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    async with running() as notifiers:
        with Connection(writing, MountSpec(1, "/nowhere")) as connection:
            own = notifiers.attach(connection)
            done = trio.Event()
            own.invalidate_data(3, done.set)
            with trio.fail_after(10):
                await done.wait()
            assert os.read(reading, 100) == abi.inval_inode(3, 0, 0)
            notifiers.detach(own)
        with trio.fail_after(10):
            await trio.lowlevel.wait_readable(reading)
        assert os.read(reading, 100) == b""  # nobody has it any more
    os.close(reading)


async def test_the_process_ends_with_the_block() -> None:
    async with running():
        with trio.fail_after(10):
            while len(children()) != 1:  # one that has just begun has no command line for a moment
                await trio.sleep(0.01)
    assert children() == []


# --- the kernel ----------------------------------------------------------------------------------------

MAPPED = """
import mmap, sys
with open(sys.argv[1]) as file:
    page = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    print(page[:5].decode(), flush=True)
    input()
    print(page[:5].decode(), flush=True)
"""


def test_an_invalidation_drops_what_the_kernel_has_cached(place: Place) -> None:
    server = place.serve(f"1:{place.path}/m")
    hello = f"{place.path}/m/hello"
    assert place.shell(f"cat {hello}") == "hello\n"
    server.ask("set 1 2 HELLO", "set")
    assert place.shell(f"cat {hello}") == "hello\n"  # of the same size: the cache is believed
    server.ask("invalidate 1 2", "invalidated")
    assert place.shell(f"cat {hello}") == "HELLO\n"


def test_an_invalidation_reaches_a_mapped_page(place: Place) -> None:
    server = place.serve(f"1:{place.path}/m")
    mapped = place.popen(sys.executable, "-c", MAPPED, f"{place.path}/m/hello")
    assert mapped.stdout is not None
    assert mapped.stdout.readline() == "hello\n"
    server.ask("set 1 2 HELLO", "set")
    server.ask("invalidate 1 2", "invalidated")
    out, _ = mapped.communicate("\n", timeout=10)
    assert out == "HELLO\n"


def test_a_node_that_the_kernel_does_not_know_is_done_at_once(place: Place) -> None:
    server = place.serve(f"1:{place.path}/m")
    assert server.ask("invalidate 1 12345", "invalidated") == {"invalidated": 12345}


def test_an_invalidation_waits_for_the_pages_of_a_read_and_holds_up_nothing_else(place: Place) -> None:
    server = place.serve("--hold", f"1:{place.path}/m")
    reader = place.popen("cat", f"{place.path}/m/held")
    server.expect("held")
    server.order("invalidate 1 3")
    assert server.ask("invalidate 1 2", "invalidated") == {"invalidated": 2}
    server.order("release 1")
    assert server.expect("invalidated") == {"invalidated": 3}
    assert reader.communicate(timeout=10)[0] == "late\n"
