"""Every wait has an end, and its errno says which: a guest that is away, that hangs, that lies."""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from host_agent.view.asking import Guest
from protocol import messages
from protocol.files import (
    SET_MODE,
    FileCall,
    GetAttributes,
    MountReports,
    MountShares,
    MountStage,
    SetAttributes,
    Share,
)
from protocol.link import Hello, Link, Role, SerialChannel, Service
from protocol.serial import SocketPort

CALL = GetAttributes(1, 0, 1)
CHANGE = SetAttributes(1, 0, 1, SET_MODE, mode=0o600)
ATTRIBUTES = [bytes(88), False, 0]

Answer = Callable[[Link, messages.Call], None]


def good(link: Link, call: messages.Call) -> None:
    link.answer(call.id, 0, ATTRIBUTES)


class Corked(trio.abc.SendStream):
    """A greeting waits here for the word behind it, and both are sent as one."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self._held: bytes | None = b""
        self._second = trio.Event()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        if self._held is None:
            await self._stream.send_all(data)
        else:
            if self._held:
                self._second.set()
            self._held += bytes(data)
            await trio.lowlevel.checkpoint()

    async def uncork(self) -> None:
        if self._held:
            await self._second.wait()
        held, self._held = self._held, None
        await self._stream.send_all(held or b"")

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        await self._stream.aclose()


class Server:
    """QEMU's socket and the guest behind it, which answers calls by ``answer``."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.answer: Answer = good
        self.epoch = "one"
        self.reports: list[MountReports] = []
        self.shares = [Share(1, "/volumes/db")]
        self.calls: list[messages.Call] = []
        self.at_once = False

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        socket = trio.socket.socket(trio.socket.AF_UNIX)
        self._path.unlink(missing_ok=True)
        await socket.bind(str(self._path))
        socket.listen(4)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._accept, trio.SocketListener(socket))
            try:
                yield
            finally:
                nursery.cancel_scope.cancel()

    async def _accept(self, listener: trio.SocketListener) -> None:
        async with listener:
            while True:
                async with await listener.accept() as stream:
                    with contextlib.suppress(Exception):
                        await self._session(SerialChannel(SocketPort(stream)))

    async def _session(self, channel: SerialChannel) -> None:
        service = Service()
        service.on_call(self._take)
        stream = await channel.establish()
        corked = Corked(stream)
        self.link = Link(
            trio.StapledStream(corked, stream) if self.at_once else stream,
            Role.GUEST,
            service,
            Hello(boot_id=self.epoch, name="guest"),
        )
        async with trio.open_nursery() as nursery:
            await nursery.start(self.link.run)
            nursery.start_soon(self._tell)
            await corked.uncork()

    async def _tell(self) -> None:
        self.reports.append(await self.link.request(MountShares(self.shares)))

    def _take(self, call: messages.Call) -> None:
        self.calls.append(call)
        self.answer(self.link, call)


@contextlib.asynccontextmanager
async def asking(folder: Path, *, patience: float = 5.0, answer_time: float = 20.0) -> AsyncIterator[Guest]:
    async with trio.open_nursery() as nursery:
        guest = Guest(folder / "view.sock", patience=patience, answer_time=answer_time)
        nursery.start_soon(guest.run)
        yield guest
        nursery.cancel_scope.cancel()


async def ask(guest: Guest, call: FileCall[Any] = CALL) -> int:
    """0, or the errno; in the thread that would serve the kernel."""

    def wait() -> int:
        try:
            guest.begin(call).wait()
        except OSError as error:
            return error.errno or -1
        return 0

    return await trio.to_thread.run_sync(wait)


async def test_what_the_guest_shows_and_answers(folder: Path) -> None:
    server = Server(folder / "view.sock")
    server.shares = [Share(1, "/volumes/db"), Share(2, "/volumes/../x")]
    async with server.running(), asking(folder) as guest:
        assert await guest.wait_arranged(30)
        assert [place.path for place in guest.tree.places] == [(b"volumes", b"db")]
        assert guest.epoch == "one"
        assert guest.connected
        assert await ask(guest) == 0
        with trio.fail_after(30):
            while not server.reports:
                await trio.sleep(0.01)
        assert [report.stage for report in server.reports[0].reports] == [
            MountStage.MOUNTED,
            MountStage.FAILED,
        ]


async def test_a_guest_that_speaks_with_its_greeting_is_heard(folder: Path) -> None:
    server = Server(folder / "view.sock")
    server.at_once = True
    async with server.running(), asking(folder) as guest:
        assert await guest.wait_arranged(30)
        assert guest.connected
        assert await ask(guest) == 0


async def test_without_a_guest_it_is_down_after_a_while_and_then_at_once(folder: Path) -> None:
    async with asking(folder, patience=0.3) as guest:
        assert not await guest.wait_arranged(0.1)
        assert await ask(guest) == errno.EHOSTDOWN
        begun = time.monotonic()
        for _ in range(20):
            assert await ask(guest) == errno.EHOSTDOWN
        assert time.monotonic() - begun < 20 * 0.3


async def test_who_asks_while_it_comes_waits_for_it(folder: Path) -> None:
    server = Server(folder / "view.sock")
    async with asking(folder, patience=30) as guest, trio.open_nursery() as nursery:
        outcomes: list[int] = []

        async def one() -> None:
            outcomes.append(await ask(guest))

        nursery.start_soon(one)
        await trio.sleep(0.2)
        assert outcomes == []
        async with server.running():
            with trio.fail_after(30):
                while not outcomes:
                    await trio.sleep(0.01)
    assert outcomes == [0]


async def test_one_that_is_silent_is_waited_for_once(folder: Path) -> None:
    server = Server(folder / "view.sock")
    async with server.running(), asking(folder, answer_time=0.5) as guest:
        assert await guest.wait_arranged(30)
        pending: list[messages.Call] = []
        server.answer = lambda link, call: pending.append(call)
        assert await ask(guest) == errno.ETIMEDOUT
        assert await ask(guest) == errno.ETIMEDOUT
        assert len(pending) == 1  # the second was not even sent
        server.answer = good
        good(server.link, pending[0])  # it is heard from again
        with trio.fail_after(30):
            while await ask(guest) != 0:
                await trio.sleep(0.01)


@pytest.mark.parametrize(("call", "outcome"), [(CHANGE, errno.EHOSTDOWN), (CALL, 0)])
async def test_with_a_lost_link_a_change_fails_and_a_question_is_asked_again(
    folder: Path, call: FileCall[Any], outcome: int
) -> None:
    server = Server(folder / "view.sock")
    async with server.running(), asking(folder, patience=30) as guest, trio.open_nursery() as nursery:
        assert await guest.wait_arranged(30)
        server.answer = lambda link, call: None
        outcomes: list[int] = []

        async def one() -> None:
            outcomes.append(await ask(guest, call))

        nursery.start_soon(one)
        with trio.fail_after(60):
            while not server.calls:
                await trio.sleep(0.01)
            server.answer = good
            await server.link.goodbye("it is killed")
            while not outcomes:
                await trio.sleep(0.01)
    assert outcomes == [outcome]
    assert len(server.calls) == (2 if outcome == 0 else 1)


async def test_another_process_is_another_epoch(folder: Path) -> None:
    server = Server(folder / "view.sock")
    async with asking(folder) as guest:
        async with server.running():
            assert await guest.wait_arranged(30)
        server.epoch = "two"
        async with server.running():
            with trio.fail_after(30):
                while guest.epoch != "two":
                    await trio.sleep(0.01)
            assert await ask(guest) == 0


async def test_an_answer_that_is_none_and_an_errno_that_is_none(folder: Path) -> None:
    server = Server(folder / "view.sock")
    async with server.running(), asking(folder) as guest:
        assert await guest.wait_arranged(30)
        for error, value, seen in (
            (0, ["not attributes"], errno.EIO),
            (0, None, errno.EIO),
            (errno.EACCES, None, errno.EACCES),
            (errno.ENODEV, None, errno.ESTALE),
            (
                errno.ENOSYS,
                None,
                errno.EOPNOTSUPP,
            ),  # for fsync(2) it would mean that there never is one again
            (errno.EINTR, None, errno.EIO),
            (4000, None, errno.EIO),
        ):
            server.answer = lambda link, call, e=error, v=value: link.answer(call.id, e, v)  # type: ignore[misc]
            assert await ask(guest) == seen


async def test_what_cannot_be_said_to_the_guest_ends_nothing(folder: Path) -> None:
    server = Server(folder / "view.sock")
    async with server.running(), asking(folder) as guest:
        assert await guest.wait_arranged(30)
        assert await ask(guest, SetAttributes(1, 0, 1, SET_MODE, mtime_ns=1 << 70)) == errno.EINVAL
        assert await ask(guest) == 0


async def test_an_operation_of_many_slow_answers_ends(folder: Path) -> None:
    server = Server(folder / "view.sock")
    async with server.running(), asking(folder, answer_time=0.5) as guest:
        assert await guest.wait_arranged(30)
        guest.begin_operation()
        with trio.fail_after(30):
            while (outcome := await ask(guest)) == 0:
                await trio.sleep(0.1)
        assert outcome == errno.ETIMEDOUT
        guest.begin_operation()  # the next is not to blame
        assert await ask(guest) == 0


async def test_when_it_is_over_nobody_waits(folder: Path) -> None:
    server = Server(folder / "view.sock")
    async with server.running():
        async with asking(folder) as guest:
            assert await guest.wait_arranged(30)
            server.answer = lambda link, call: None
            waiting = guest.begin(CALL)
            with trio.fail_after(30):
                while not server.calls:
                    await trio.sleep(0.01)
    for each in (waiting, guest.begin(CALL)):
        with pytest.raises(OSError) as failed:
            await trio.to_thread.run_sync(each.wait)
        assert failed.value.errno == errno.EHOSTDOWN
