"""Calls of the files plane, as a session counts them and as a link delivers their results: each once."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

from protocol import codec, messages
from protocol.errors import ErrorCode, LinkClosed, LinkError, LocalProtocolError, RemoteProtocolError
from protocol.files import MAX_FILES_PAYLOAD, GetAttributes, Read, Write
from protocol.frames import FrameDecoder
from protocol.link import Hello, Link, Role, Service
from protocol.messages import Call, Result
from protocol.session import MAX_CALLS, Ended, Event, Session

READ = Read(7, 8, 9, 0, 4096)
Outcome = Result | LinkError


def wire(*frames: messages.AnyFrame) -> bytes:
    return b"".join(b"".join(messages.encode(frame)) for frame in frames)


# --- the session -----------------------------------------------------------------------------------


def greeted(role: Role = Role.HOST, **options: Any) -> Session:
    """A session past the hellos. The peer of a host uses odd ids."""
    session = Session(role, Hello(), 0.0, **options)
    session.receive_data(wire(Hello()), 0.0)
    session.data_to_send()
    return session


def said(session: Session, max_payload: int = 1 << 20) -> list[messages.AnyFrame]:
    decoder, frames = FrameDecoder(max_payload=max_payload), []
    decoder.receive_data(b"".join(session.data_to_send().buffers))
    while (raw := decoder.next_frame()) is not None:
        frames.append(messages.decode(raw))
    return frames


def hears(session: Session, *frames: messages.AnyFrame) -> list[Event]:
    return session.receive_data(wire(*frames), 0.0)


def error_of(events: list[Event]) -> LinkError:
    assert isinstance(events[-1], Ended)
    return events[-1].error


def test_a_call_and_its_result() -> None:
    session = greeted()
    assert [session.call(30, [1], b"x"), session.call(31, [])] == [2, 4]
    assert session.calls_pending == 2
    assert said(session) == [Call(2, 30, [1], b"x"), Call(4, 31, [])]
    answers = [Result(4, errno.EIO, None), Result(2, 0, [1], b"y")]
    assert hears(session, *answers) == answers  # in any order
    assert session.calls_pending == 0


def test_a_call_of_the_peers_is_answered_once() -> None:
    session = greeted()
    assert hears(session, Call(1, 30, [], b"x")) == [Call(1, 30, [], b"x")]
    session.result(1, 0, [5], b"y")
    assert said(session) == [Result(1, 0, [5], b"y")]
    for number in (1, 2, 3):
        with pytest.raises(LocalProtocolError, match=f"call {number} is not waiting"):
            session.result(number, 0, None)


@pytest.mark.parametrize("number", [2, 4, -2, 1])
def test_a_result_nobody_waits_for(number: int) -> None:
    session = greeted()
    session.call(30, [])
    events = hears(session, Result(2, 0, None), Result(number, 0, None))
    assert events[0] == Result(2, 0, None)
    assert isinstance(error_of(events), RemoteProtocolError)
    assert "not pending" in str(error_of(events))


@pytest.mark.parametrize("number", [0, 2, -1, 3, 1, 2**53 + 1])
def test_ids_of_calls_are_the_peers_and_new(number: int) -> None:
    assert isinstance(error_of(hears(greeted(), Call(3, 1, []), Call(number, 1, []))), RemoteProtocolError)


def test_ids_of_calls_are_not_those_of_requests() -> None:
    session = greeted()
    events = hears(session, messages.Request(1, "x", []), Call(1, 1, []), messages.Open(1, "tcp", [], 1))
    assert [type(event) for event in events] == [messages.Request, Call, messages.Open]
    assert (session.request("x", [], None, 0.0), session.call(1, []), session.open("tcp", [])) == (2, 2, 2)


def test_calls_are_limited_here_and_the_peers_there() -> None:
    session = greeted()
    for _ in range(MAX_CALLS):
        session.call(1, [])
    with pytest.raises(LocalProtocolError, match="1024 calls"):
        session.call(1, [])
    assert hears(session, Result(2, 0, None)) == [Result(2, 0, None)]
    assert session.call(1, []) == 2 * MAX_CALLS + 2  # the refused one took no id
    calls = [Call(1 + 2 * index, 1, []) for index in range(MAX_CALLS)]
    assert len(hears(session, *calls)) == MAX_CALLS
    session.result(5, 0, None)
    assert hears(session, Call(9999, 1, [])) == [Call(9999, 1, [])]
    assert error_of(hears(session, Call(10001, 1, []))).code is ErrorCode.LIMIT


@pytest.mark.parametrize("limit", [65536, MAX_FILES_PAYLOAD])
def test_a_payload_over_the_limit_is_ours_to_know(limit: int) -> None:
    session = greeted(max_payload=limit)
    with pytest.raises(LocalProtocolError, match="limit is"):
        session.call(31, [], bytes(limit + 1))
    assert (session.calls_pending, session.has_output) == (0, False)
    hears(session, Call(1, 30, []))
    with pytest.raises(LocalProtocolError, match="limit is"):
        session.result(1, 0, None, bytes(limit + 1))
    assert not session.has_output
    session.result(1, errno.EIO, None)  # the question can still be answered
    session.call(31, [], bytes(limit))
    assert [len(frame.payload) for frame in said(session) if isinstance(frame, Call)] == [limit]


def test_a_payload_over_the_limit_is_the_peers_error() -> None:
    frame = b"".join(messages.encode_call(1, 31, [], bytes(65537), max_payload=1 << 20))
    assert isinstance(error_of(greeted().receive_data(frame, 0.0)), RemoteProtocolError)
    assert len(greeted(max_payload=1 << 20).receive_data(frame, 0.0)) == 1


def test_nothing_is_called_or_answered_after_the_end() -> None:
    session = greeted()
    hears(session, Call(1, 1, []))
    session.goodbye()
    with pytest.raises(LinkClosed):
        session.call(1, [])
    with pytest.raises(LinkClosed):
        session.result(1, 0, None)


def test_the_limit_of_the_backlog_is_the_links() -> None:
    for max_backlog, fits in ((3 << 20, False), (8 << 20, True)):
        session = greeted(max_payload=1 << 20, max_backlog=max_backlog)
        hears(session, *[Call(number, 30, []) for number in (1, 3, 5, 7)])
        for number in (1, 3, 5, 7):
            session.result(number, 0, None, bytes(1 << 20))
        events = hears(session, messages.Ping(1))
        assert (events == []) is fits
        if not fits:
            assert error_of(events).code is ErrorCode.LIMIT


# --- the link --------------------------------------------------------------------------------------


class Answering(Service):
    """A service that keeps the calls it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.on_call(self.calls.append)


@asynccontextmanager
async def linked(host: Service, **options: Any) -> AsyncIterator[tuple[Link, Link]]:
    """The host's link, and the guest's; leaving says goodbye. ``options`` are of both."""
    one, other = trio.testing.memory_stream_pair()
    links = (
        Link(one, Role.HOST, host, Hello(name="host"), **options),
        Link(other, Role.GUEST, Service(), Hello(name="guest"), **options),
    )
    async with trio.open_nursery() as nursery:
        async with trio.open_nursery() as starting:
            for link in links:
                starting.start_soon(nursery.start, link.run)
        yield links
        if links[0]._error is None:
            await links[0].goodbye()


async def settle() -> None:
    await trio.testing.wait_all_tasks_blocked()


async def test_results_come_once_and_in_the_order_of_the_answers(
    autojump_clock: trio.testing.MockClock,
) -> None:
    service, outcomes = Answering(), list[tuple[str, Outcome]]()
    async with linked(service, max_payload=MAX_FILES_PAYLOAD) as (host, guest):
        data = bytes(MAX_FILES_PAYLOAD)
        guest.call(Write(7, 8, 9, 0, True), data, lambda outcome: outcomes.append(("write", outcome)))
        guest.call(READ, b"", lambda outcome: outcomes.append(("read", outcome)))
        await settle()
        write, read = service.calls
        assert codec.decode(Write, write.args) == Write(7, 8, 9, 0, True)
        assert codec.decode(Read, read.args) == READ
        assert (write.op, write.payload, read.payload) == (Write.OP, data, b"")
        assert outcomes == []
        host.answer(read.id, 0, [], b"content")
        host.answer(write.id, errno.ENOSPC)
        await settle()
    assert outcomes == [
        ("read", Result(read.id, 0, [], b"content")),
        ("write", Result(write.id, errno.ENOSPC, None)),
    ]


async def test_without_a_handler_nothing_is_implemented(autojump_clock: trio.testing.MockClock) -> None:
    outcomes: list[Outcome] = []
    async with linked(Service()) as (_, guest):
        guest.call(READ, b"", outcomes.append)
        await settle()
    assert outcomes == [Result(1, errno.ENOSYS, None)]


def test_calls_have_one_handler() -> None:
    with pytest.raises(LocalProtocolError, match="a handler already"):
        Answering().on_call(print)


async def test_what_is_pending_fails_with_the_link(autojump_clock: trio.testing.MockClock) -> None:
    service, outcomes = Answering(), list[Outcome]()
    async with linked(service) as (host, guest):
        for _ in range(3):
            guest.call(READ, b"", outcomes.append)
        await settle()
        host.answer(service.calls[1].id, 0, [])
        await settle()
        await host.goodbye("enough")
        await settle()
        answered, *lost = outcomes
        assert answered == Result(service.calls[1].id, 0, [])
        assert [type(error) for error in lost] == [LinkClosed] * 2
        assert lost[0] is not lost[1]  # each may be raised
        with pytest.raises(LinkError):
            guest.call(READ, b"", outcomes.append)
        host.answer(service.calls[0].id, 0, [])  # a worker that was slower than the link: nothing happens
        host.answer(service.calls[1].id, 0, [])
    assert len(outcomes) == 3


async def test_a_call_from_within_a_result(autojump_clock: trio.testing.MockClock) -> None:
    outcomes: list[Outcome] = []

    async with linked(Service()) as (host, guest):

        def ask_again(outcome: Outcome) -> None:
            outcomes.append(outcome)
            if isinstance(outcome, LinkError):
                with pytest.raises(LinkError):  # said here and now: there is nothing to queue on
                    guest.call(READ, b"", ask_again)
            elif len(outcomes) < 3:
                guest.call(GetAttributes(7, 8, 9), b"", ask_again)

        guest.call(READ, b"", ask_again)
        await settle()
        assert outcomes == [Result(number, errno.ENOSYS, None) for number in (1, 3, 5)]
        service = Answering()
        host._service = service  # one that does not answer
        guest.call(READ, b"", ask_again)
        await settle()
        await host.goodbye()
    assert isinstance(outcomes[3], LinkClosed)
    assert len(outcomes) == 4


@pytest.mark.parametrize("handled", [True, False])
async def test_a_call_whose_link_ended_in_the_same_read(
    handled: bool, autojump_clock: trio.testing.MockClock
) -> None:
    """The session is over before the call reaches the handler; to answer it at once is no error."""
    ours, peer = trio.testing.memory_stream_pair()
    service = Service()
    link = Link(ours, Role.HOST, service, Hello())
    if handled:
        service.on_call(lambda call: link.answer(call.id, 0, []))
    async with trio.open_nursery() as nursery:
        await peer.send_all(wire(Hello()))
        await nursery.start(link.run)
        await peer.send_all(wire(Call(1, 1, []), messages.Goodbye("gone", "bye")))
    assert isinstance(link._error, LinkClosed)


async def test_a_paused_link_reads_no_more_calls(autojump_clock: trio.testing.MockClock) -> None:
    """``pause_above``: answers wait for the peer to read them, and its next questions wait for that."""
    ours, peer = trio.testing.memory_stream_pair()
    service = Service()
    asked: list[int] = []
    link = Link(
        ours, Role.HOST, service, Hello(), max_payload=1 << 20, max_backlog=64 << 20, pause_above=1 << 20
    )

    def answer(call: Call) -> None:
        asked.append(call.id)
        link.answer(call.id, 0, [], bytes(1 << 20))

    service.on_call(answer)
    blocked = trio.Event()

    async def wait() -> None:
        await blocked.wait()

    async with trio.open_nursery() as nursery:
        await peer.send_all(wire(Hello()))
        await nursery.start(link.run)
        await peer.receive_some()
        ours.send_stream.send_all_hook = wait
        for number in range(1, 41, 2):
            await peer.send_all(wire(Call(number, 30, [])))
            await settle()
        # One answer is being written; the next, with its header, is more than a megabyte.
        assert asked == [1, 3]
        blocked.set()
        await settle()
        assert asked == list(range(1, 41, 2))
        ours.send_stream.send_all_hook = None
        await link.goodbye()


async def test_what_is_written_is_told_and_the_backlog_known(autojump_clock: trio.testing.MockClock) -> None:
    """What is being written counts as well: its memory is not free before that is over."""
    ours, peer = trio.testing.memory_stream_pair()
    service = Answering()
    link = Link(ours, Role.HOST, service, Hello(), max_payload=1 << 20, max_backlog=64 << 20)
    gate, told = trio.Semaphore(0), list[int]()
    link.on_written = lambda: told.append(link.backlog >> 20)
    async with trio.open_nursery() as nursery:
        await peer.send_all(wire(Hello(), *(Call(number, 30, []) for number in (1, 3, 5, 7))))
        await nursery.start(link.run)
        await settle()
        assert link.backlog == 0
        told.clear()
        ours.send_stream.send_all_hook = gate.acquire
        for call, backlog in zip(service.calls, (1, 2, 3, 4), strict=True):
            link.answer(call.id, 0, [], bytes(1 << 20))
            await settle()
            assert link.backlog >> 20 == backlog
        assert told == []
        gate.release()  # the first
        await settle()
        assert (told, link.backlog >> 20) == ([3], 3)
        gate.release()  # the other three, at once
        await settle()
        assert (told, link.backlog) == ([3, 0], 0)
        ours.send_stream.send_all_hook = None
        await link.goodbye()


async def test_a_paused_link_still_ends(autojump_clock: trio.testing.MockClock) -> None:
    ours, peer = trio.testing.memory_stream_pair()
    service = Service()
    link = Link(ours, Role.HOST, service, Hello(), pause_above=0)
    service.on_call(lambda call: link.answer(call.id, 0, [], bytes(1000)))
    ended: list[LinkError] = []

    async def run(task_status: trio.TaskStatus[Link]) -> None:
        try:
            await link.run(task_status)
        except LinkError as error:
            ended.append(error)

    async with trio.open_nursery() as nursery:
        await peer.send_all(wire(Hello()))
        await nursery.start(run)
        ours.send_stream.send_all_hook = trio.sleep_forever
        for number in (1, 3, 5):
            await peer.send_all(wire(Call(number, 30, [])))
        await settle()
        with trio.fail_after(60):
            await link.goodbye()
    assert ended == []


async def test_a_payload_over_the_links_limit(autojump_clock: trio.testing.MockClock) -> None:
    service, outcomes = Answering(), list[Outcome]()
    async with linked(service) as (host, guest):
        with pytest.raises(LocalProtocolError, match="limit is 65536"):
            guest.call(Write(7, 8, 9, 0), bytes(65537), outcomes.append)
        guest.call(READ, b"", outcomes.append)
        await settle()
        with pytest.raises(LocalProtocolError, match="limit is 65536"):
            host.answer(service.calls[0].id, 0, [], bytes(65537))
        host.answer(service.calls[0].id, errno.EIO)
        await settle()
    assert outcomes == [Result(1, errno.EIO, None)]
