"""A connection: what it says by itself, and what the kernel makes of it."""

from __future__ import annotations

import errno
import os
import queue
import signal
import socket
import struct
import subprocess
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from guest_agent.fdstore import StoredConnection
from guest_agent.fuse.abi import Init, Negotiated, Opcode, Request
from guest_agent.fuse.device import BATCH, LOOK_AGAIN, Connection, Handle
from guest_agent.fuse.landing import Landing
from guest_agent.fuse.mounting import MountSpec

if TYPE_CHECKING:
    from tests.guest_agent.fuse.conftest import Manager, Place

KIB = 1024


# --- without a kernel: a socket that keeps the borders of messages -------------------------------------


@contextmanager
def connected(negotiated: Negotiated | None = None) -> Iterator[tuple[Connection, socket.socket]]:
    theirs, kernel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    kernel.settimeout(5)
    with kernel, Connection(theirs.detach(), MountSpec(1, "/nowhere"), negotiated) as connection:
        yield connection, kernel


def request(opcode: int, unique: int, body: bytes = b"") -> bytes:
    return struct.pack("<IIQQIIIHH", 40 + len(body), opcode, unique, 1, 0, 0, 0, 0, 0) + body


async def serve_one(connection: Connection, kernel: socket.socket, message: bytes, handle: Handle) -> bytes:
    """The answer to ``message``."""
    kernel.send(message)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(connection.serve, handle)
        with trio.fail_after(5):
            await trio.lowlevel.wait_readable(kernel)
        nursery.cancel_scope.cancel()
    return kernel.recv(1000)


class Looks(Landing):
    """Counts how often somebody looks for a request, and how many there were."""

    def __init__(self) -> None:
        super().__init__()
        self.looks = self.found = 0

    def read(self, descriptor: int) -> Request:
        self.looks += 1
        request = super().read(descriptor)
        self.found += 1
        return request


async def test_who_asks_one_thing_after_another_costs_hardly_a_vain_look() -> None:
    looks, asked = Looks(), 10 * LOOK_AGAIN
    with connected() as (connection, kernel):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.serve, lambda request: connection.reply(request.unique), looks)
            with trio.fail_after(5):
                for unique in range(asked):
                    kernel.send(request(Opcode.GETATTR, unique))
                    await trio.lowlevel.wait_readable(kernel)
                    assert struct.unpack("<IiQ", kernel.recv(100)) == (16, 0, unique)
            nursery.cancel_scope.cancel()
    assert looks.found == asked
    assert looks.looks - looks.found <= asked / LOOK_AGAIN + 1


class Waiting(Landing):
    """Requests that wait to be read."""

    def __init__(self) -> None:
        super().__init__()
        self.uniques: deque[int] = deque()

    def read(self, descriptor: int) -> Request:
        if not self.uniques:
            raise BlockingIOError
        return Request(Opcode.GETATTR, self.uniques.popleft(), 1, 0, 0, 0, memoryview(b""))


def test_many_requests_are_soon_answered_in_a_row() -> None:
    waiting, answered, batches = Waiting(), list[int](), 0
    with connected() as (connection, _):

        def take_batch() -> None:
            assert connection._take_batch(waiting, lambda request: answered.append(request.unique))

        for unique in range(LOOK_AGAIN // 2):  # one at a time, so that nobody looks for a second one
            waiting.uniques.append(unique)
            take_batch()
        waiting.uniques.extend(range(LOOK_AGAIN // 2, 4 * BATCH))
        while waiting.uniques:
            take_batch()
            batches += 1
    assert answered == list(range(4 * BATCH))
    assert batches <= LOOK_AGAIN + 4


def test_a_reply_is_a_header_and_its_parts() -> None:
    with connected() as (connection, kernel):
        connection.reply(6)
        assert kernel.recv(100) == struct.pack("<IiQ", 16, 0, 6)
        connection.reply(6, b"ab", memoryview(b"cde"), bytearray(b"f"))
        assert kernel.recv(100) == struct.pack("<IiQ", 22, 0, 6) + b"abcdef"


@pytest.mark.parametrize(
    ("given", "sent"), [(errno.ENOENT, errno.ENOENT), (0, errno.EIO), (512, errno.EIO), (-2, errno.EIO)]
)
def test_an_errno_that_the_kernel_would_refuse_is_an_eio(given: int, sent: int) -> None:
    with connected() as (connection, kernel):
        connection.fail(6, given)
        assert kernel.recv(100) == struct.pack("<IiQ", 16, -sent, 6)


async def test_what_was_resent_is_answered_as_resent_once() -> None:
    with connected() as (connection, kernel):
        seen: list[tuple[int, bool]] = []

        def handle(message: Request) -> None:
            seen.append((message.unique, message.resent))
            connection.reply(message.unique)

        answer = await serve_one(connection, kernel, request(Opcode.GETATTR, 1 << 63 | 8), handle)
        assert answer == struct.pack("<IiQ", 16, 0, 1 << 63 | 8)
        answer = await serve_one(connection, kernel, request(Opcode.GETATTR, 8), handle)
        assert answer == struct.pack("<IiQ", 16, 0, 8)
        assert seen == [(8, True), (8, False)]


async def test_a_kernel_of_another_protocol_is_told_so() -> None:
    with connected() as (connection, kernel):
        hello = request(Opcode.INIT, 2, struct.pack("<IIII48x", 7, 30, 131072, 0))
        answer = await serve_one(connection, kernel, hello, lambda _: None)
        assert answer == struct.pack("<IiQ", 16, -errno.EPROTO, 2)
        assert not connection.initialized.is_set()


async def test_destroy_is_answered_and_not_passed_on() -> None:
    with connected() as (connection, kernel):
        answer = await serve_one(connection, kernel, request(Opcode.DESTROY, 4), pytest.fail)
        assert answer == struct.pack("<IiQ", 16, 0, 4)


async def test_a_handler_that_raises_over_a_forget_answers_nothing() -> None:
    def handle(message: Request) -> None:
        if message.opcode == Opcode.FORGET:
            raise RuntimeError("a bug")
        connection.reply(message.unique)

    with connected() as (connection, kernel):
        kernel.send(request(Opcode.FORGET, 4, bytes(8)))
        answer = await serve_one(connection, kernel, request(Opcode.GETATTR, 6), handle)
        assert answer == struct.pack("<IiQ", 16, 0, 6)


def test_what_a_successor_must_know_is_in_the_stored_name() -> None:
    with connected(Negotiated(41, 5)) as (connection, _):
        assert connection.initialized.is_set()
        assert connection.stored_as() == StoredConnection(1, 0, 41, 5)
    with connected() as (connection, _):
        assert connection.stored_as() == StoredConnection(1, 0)


def test_a_connection_that_was_closed_takes_answers_and_forgets_them(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with connected() as (connection, _):
        connection.close()
        connection.reply(2)
        connection.close()
    assert caplog.text == ""


async def test_closing_ends_the_loop() -> None:
    with connected() as (connection, _), trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.serve, lambda _: None)
            await trio.testing.wait_all_tasks_blocked()
            connection.close()


# --- with the kernel: a file system in memory, served by one process, used by others -------------------


def test_files_can_be_read_written_and_listed(place: Place) -> None:
    server = place.serve(f"1:{place.path}/m")
    assert place.shell(f"cd {place.path}/m && ls && cat hello") == "big\nbroken\nheld\nhello\nhello\n"
    place.shell(f"cd {place.path}/m && mkdir d && echo text > d/new && echo more >> d/new && rm hello")
    assert place.shell(f"cat {place.path}/m/d/new") == "text\nmore\n"
    with pytest.raises(subprocess.CalledProcessError):
        place.shell(f"cat {place.path}/m/hello 2>/dev/null")
    assert server.ask("state 1", "counts")["counts"]["MKDIR"] == 1


def test_init_takes_what_is_wanted_and_the_kernel_has(place: Place) -> None:
    server = place.serve(f"1:{place.path}/m", f"2:{place.path}/n:locks")
    minor, flags = server.ask("state 1", "counts")["negotiated"]
    assert minor >= 31
    for wanted in (
        *(Init.PARALLEL_DIROPS, Init.DO_READDIRPLUS, Init.CACHE_SYMLINKS, Init.MAX_PAGES),
        *(Init.NO_OPEN_SUPPORT, Init.NO_OPENDIR_SUPPORT, Init.HANDLE_KILLPRIV_V2),
    ):
        assert wanted in Init(flags)
    for harmful in (
        Init.WRITEBACK_CACHE,  # ignores a size that has changed on the host
        Init.AUTO_INVAL_DATA,  # each write of the guest's own drops what it has
        Init.EXPLICIT_INVAL_DATA,  # a file that shrank on the host keeps its pages
        Init.ATOMIC_O_TRUNC,  # without OPEN the truncation is lost
        *(Init.POSIX_LOCKS, Init.FLOCK_LOCKS),  # a message for each lock
    ):
        assert harmful not in Init(flags)
    _, flags = server.ask("state 2", "counts")["negotiated"]
    assert Init.POSIX_LOCKS | Init.FLOCK_LOCKS in Init(flags)


def test_locks_are_the_kernels_unless_they_are_to_reach_the_host(place: Place) -> None:
    place.serve(f"1:{place.path}/m", f"2:{place.path}/n:locks")
    code = (
        "import fcntl, sys\n"
        "try: fcntl.lockf(open(sys.argv[1], 'r+'), fcntl.LOCK_EX | fcntl.LOCK_NB); print('mine')\n"
        "except BlockingIOError: print('taken')"
    )
    assert place.python(code, f"{place.path}/m/hello") == "mine\n"
    assert place.python(code, f"{place.path}/n/hello") == "taken\n"


def test_data_moves_in_large_pieces_and_arrives_whole(place: Place) -> None:
    server = place.serve(f"1:{place.path}/m")
    code = (
        "import os, sys\n"
        "data = os.urandom(5_000_001)\n"
        "fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)\n"
        "assert os.write(fd, data) == len(data)\n"
        "assert os.pread(fd, len(data) + 1, 0) == data\n"
        "os.close(fd)\n"
        "fd = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT)\n"
        "import mmap; buffer = mmap.mmap(-1, 5 << 20)\n"
        "assert os.preadv(fd, [buffer], 0) == len(data) and buffer[:len(data)] == data\n"
    )
    place.python(code, f"{place.path}/m/new")
    largest = server.ask("state 1", "counts")["largest"]
    assert largest["WRITE"] == KIB * KIB
    assert largest["READ"] == KIB * KIB


def test_open_costs_no_message_and_keeps_the_cache(place: Place) -> None:
    server = place.serve(f"1:{place.path}/m")
    for _ in range(3):
        assert place.shell(f"cat {place.path}/m/hello") == "hello\n"
    counts = server.ask("state 1", "counts")["counts"]
    assert counts["OPEN"] == 1  # answered ENOSYS, and never asked again
    assert counts["READ"] == 1
    assert counts.get("RELEASE", 0) == 0


def test_many_processes_at_once(place: Place) -> None:
    place.serve(f"1:{place.path}/m")
    script = (
        "for i in $(seq 60); do echo $0.$i > $1/$0.$i; cat $1/hello $1/$0.$i > /dev/null; rm $1/$0.$i; done"
    )
    running = [place.popen("sh", "-euc", script, str(n), f"{place.path}/m") for n in range(6)]
    for process in running:
        place.result(process, timeout=60)
    assert place.shell(f"ls {place.path}/m") == "big\nbroken\nheld\nhello\n"


def test_a_request_that_is_not_answered_holds_up_no_other(place: Place) -> None:
    server = place.serve("--hold", f"1:{place.path}/m")
    waiting = place.popen("cat", f"{place.path}/m/held")
    server.expect("held")
    assert place.shell(f"cat {place.path}/m/hello") == "hello\n"
    assert waiting.poll() is None
    server.order("release 1")
    assert place.result(waiting) == "late\n"


def test_a_handler_that_raises_is_an_eio_and_no_more(place: Place) -> None:
    place.serve(f"1:{place.path}/m")
    code = "import sys\ntry: open(sys.argv[1]).read()\nexcept OSError as error: print(error.errno)"
    assert place.python(code, f"{place.path}/m/broken") == f"{errno.EIO}\n"
    assert place.shell(f"cat {place.path}/m/hello") == "hello\n"


def test_an_interrupt_reaches_the_handler(place: Place) -> None:
    server = place.serve("--hold", f"1:{place.path}/m")
    waiting = place.popen("mkdir", f"{place.path}/m/held.dir")
    server.expect("held")
    waiting.send_signal(signal.SIGINT)
    assert server.expect("interrupted")["interrupted"] % 2 == 0
    server.order("release 1")
    waiting.wait(10)


def test_the_loop_ends_when_the_mount_does(place: Place) -> None:
    server = place.serve(f"1:{place.path}/m")
    server.order("unmount 1")
    assert server.expect("ended") == {"ended": 1}
    assert place.mounts() == []


def test_a_lazily_unmounted_share_serves_who_still_uses_it(place: Place) -> None:
    server = place.serve(f"1:{place.path}/m")
    user = place.popen("sh", "-c", f"cd {place.path}/m && echo in && read go && cat hello")
    assert user.stdout is not None
    assert user.stdout.readline() == "in\n"
    server.order("unmount 1")
    out, _ = user.communicate("go\n", timeout=10)
    assert out == "hello\n"
    assert server.expect("ended") == {"ended": 1}


def test_abort_frees_whoever_waits(place: Place) -> None:
    server = place.serve("--hold", f"1:{place.path}/m")
    waiting = place.popen("cat", f"{place.path}/m/held")
    server.expect("held")
    server.order("abort 1")
    assert waiting.wait(10) != 0
    assert server.expect("ended") == {"ended": 1}
    assert server.ask("leaks", "devices")["devices"] == 0


def test_nothing_is_left_of_connections_that_ended(place: Place) -> None:
    server = place.serve(f"1:{place.path}/m")
    before = None
    for _ in range(8):
        server.order("unmount 1")
        server.expect("ended")
        leaks = server.ask("leaks", "fds")
        assert leaks["devices"] == 0
        before = before or leaks
        assert leaks["fds"] == before["fds"]
        assert leaks["threads"] <= before["threads"] + 1  # trio keeps idle workers
        server.order(f"mount 1 {place.path}/m")
        server.expect("mounted")
    assert place.shell(f"cat {place.path}/m/hello") == "hello\n"


def stored(manager: Manager) -> tuple[str, int]:
    state, (fd,) = manager.receive()
    first, name = state.split("\n")
    assert first == "FDSTORE=1"
    return name.removeprefix("FDNAME="), fd


def test_a_mount_outlives_its_killed_server_and_a_successor_goes_on(place: Place, manager: Manager) -> None:
    server = place.serve("--hold", f"1:{place.path}/m", NOTIFY_SOCKET=str(manager.path))
    name, fd = stored(manager)
    reader = place.popen("cat", f"{place.path}/m/held")
    server.expect("held")
    maker = place.popen("mkdir", f"{place.path}/m/held.dir")
    server.expect("held")
    server.kill()
    newcomer = place.popen("cat", f"{place.path}/m/hello")  # asked while nobody is there
    try:
        successor = place.adopt(fd, name)
    finally:
        os.close(fd)
    assert place.result(newcomer) == "hello\n"
    state = successor.ask("state 1", "counts")
    if Init.HAS_RESEND not in Init(state["negotiated"][1]):
        return  # before Linux 6.9 the two wait until the teardown aborts the mount
    assert place.result(reader) == "late\n"
    place.result(maker)
    assert sorted(successor.ask("state 1", "counts")["resent"]) == ["MKDIR", "READ"]
    assert place.shell(f"ls {place.path}/m") == "big\nbroken\nheld\nheld.dir\nhello\n"


def test_a_killed_server_whose_descriptor_nobody_keeps_is_the_end_of_its_mount(place: Place) -> None:
    server = place.serve("--hold", f"1:{place.path}/m")
    waiting = place.popen("cat", f"{place.path}/m/held")
    server.expect("held")
    server.kill()
    assert waiting.wait(10) != 0
    code = "import os, sys\ntry: os.listdir(sys.argv[1])\nexcept OSError as error: print(error.errno)"
    assert place.python(code, f"{place.path}/m") == f"{errno.ENOTCONN}\n"


def test_a_server_dies_at_once_even_while_an_invalidation_waits_for_a_page(
    place: Place, manager: Manager
) -> None:
    server = place.serve("--hold", f"1:{place.path}/m", NOTIFY_SOCKET=str(manager.path))
    name, fd = stored(manager)
    reader = place.popen("cat", f"{place.path}/m/held")
    server.expect("held")
    server.order("invalidate 1 3")
    with pytest.raises(queue.Empty):
        server.expect("invalidated", timeout=0.5)
    server.process.kill()
    server.process.wait(5)
    try:
        successor = place.adopt(fd, name)
    finally:
        os.close(fd)
    if Init.HAS_RESEND in Init(successor.ask("state 1", "counts")["negotiated"][1]):
        assert place.result(reader) == "late\n"


def test_a_mount_may_be_inside_of_another_of_the_same_server(place: Place) -> None:
    server = place.serve(f"1:{place.path}/m")
    server.order(f"mount 2 {place.path}/m/made/inner")
    assert server.expect("mounted")["mounted"] == f"{place.path}/m/made/inner"
    assert place.shell(f"cat {place.path}/m/made/inner/hello") == "hello\n"
    assert len(place.mounts()) == 2
    server.order("unmount 2")
    assert server.expect("ended") == {"ended": 2}
    assert place.shell(f"ls {place.path}/m/made/inner") == ""
