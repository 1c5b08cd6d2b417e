"""Links whose payloads go through memory: the streams of trio, and calls that outlive their session."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

from protocol import codec, messages
from protocol.api import DialTcp, Listeners
from protocol.bulk import INLINE_BELOW, MAX_RUN, SLOT, Bulk
from protocol.errors import LinkError
from protocol.files import Read, Write
from protocol.link import Hello, Incoming, Link, Role, Service
from protocol.messages import AnyFrame, BulkOffer, Call, Data, Open, Opened, Result
from protocol.muxstream import MuxStream
from protocol.serial import SocketPort
from protocol.window import INITIAL_WINDOW

SLOTS = 16
HALF = SLOTS * SLOT
OPTIONS: dict[str, Any] = {"max_payload": MAX_RUN, "heartbeat": 1000.0, "dead_after": 2000.0}
HOST, GUEST = 0, 1


def ends() -> list[SocketPort]:
    pair = socket.socketpair()
    for end in pair:
        end.setblocking(False)
    return [SocketPort(trio.SocketStream(trio.socket.from_stdlib_socket(end))) for end in pair]


def memory() -> list[Bulk]:
    """Of a host and a guest."""
    view = memoryview(bytearray(2 * HALF))
    host, guest = Bulk(), Bulk()
    host.attach(view[:HALF], view[HALF:])
    guest.attach(view[HALF:], view[:HALF])
    host.accept = lambda extents, mark: True
    return [host, guest]


class Linked:
    """Two links; the streams that the guest accepted, and the calls that the host heard."""

    def __init__(self, bulks: list[Bulk]) -> None:
        self.bulks = bulks
        self.accepted: list[MuxStream] = []
        self.calls: list[Call] = []
        host, guest = Service(), Service()
        host.on_call(self.calls.append)
        guest.on_stream(DialTcp, self._accept)
        one, other = ends()
        offer = BulkOffer([], b"", bulks[GUEST].busy())
        self.host = Link(one, Role.HOST, host, Hello(), bulk=bulks[HOST], **OPTIONS)
        self.guest = Link(other, Role.GUEST, guest, Hello(bulk=offer), bulk=bulks[GUEST], **OPTIONS)

    async def _accept(self, target: DialTcp, incoming: Incoming) -> None:
        self.accepted.append(await incoming.accept())
        await trio.sleep_forever()

    async def streams(self) -> tuple[MuxStream, MuxStream]:
        stream = await self.host.open(DialTcp("", 1))
        return stream, self.accepted.pop()

    async def all_free(self) -> None:
        while [bulk.free for bulk in self.bulks] != [SLOTS, SLOTS]:
            for stream in await self.streams():
                await stream.aclose()
            await trio.testing.wait_all_tasks_blocked()
        assert not any(bulk.in_use for bulk in self.bulks)


@asynccontextmanager
async def linked(bulks: list[Bulk] | None = None) -> AsyncIterator[Linked]:
    pair = Linked(bulks or memory())
    async with trio.open_nursery() as nursery:
        async with trio.open_nursery() as starting:
            for link in (pair.host, pair.guest):
                starting.start_soon(nursery.start, link.run)
        with trio.fail_after(30):
            await until(lambda: pair.bulks[GUEST].active)
            yield pair
        if pair.host._error is None:
            await pair.host.goodbye()


async def until(condition: Any) -> None:
    with trio.fail_after(20):
        while not condition():
            await trio.sleep(0.001)


async def exactly(stream: MuxStream, count: int) -> bytes:
    received = b""
    while len(received) < count:
        received += await stream.receive_some(count - len(received))
    return received


# --- streams ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
async def test_bytes_of_any_size_arrive_and_their_slots_come_back(kind: Any) -> None:
    async with linked() as pair:
        one, other = await pair.streams()
        for size in [1, INLINE_BELOW - 1, INLINE_BELOW, SLOT, SLOT + 1, MAX_RUN, 3 * MAX_RUN + 5, 1]:
            payload = os.urandom(size)
            for source, sink in ((one, other), (other, one)):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(source.send_all, kind(payload))
                    assert await exactly(sink, size) == payload
        await one.aclose()
        await other.aclose()
        await pair.all_free()


async def test_what_was_sent_may_be_changed_afterwards() -> None:
    async with linked() as pair:
        one, other = await pair.streams()
        buffer = bytearray(b"x" * SLOT)
        await one.send_all(buffer)
        buffer[:] = b"y" * SLOT
        assert await exactly(other, SLOT) == b"x" * SLOT


async def test_a_send_that_is_cancelled_leaves_nothing_behind() -> None:
    async with linked() as pair:
        one, other = await pair.streams()
        with trio.move_on_after(0.05) as scope:
            await one.send_all(bytes(8 * MAX_RUN))
        assert scope.cancelled_caught, "nobody reads"
        assert not pair.bulks[HOST]._mine
        await other.aclose()
        await pair.all_free()


async def test_who_does_not_read_leaves_room_for_others() -> None:
    async with linked() as pair:
        stuck, _unread = await pair.streams()
        with trio.move_on_after(0.05):
            await stuck.send_all(bytes(8 * MAX_RUN))
        assert pair.bulks[HOST].free > 0
        one, other = await pair.streams()
        payload = os.urandom(4 * MAX_RUN)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.send_all, payload)
            assert await exactly(other, len(payload)) == payload


async def test_what_was_not_read_is_free_when_the_stream_is_closed() -> None:
    async with linked() as pair:
        one, other = await pair.streams()
        await one.send_all(bytes(2 * SLOT))
        await until(lambda: pair.bulks[GUEST].in_use)
        await other.aclose()
        assert not pair.bulks[GUEST].in_use
        await pair.all_free()


async def test_what_was_not_read_is_free_when_the_link_is_lost() -> None:
    async with linked() as pair:
        one, _other = await pair.streams()
        await one.send_all(bytes(2 * SLOT))
        await until(lambda: pair.bulks[GUEST].in_use)
        await pair.guest.goodbye()
        assert not pair.bulks[GUEST].in_use
        assert pair.bulks[GUEST].busy() == b""


# --- calls -----------------------------------------------------------------------------------------


async def test_a_call_and_its_result_through_memory() -> None:
    async with linked() as pair:
        run = pair.bulks[GUEST].take(MAX_RUN)
        assert run is not None
        payload = os.urandom(MAX_RUN)
        run.view[:], run.length = payload, MAX_RUN
        results: list[Any] = []
        pair.guest.call(Write(1, 2, 3, 0), run, results.append)
        await until(lambda: pair.calls)
        assert bytes(pair.calls[0].payload) == payload
        answer = pair.bulks[HOST].take(SLOT)
        assert answer is not None
        answer.view[:5000], answer.length = b"r" * 5000, 5000
        pair.host.answer(pair.calls[0].id, 0, [], answer)
        await until(lambda: results)
        assert bytes(results[0].payload) == b"r" * 5000
        run.give_back()
        results[0].loan.release()
        await pair.all_free()


async def test_a_call_answered_after_the_end_and_asked_again_in_the_next_session() -> None:
    bulks = memory()
    results: list[Any] = []
    async with linked(bulks) as pair:
        run = bulks[GUEST].take(SLOT)
        assert run is not None
        run.view[:], run.length = b"w" * SLOT, SLOT
        pair.guest.call(Write(1, 2, 3, 0), run, results.append)
        await until(lambda: pair.calls)
        await pair.guest.goodbye()
        assert isinstance(results.pop(), LinkError)
        late = pair
    async with linked(bulks) as pair:
        pair.guest.call(Write(1, 2, 3, 0), run, results.append)
        await until(lambda: pair.calls)
        pair.host.answer(pair.calls[0].id, 0, [])
        await until(lambda: results)
        run.give_back()
        assert isinstance(results[0], Result)
        assert bulks[GUEST].free == SLOTS - 1, "the first one is still being served"
        assert bytes(late.calls[0].payload) == b"w" * SLOT
        late.host.answer(late.calls[0].id, errno.EIO)
        await pair.all_free()


async def test_a_run_given_as_an_answer_after_the_end_is_free() -> None:
    bulks = memory()
    async with linked(bulks) as pair:
        pair.guest.call(Read(1, 2, 3, 0, 4096), b"", lambda result: None)
        await until(lambda: pair.calls)
        run = bulks[HOST].take(SLOT)
        assert run is not None
        run.length = SLOT
        await pair.host.goodbye()
        pair.host.answer(pair.calls[0].id, 0, [], run)
    assert not bulks[HOST].in_use


# --- what one read brings --------------------------------------------------------------------------


def wire(*frames: AnyFrame) -> bytes:
    return b"".join(b"".join(messages.encode(frame)) for frame in frames)


async def test_what_comes_with_a_fault_is_not_kept() -> None:
    """The link finds a notice to be wrong when frames behind it have been counted already."""
    one, port = ends()
    host = memory()[HOST]
    service = Service()
    heard: list[Call] = []
    service.on_call(heard.append)

    async def ignore(notice: Listeners) -> None: ...

    service.on_notice(Listeners, ignore)
    link = Link(one, Role.HOST, service, Hello(), bulk=host, **OPTIONS)
    failures: list[LinkError] = []

    async def run(task_status: trio.TaskStatus[Link]) -> None:
        try:
            await link.run(task_status)
        except LinkError as error:
            failures.append(error)

    async with trio.open_nursery() as nursery:
        await port.send_all(wire(Hello(bulk=BulkOffer([], b""))))
        await nursery.start(run)
        streams: list[MuxStream] = []

        async def ask() -> None:
            streams.append(await link.open(DialTcp("", 1)))

        nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked(0.01)
        await port.send_all(wire(Opened(2, INITIAL_WINDOW)))
        await until(lambda: streams)
        results: list[Any] = []
        link.call(Read(1, 2, 3, 0, 4096), b"", results.append)
        await port.send_all(
            wire(
                messages.Notify("listeners", codec.encode(Opened(1, 2))),
                Data(2, b"", [0, SLOT]),
                Call(1, 31, [], b"", [1, SLOT]),
                Result(2, 0, [], b"", [2, SLOT]),
                Open(3, "tcp", [], 9),
            )
        )
        await until(lambda: failures)
    assert isinstance(results[0], LinkError)
    assert heard == []
    assert not host.in_use
    assert host.busy() == b""
    await port.aclose()
