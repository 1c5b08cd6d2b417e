"""The door alone, with real sockets and a clock that is set."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from guest_agent.remote import door as module
from guest_agent.remote.door import SILENCE, Door
from guest_agent.remote.handover import MAX_LINE, OTHER_BUILD, REFUSED, TAKEN, Offer, parse_grace

GRACE = 600.0


class Visitor:
    """Who connects, and the host's end of what it brings."""

    def __init__(self, address: str) -> None:
        self.connection = socket.socket(socket.AF_UNIX)
        self.connection.connect(address)
        self.connection.setblocking(False)
        self.host, self._theirs = socket.socketpair()
        self.host.setblocking(False)

    def offer(self, line: bytes, fds: int = 2) -> None:
        socket.send_fds(self.connection, [line], [self._theirs.fileno()] * fds)
        self._theirs.close()

    async def answer(self) -> bytes:
        with trio.fail_after(20):
            await trio.lowlevel.wait_readable(self.connection)
        return self.connection.recv(MAX_LINE)

    async def hears(self) -> bytes:
        with trio.fail_after(20):
            await trio.lowlevel.wait_readable(self.host)
        return self.host.recv(100)

    def close(self) -> None:
        for sock in (self.connection, self.host, self._theirs):
            sock.close()


class House:
    """A door, who comes, and when the process was to end."""

    def __init__(self, address: str, nursery: trio.Nursery) -> None:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(address)
        listener.listen()
        self.address = address
        self.ended: list[float] = []
        self.door = Door(listener, "build", GRACE, lambda: self.ended.append(trio.current_time()))
        nursery.start_soon(self.door.run)

    @contextmanager
    def visitor(self) -> Iterator[Visitor]:
        visitor = Visitor(self.address)
        try:
            yield visitor
        finally:
            visitor.close()

    @contextmanager
    def given(self, grace: float = GRACE) -> Iterator[Visitor]:
        with self.visitor() as visitor:
            visitor.offer(Offer("build", grace).encode())
            yield visitor


@pytest.fixture
async def house(tmp_path: Path, nursery: trio.Nursery, mock_clock: MockClock) -> AsyncIterator[House]:
    yield House(str(tmp_path / "door"), nursery)
    nursery.cancel_scope.cancel()


async def test_what_is_handed_over_is_the_transport(house: House) -> None:
    with house.given() as visitor:
        async with await house.door.open_transport() as transport:
            assert await visitor.answer() == TAKEN
            await transport.send_all(b"to the host")
            assert await visitor.hears() == b"to the host"
            visitor.host.send(b"to the agent")
            assert await transport.receive_some() == b"to the agent"
        assert await visitor.hears() == b""
        assert await visitor.answer() == b""


async def test_a_host_that_leaves_breaks_the_transport(house: House) -> None:
    with house.given() as visitor:
        async with await house.door.open_transport() as transport:
            visitor.host.close()
            with pytest.raises(trio.BrokenResourceError):
                await transport.receive_some()


async def test_a_connector_that_leaves_breaks_it_too(house: House) -> None:
    with house.given() as visitor:
        async with await house.door.open_transport() as transport:
            assert await visitor.answer() == TAKEN
            visitor.connection.close()
            with pytest.raises(trio.BrokenResourceError):
                await transport.receive_some()


async def test_who_comes_later_is_served(house: House) -> None:
    with house.given() as first:
        async with await house.door.open_transport() as transport:
            with house.given() as second, house.given() as third:
                with pytest.raises(trio.BrokenResourceError):
                    await transport.receive_some()
                assert await third.answer() == TAKEN
                await transport.aclose()
                async with await house.door.open_transport() as successor:
                    await successor.send_all(b"x")
                    assert await third.hears() == b"x"
                    # Two came at once: of these nobody ever saw the one before.
                    assert (await second.answer(), await second.answer()) == (TAKEN, b"")
                    assert await second.hears() == b""
                    assert (await first.answer(), await first.answer()) == (TAKEN, b"")


async def test_without_anybody_it_ends_after_the_time_of_grace(house: House, mock_clock: MockClock) -> None:
    mock_clock.jump(GRACE - 1)
    await wait_all_tasks_blocked(0.01)
    assert house.ended == []
    mock_clock.jump(1)
    await wait_all_tasks_blocked(0.01)
    assert house.ended == [GRACE]
    with house.given() as visitor, pytest.raises(ConnectionResetError):  # too late: it is to come again
        await visitor.answer()


async def test_the_time_of_grace_is_what_was_said_last_and_begins_with_the_end(
    house: House, mock_clock: MockClock
) -> None:
    with house.given(5) as visitor:
        transport = await house.door.open_transport()
        assert await visitor.answer() == TAKEN
        mock_clock.jump(30)
        await wait_all_tasks_blocked(0.01)
        await transport.aclose()
        assert await visitor.answer() == b""
    await wait_all_tasks_blocked(0.01)
    assert house.ended == []
    mock_clock.jump(5)
    await wait_all_tasks_blocked(0.01)
    assert house.ended == [35]


async def test_it_can_be_asked_to_stay_for_ever(house: House, mock_clock: MockClock) -> None:
    with house.given(parse_grace("inf")) as visitor:
        await (await house.door.open_transport()).aclose()
        assert (await visitor.answer(), await visitor.answer()) == (TAKEN, b"")
    mock_clock.jump(1e9)
    await wait_all_tasks_blocked(0.01)
    assert house.ended == []


async def test_a_host_that_is_silent_is_not_there(house: House, mock_clock: MockClock) -> None:
    with house.given() as visitor:
        async with await house.door.open_transport() as transport:
            assert await visitor.answer() == TAKEN
            for _ in range(5):
                visitor.host.send(b"here")
                assert await transport.receive_some() == b"here"
                mock_clock.jump(SILENCE)
                await wait_all_tasks_blocked(0.01)
            mock_clock.jump(SILENCE)
            with pytest.raises(trio.BrokenResourceError):
                with trio.fail_after(SILENCE):
                    await transport.receive_some()
    assert house.ended == []


async def test_another_build_makes_it_end(house: House) -> None:
    with house.visitor() as visitor:
        visitor.offer(Offer("another", GRACE).encode())
        assert await visitor.answer() == OTHER_BUILD
        await wait_all_tasks_blocked(0.01)
        assert len(house.ended) == 1


@pytest.mark.parametrize(
    ("line", "fds"),
    [
        (b"GET / HTTP/1.1\r\n", 2),
        (b"agentctl-stdio 2 build 1.0\n", 2),
        (b"agentctl-stdio 1 build soon\n", 2),
        (b"agentctl-stdio 1 build nan\n", 2),
        (b"agentctl-stdio 1 build -1\n", 2),
        (b"\xff" * 100, 2),
        (Offer("build", 1.0).encode(), 0),
        (Offer("build", 1.0).encode(), 1),
        (Offer("build", 1.0).encode(), 3),
    ],
)
async def test_what_is_no_offer_is_refused_and_nothing_of_it_kept(
    house: House, line: bytes, fds: int
) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with house.visitor() as visitor:
        visitor.offer(line, fds)
        assert (await visitor.answer()).startswith(REFUSED)
        assert await visitor.answer() == b""
        assert await visitor.hears() == b""
    assert len(os.listdir("/proc/self/fd")) == before
    with house.given() as welcome:
        assert await welcome.answer() == TAKEN
        await (await house.door.open_transport()).aclose()


async def test_another_user_is_refused(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.os, "geteuid", lambda: 12345)
    monkeypatch.setattr(module, "_CREDENTIALS", _Stranger())
    with house.given() as visitor:
        assert b"another user" in await visitor.answer()


class _Stranger:
    """As the kernel would describe one."""

    size = 12

    def unpack(self, credentials: bytes) -> tuple[int, int, int]:
        return 1, 54321, 54321


async def test_who_says_nothing_is_let_go(house: House, mock_clock: MockClock) -> None:
    with house.visitor() as visitor:
        await wait_all_tasks_blocked(0.01)
        mock_clock.jump(module.OFFER_TIME)
        assert await visitor.answer() == b""
