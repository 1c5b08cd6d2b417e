"""Links over trio's in-memory streams, where time is the autojump clock's, so that nothing really waits; and over
sockets and ports, where it must make no difference that frames are read on the lane.
"""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

from protocol import PROTOCOL_MAJOR, messages
from protocol.api import (
    DialTcp,
    DialUnix,
    Done,
    Event,
    GetGuestInfo,
    GetStatus,
    GuestInfo,
    Listener,
    Listeners,
    Proto,
    Shutdown,
    StopInstance,
)
from protocol.errors import (
    ErrorCode,
    LinkClosed,
    LinkError,
    LocalProtocolError,
    OpenRefused,
    RemoteProtocolError,
    RpcError,
    StreamReset,
)
from protocol.frames import FrameDecoder
from protocol.lane import Lane
from protocol.link import Hello, Incoming, Link, MuxStream, Role, SerialChannel, Service
from protocol.rpc import MAX_REQUESTS
from protocol.serial import SocketPort
from protocol.serving import MAX_NOTICES
from protocol.session import MAX_STREAMS
from protocol.window import INITIAL_WINDOW

INFO = GuestInfo("6.12", 1.5, 1, 2, 3, 4, 5, "polling")


@asynccontextmanager
async def linked(
    host: Service | None = None, guest: Service | None = None
) -> AsyncIterator[tuple[Link, Link]]:
    """Two links that know each other; leaving says goodbye."""
    one, other = trio.testing.memory_stream_pair()
    links = (
        Link(one, Role.HOST, host or Service(), Hello(name="host")),
        Link(other, Role.GUEST, guest or Service(), Hello(name="guest")),
    )
    async with trio.open_nursery() as nursery:
        async with trio.open_nursery() as starting:
            for link in links:
                starting.start_soon(nursery.start, link.run)
        yield links
        if links[0]._error is None:
            await links[0].goodbye()


class Puppet:
    """A peer made by hand: it says what the test tells it to."""

    def __init__(self, **options: Any) -> None:
        ours, self.stream = trio.testing.memory_stream_pair()
        self.service = Service()
        self.link = Link(ours, Role.HOST, self.service, Hello(name="host"), **options)
        self.error: LinkError | None = None
        self._decoder = FrameDecoder()

    async def run(self, task_status: trio.TaskStatus[Link] = trio.TASK_STATUS_IGNORED) -> None:
        try:
            await self.link.run(task_status)
        except LinkError as error:
            self.error = error

    async def say(self, *frames: messages.AnyFrame) -> None:
        await self.stream.send_all(b"".join(b"".join(messages.encode(frame)) for frame in frames))

    async def hear(self) -> messages.AnyFrame:
        while (frame := self._decoder.next_frame()) is None:
            data = await self.stream.receive_some()
            assert data, "the link was closed"
            self._decoder.receive_data(data)
        return messages.decode(frame)

    async def hear_out(self) -> list[messages.AnyFrame]:
        """Everything until the link closes its side."""
        data = b"".join([chunk async for chunk in self.stream])
        self._decoder.receive_data(data)
        frames = []
        while (frame := self._decoder.next_frame()) is not None:
            frames.append(messages.decode(frame))
        return frames


@asynccontextmanager
async def puppet(prepare: Callable[[Puppet], None] = lambda peer: None) -> AsyncIterator[Puppet]:
    """A link that has said hello to a puppet. It must be over when the test is."""
    peer = Puppet()
    prepare(peer)
    async with trio.open_nursery() as nursery:
        await peer.say(Hello(name="puppet"))
        await nursery.start(peer.run)
        assert await peer.hear() == Hello(name="host")
        yield peer


# --- requests and notices --------------------------------------------------------------------------


async def test_hellos_are_exchanged(autojump_clock: trio.testing.MockClock) -> None:
    async with linked() as (host, guest):
        assert (host.peer.name, guest.peer.name) == ("guest", "host")


async def test_a_request_both_ways_at_once(autojump_clock: trio.testing.MockClock) -> None:
    service = Service()

    async def info(message: GetGuestInfo) -> GuestInfo:
        await trio.sleep(1)
        return INFO

    service.on_request(GetGuestInfo, info)
    async with linked(service, service) as links:
        answers: list[GuestInfo] = []

        async def ask(link: Link) -> None:
            answers.append(await link.request(GetGuestInfo()))

        before = trio.current_time()
        async with trio.open_nursery() as nursery:
            for _ in range(50):
                for link in links:
                    nursery.start_soon(ask, link)
        assert answers == [INFO] * 100
        assert trio.current_time() - before == pytest.approx(1)


async def test_failures_cross_the_link(
    caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    service = Service()

    async def denied(message: Shutdown) -> Done:
        raise RpcError(ErrorCode.DENIED, "not now", "ask later")

    async def broken(message: StopInstance) -> Done:
        raise ZeroDivisionError("oops")

    async def long(message: GetGuestInfo) -> GuestInfo:
        return GuestInfo("x" * 300_000, 1, 1, 1, 1, 1, 1, "")

    service.on_request(Shutdown, denied)
    service.on_request(StopInstance, broken)
    service.on_request(GetGuestInfo, long)
    async with linked(guest=service) as (host, _):
        with pytest.raises(RpcError) as failure:
            await host.request(Shutdown())
        assert (failure.value.code, failure.value.message, failure.value.hint) == (
            ErrorCode.DENIED,
            "not now",
            "ask later",
        )
        with pytest.raises(RpcError, match="ZeroDivisionError: oops") as failure:
            await host.request(StopInstance())
        assert failure.value.code is ErrorCode.INTERNAL
        assert "link.request-failed method=stop" in caplog.text
        with pytest.raises(RpcError, match="limit is") as failure:
            await host.request(GetGuestInfo())
        with pytest.raises(RpcError) as failure:
            await host.request(GetStatus())
        assert failure.value.code is ErrorCode.UNSUPPORTED


def sleeper(log: list[str]) -> Service:
    service = Service()

    async def sleep(message: Shutdown) -> Done:
        try:
            await trio.Event().wait()
        finally:
            log.append("stopped")
        return Done()

    service.on_request(Shutdown, sleep)
    return service


async def test_a_deadline_ends_both_sides_of_a_request(autojump_clock: trio.testing.MockClock) -> None:
    log: list[str] = []
    async with linked(guest=sleeper(log)) as (host, guest):
        before = trio.current_time()
        with pytest.raises(RpcError, match="within 3 s") as failure:
            await host.request(Shutdown(), timeout=3)
        assert failure.value.code is ErrorCode.TIMEOUT
        assert trio.current_time() - before == pytest.approx(3)
        await trio.testing.wait_all_tasks_blocked()
        assert log == ["stopped"]
        assert guest._serving.idle


async def test_cancelling_a_request_stops_its_handler(autojump_clock: trio.testing.MockClock) -> None:
    log: list[str] = []
    async with linked(guest=sleeper(log)) as (host, guest):
        with trio.move_on_after(2):
            await host.request(Shutdown(), timeout=None)
        await trio.testing.wait_all_tasks_blocked()
        assert log == ["stopped"]
        assert guest._serving.idle
        assert not host._asking


async def test_notices_arrive_in_order_and_a_failing_handler_stops_nothing(
    caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    service, heard = Service(), []

    async def hear(notice: Event) -> None:
        await trio.sleep(0.01)
        heard.append(notice.time)
        if notice.time == 3:
            raise ValueError("three")

    service.on_notice(Event, hear)
    async with linked(guest=service) as (host, _):
        for number in range(500):
            await host.notify(Event(number, "k", "m"))
        await host.notify(Listeners(True, [Listener(Proto.TCP, "::", 80)]))  # nobody cares
        await trio.sleep(10)
        assert heard == list(range(500))
        assert "link.notice-failed" in caplog.text


async def test_too_many_requests_at_a_time(autojump_clock: trio.testing.MockClock) -> None:
    async with linked(guest=sleeper([])) as (host, _):
        async with trio.open_nursery() as nursery:
            for _ in range(MAX_REQUESTS):
                nursery.start_soon(host.request, Shutdown())
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(RpcError) as failure:
                await host.request(Shutdown())
            assert failure.value.code is ErrorCode.LIMIT
            nursery.cancel_scope.cancel()


# --- streams ---------------------------------------------------------------------------------------


async def read_to_the_end(stream: trio.abc.ReceiveStream) -> None:
    async for _ in stream:
        pass


async def echo(target: DialTcp, incoming: Incoming) -> None:
    stream = await incoming.accept()
    async for data in stream:
        await stream.send_all(data)
    await stream.send_eof()


def dialling(handler: Callable[[DialTcp, Incoming], Any] = echo) -> Service:
    service = Service()
    service.on_stream(DialTcp, handler)
    return service


async def test_many_streams_with_more_data_than_their_windows(autojump_clock: trio.testing.MockClock) -> None:
    async with linked(guest=dialling()) as (host, guest):

        async def talk(number: int) -> None:
            stream = await host.open(DialTcp("::1", number))
            data = bytes([number]) * (3 * INITIAL_WINDOW + number)
            received = bytearray()
            async with trio.open_nursery() as nursery:

                async def send() -> None:
                    await stream.send_all(data)
                    await stream.send_eof()

                nursery.start_soon(send)
                async for chunk in stream:
                    received += chunk
            assert received == data
            await stream.aclose()

        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(talk, number)
        await trio.testing.wait_all_tasks_blocked()
        assert not host._streams
        assert not guest._streams


async def test_a_slow_reader_slows_its_writer_and_nobody_else(autojump_clock: trio.testing.MockClock) -> None:
    streams = []

    async def stall(target: DialTcp, incoming: Incoming) -> None:
        if target.port == 1:
            streams.append(await incoming.accept())
            await trio.sleep_forever()
        await echo(target, incoming)

    async with linked(guest=dialling(stall)) as (host, _):
        stuck, lively = await host.open(DialTcp("", 1)), await host.open(DialTcp("", 2))
        sent = 0
        with trio.move_on_after(1):
            while True:
                await stuck.send_all(bytes(1024))
                sent += 1024
        assert sent == INITIAL_WINDOW
        await lively.send_all(b"ping")
        assert await lively.receive_some() == b"ping"
        received = 0
        while received < INITIAL_WINDOW // 2:  # then there is credit again
            received += len(await streams[0].receive_some())
        await stuck.send_all(b"goes on")


async def test_refusals(autojump_clock: trio.testing.MockClock) -> None:
    async def refuse(target: DialTcp, incoming: Incoming) -> None:
        match target.port:
            case 1:
                await incoming.refuse(ErrorCode.REFUSED, "nobody listens", "start it")
            case 2:
                raise OpenRefused(ErrorCode.UNREACHABLE, "no route")
            case 3:
                raise ValueError("a bug")

    async with linked(guest=dialling(refuse)) as (host, guest):
        for port, code, message in [
            (1, ErrorCode.REFUSED, "nobody listens"),
            (2, ErrorCode.UNREACHABLE, "no route"),
            (3, ErrorCode.INTERNAL, "tcp failed: ValueError: a bug"),
            (4, ErrorCode.CANCELLED, "the handler of tcp is done with it"),
        ]:
            with pytest.raises(OpenRefused) as refused:
                await host.open(DialTcp("", port))
            assert (refused.value.code, refused.value.message) == (code, message)
        with pytest.raises(OpenRefused) as refused:
            await host.open(DialUnix("/run/docker.sock"))
        assert refused.value.code is ErrorCode.UNSUPPORTED
        assert not host._opening
        assert guest._serving.idle
        await until(lambda: not guest._streams)  # once it has heard that nothing more comes


@pytest.mark.parametrize("by", ["timeout", "cancel"])
async def test_an_open_that_is_given_up_stops_its_handler(
    by: str, autojump_clock: trio.testing.MockClock
) -> None:
    log = []

    async def dawdle(target: DialTcp, incoming: Incoming) -> None:
        try:
            await trio.sleep_forever()
        finally:
            log.append("stopped")

    async with linked(guest=dialling(dawdle)) as (host, guest):
        if by == "timeout":
            with pytest.raises(OpenRefused) as refused:
                await host.open(DialTcp("", 1), timeout=2)
            assert refused.value.code is ErrorCode.TIMEOUT
        else:
            with trio.move_on_after(2):
                await host.open(DialTcp("", 1), timeout=None)
        await trio.testing.wait_all_tasks_blocked()
        assert log == ["stopped"]
        assert guest._serving.idle
        assert not guest._streams
        assert not host._running().knows(2)


async def test_what_a_handler_leaves_open_is_cut(autojump_clock: trio.testing.MockClock) -> None:
    async def leave(target: DialTcp, incoming: Incoming) -> None:
        await (await incoming.accept()).send_all(b"bye")

    async with linked(guest=dialling(leave)) as (host, _):
        stream = await host.open(DialTcp("", 1))
        with pytest.raises(trio.BrokenResourceError) as broken:
            await read_to_the_end(stream)
        assert isinstance(broken.value.__cause__, StreamReset)


async def test_an_offer_is_answered_once(autojump_clock: trio.testing.MockClock) -> None:
    async def twice(target: DialTcp, incoming: Incoming) -> None:
        stream = await incoming.accept()
        with pytest.raises(LocalProtocolError):
            await incoming.accept()
        with pytest.raises(LocalProtocolError):
            await incoming.refuse(ErrorCode.REFUSED, "")
        await stream.send_eof()
        assert await stream.receive_some() == b""

    async with linked(guest=dialling(twice)) as (host, _):
        stream = await host.open(DialTcp("", 1))
        await stream.send_eof()
        assert await stream.receive_some() == b""


async def test_our_streams_are_limited(autojump_clock: trio.testing.MockClock) -> None:
    async with linked(guest=dialling()) as (host, _):
        for _ in range(MAX_STREAMS):
            await host.open(DialTcp("", 1))
        with pytest.raises(OpenRefused) as refused:
            await host.open(DialTcp("", 1))
        assert refused.value.code is ErrorCode.LIMIT


# --- the end ---------------------------------------------------------------------------------------


async def expect_link_error(call: Callable[[], Any], message: str) -> None:
    with pytest.raises((LinkError, trio.BrokenResourceError), match=message) as caught:
        await call()
    assert isinstance(caught.value, LinkError) or isinstance(caught.value.__cause__, LinkError)


async def test_the_end_fails_everything_that_waits(autojump_clock: trio.testing.MockClock) -> None:
    async def accept(target: DialTcp, incoming: Incoming) -> None:
        if target.port == 1:
            await incoming.accept()
        await trio.sleep_forever()

    guest_service = sleeper([])
    guest_service.on_stream(DialTcp, accept)
    async with linked(guest=guest_service) as (host, guest):
        stream = await host.open(DialTcp("", 1))
        async with trio.open_nursery() as nursery:
            for call in (
                lambda: host.request(Shutdown()),
                lambda: host.open(DialTcp("", 2)),
                stream.receive_some,
                lambda: stream.send_all(bytes(2 * INITIAL_WINDOW)),
            ):
                nursery.start_soon(expect_link_error, call, "maintenance")
            await trio.testing.wait_all_tasks_blocked()
            await guest.goodbye("maintenance")
        for call in (lambda: host.request(Shutdown()), lambda: host.open(DialTcp("", 2)), host.goodbye):
            await expect_link_error(call, "maintenance")
        await expect_link_error(lambda: guest.notify(Event(0, "", "")), "maintenance")


async def test_handlers_end_with_the_link(autojump_clock: trio.testing.MockClock) -> None:
    log: list[str] = []
    async with linked(guest=sleeper(log)) as (host, _):
        with trio.move_on_after(1):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(expect_link_error, lambda: host.request(Shutdown()), "enough")
                await trio.testing.wait_all_tasks_blocked()
                await host.goodbye("enough")
    assert log == ["stopped"]


async def test_a_cancelled_link_still_says_goodbye(autojump_clock: trio.testing.MockClock) -> None:
    peer = Puppet()
    async with trio.open_nursery() as nursery:
        await peer.say(Hello())
        await nursery.start(peer.run)
        nursery.cancel_scope.cancel()
    assert [type(frame) for frame in await peer.hear_out()] == [Hello, messages.Goodbye]


async def test_the_end_of_the_transport_between_frames_is_in_good_order(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with puppet() as peer:
        await peer.stream.aclose()
    assert peer.error is None


async def test_the_end_of_the_transport_within_a_frame_is_not(autojump_clock: trio.testing.MockClock) -> None:
    async with puppet() as peer:
        await peer.stream.send_all(b"\0\0")
        await peer.stream.aclose()
    assert isinstance(peer.error, RemoteProtocolError)


async def test_a_transport_that_breaks(autojump_clock: trio.testing.MockClock) -> None:
    async with puppet() as peer:
        peer.stream.receive_stream.close()
        await peer.link.notify(Event(0, "", ""))
    assert peer.error is not None
    assert not isinstance(peer.error, LinkClosed)
    assert isinstance(peer.error.__cause__, trio.BrokenResourceError)


async def test_a_reason_that_is_still_to_be_read_when_a_write_fails(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with puppet() as peer:
        peer.stream.receive_stream.close()
        await peer.link.notify(Event(0, "", ""))
        await trio.testing.wait_all_tasks_blocked()  # the write has failed
        await peer.say(messages.Goodbye("limit", "too much of you"))
    assert peer.error is not None
    assert (peer.error.code, str(peer.error)) == (ErrorCode.LIMIT, "too much of you")


async def test_the_transport_ends_before_hello(autojump_clock: trio.testing.MockClock) -> None:
    peer = Puppet()
    await peer.stream.aclose()
    async with trio.open_nursery() as nursery:
        with pytest.raises(LinkError):
            await nursery.start(peer.link.run)


async def test_a_link_runs_once_and_not_before(autojump_clock: trio.testing.MockClock) -> None:
    peer = Puppet()
    with pytest.raises(LocalProtocolError):
        await peer.link.request(Shutdown())
    async with puppet() as peer:
        with pytest.raises(LocalProtocolError):
            await peer.link.run()
        await peer.stream.aclose()


# --- bad peers -------------------------------------------------------------------------------------


async def test_another_version_is_refused_on_both_sides(autojump_clock: trio.testing.MockClock) -> None:
    one, other = trio.testing.memory_stream_pair()
    errors = []

    async def run(link: Link) -> None:
        with pytest.raises(LinkError, match="version") as caught:
            await link.run()
        errors.append(caught.value.code)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run, Link(one, Role.HOST, Service(), Hello()))
        nursery.start_soon(run, Link(other, Role.GUEST, Service(), Hello(major=PROTOCOL_MAJOR + 1)))
    assert errors == [ErrorCode.VERSION] * 2


@pytest.mark.parametrize("reads", [True, False])
async def test_a_silent_peer_costs_ten_seconds(reads: bool, autojump_clock: trio.testing.MockClock) -> None:
    # In lockstep, a write waits for its reader.
    pair = trio.testing.memory_stream_pair if reads else trio.testing.lockstep_stream_pair
    one, other = pair()
    link = Link(one, Role.HOST, Service(), Hello())
    before = trio.current_time()
    with pytest.raises(LinkError) as caught:
        await link.run()
    assert caught.value.code is ErrorCode.TIMEOUT
    assert 10 <= trio.current_time() - before <= 12
    with pytest.raises(trio.BrokenResourceError):
        await other.send_all(b"x")


async def test_a_peer_that_stops_answering_is_taken_for_dead(autojump_clock: trio.testing.MockClock) -> None:
    async with puppet() as peer:
        before = trio.current_time()
        frames = await peer.hear_out()
    assert [type(frame) for frame in frames] == [messages.Ping, messages.Goodbye]
    assert trio.current_time() - before == pytest.approx(20)
    assert peer.error is not None
    assert peer.error.code is ErrorCode.TIMEOUT


async def test_a_peer_that_never_reads_does_not_hang_anybody(autojump_clock: trio.testing.MockClock) -> None:
    ours, theirs = trio.testing.lockstep_stream_pair()
    link = Link(ours, Role.HOST, Service(), Hello())
    theirs_said = b"".join(messages.encode(Hello()))

    async def run(task_status: trio.TaskStatus[Link] = trio.TASK_STATUS_IGNORED) -> None:
        with pytest.raises(LinkError) as caught:
            await link.run(task_status)
        assert caught.value.code is ErrorCode.TIMEOUT

    async with trio.open_nursery() as nursery:
        nursery.start_soon(theirs.send_all, theirs_said)
        await nursery.start(run)
        for _ in range(3):
            nursery.start_soon(expect_link_error, lambda: link.request(GetStatus(), timeout=None), "no sign")
        queued: list[int] = []

        async def keep_notifying() -> None:
            while True:
                await link.notify(Event(0, "k", "x" * 10_000))
                queued.append(10_000)

        with pytest.raises(LinkError):
            await keep_notifying()
        assert sum(queued) < 1024 * 1024


@pytest.mark.parametrize(
    "garbage",
    [
        bytes(8),
        b"\xff" * 8,
        b"\0\0\0\1\0\0\0\0\xc1",
        b"".join(messages.encode(Hello())),
        b"".join(messages.encode(messages.Data(99, b"x"))),
        b"".join(messages.encode(messages.Reply(2, []))),
        b"".join(messages.encode(messages.Notify("event", ["no time"]))),
    ],
)
async def test_a_malformed_peer_costs_the_link_and_is_told(
    garbage: bytes, autojump_clock: trio.testing.MockClock
) -> None:
    async def hear(notice: Event) -> None:
        raise AssertionError

    async with puppet(lambda peer: peer.service.on_notice(Event, hear)) as peer:
        await peer.stream.send_all(garbage)
        (goodbye,) = await peer.hear_out()
    assert isinstance(goodbye, messages.Goodbye)
    assert goodbye.code == "protocol"
    assert isinstance(peer.error, RemoteProtocolError)


async def test_a_peer_that_ignores_the_window(autojump_clock: trio.testing.MockClock) -> None:
    accepted = []

    async def accept(target: DialTcp, incoming: Incoming) -> None:
        accepted.append(await incoming.accept())
        await trio.sleep_forever()

    async with puppet(lambda peer: peer.service.on_stream(DialTcp, accept)) as peer:
        await peer.say(messages.Open(1, "tcp", ["::1", 80], 100))
        assert await peer.hear() == messages.Opened(1, INITIAL_WINDOW)
        for _ in range(INITIAL_WINDOW // 32768 + 1):
            await peer.say(messages.Data(1, bytes(32768)))
        await peer.hear_out()
    assert isinstance(peer.error, RemoteProtocolError)
    with pytest.raises(trio.BrokenResourceError):
        await accepted[0].receive_some()


async def test_a_flood_of_requests(autojump_clock: trio.testing.MockClock) -> None:
    log: list[str] = []

    async with puppet(lambda peer: setattr(peer.link, "_service", sleeper(log))) as peer:
        requests = [messages.Request(1 + 2 * index, "shutdown", []) for index in range(MAX_REQUESTS + 5)]
        await peer.say(*requests)
        for request in requests[MAX_REQUESTS:]:
            answer = await peer.hear()
            assert isinstance(answer, messages.Failure)
            assert (answer.id, answer.code) == (request.id, "limit")
        await peer.stream.aclose()
    assert len(log) == MAX_REQUESTS


async def test_a_reply_of_the_wrong_shape_fails_only_its_request(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with puppet() as peer:
        async with trio.open_nursery() as nursery:

            async def ask() -> None:
                with pytest.raises(RpcError, match="GuestInfo") as failure:
                    await peer.link.request(GetGuestInfo())
                assert failure.value.code is ErrorCode.PROTOCOL

            nursery.start_soon(ask)
            request = await peer.hear()
            assert isinstance(request, messages.Request)
            await peer.say(messages.Reply(request.id, [1]))
        await peer.stream.aclose()
    assert peer.error is None


async def test_a_request_of_the_wrong_shape_fails_only_itself(autojump_clock: trio.testing.MockClock) -> None:
    async with puppet(lambda peer: setattr(peer.link, "_service", sleeper([]))) as peer:
        await peer.say(
            messages.Request(1, "shutdown", {"no": "array"}), messages.Request(3, "unheard-of", [])
        )
        codes = [(await peer.hear()).code for _ in range(2)]  # type: ignore[union-attr]
        assert codes == ["invalid", "unsupported"]
        await peer.stream.aclose()
    assert peer.error is None


# --- over a descriptor -----------------------------------------------------------------------------
#
# Then frames are read on the lane, without a turn of trio's; nothing else may be different.


def socket_ports() -> tuple[SocketPort, SocketPort]:
    one, other = socket.socketpair()
    one.setblocking(False)
    other.setblocking(False)
    ports = [SocketPort(trio.SocketStream(trio.socket.from_stdlib_socket(end))) for end in (one, other)]
    return ports[0], ports[1]


async def transports(kind: str) -> tuple[trio.abc.Stream, trio.abc.Stream, list[trio.abc.Stream]]:
    """Both ends, and what is to be closed besides."""
    if kind == "memory":
        return *trio.testing.memory_stream_pair(), []
    ports = socket_ports()
    if kind == "socket":
        return *ports, []
    channels = [SerialChannel(port) for port in ports]
    sessions: dict[SerialChannel, trio.abc.Stream] = {}

    async def establish(channel: SerialChannel) -> None:
        sessions[channel] = await channel.establish()

    async with trio.open_nursery() as nursery:
        for channel in channels:
            nursery.start_soon(establish, channel)
    return sessions[channels[0]], sessions[channels[1]], list(ports)


class Wired(Puppet):
    """A link over a transport of some kind, and the puppet at its other end."""

    pipe: trio.abc.Stream
    """What is below the puppet's stream."""

    def __init__(self, ours: trio.abc.Stream, theirs: trio.abc.Stream, **options: Any) -> None:
        self.stream = theirs  # type: ignore[assignment]
        self.service = Service()
        self.link = Link(ours, Role.HOST, self.service, Hello(name="host"), **options)
        self.error = None
        self._decoder = FrameDecoder()
        self.scope = trio.CancelScope()
        self.over = trio.Event()

    async def run(self, task_status: trio.TaskStatus[Link] = trio.TASK_STATUS_IGNORED) -> None:
        with self.scope:
            await super().run(task_status)
        self.over.set()

    async def hear_goodbye(self) -> messages.Goodbye:
        while not isinstance(frame := await self.hear(), messages.Goodbye):
            pass
        return frame


@asynccontextmanager
async def wired(
    kind: str, prepare: Callable[[Wired], None] = lambda peer: None, **options: Any
) -> AsyncIterator[Wired]:
    """A link that has been greeted. In the end it is over, and no descriptor is left."""
    before = set(os.listdir("/dev/fd"))
    ours, theirs, besides = await transports(kind)
    peer = Wired(ours, theirs, **options)
    peer.pipe = besides[1] if besides else theirs
    prepare(peer)
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            await peer.say(Hello(name="puppet"))
            await nursery.start(peer.run)
            assert await peer.hear() == Hello(name="host")
            await trio.testing.wait_all_tasks_blocked(0.01)
            yield peer
            peer.scope.cancel()
            await peer.over.wait()
        for stream in (theirs, *besides):
            await trio.aclose_forcefully(stream)
    assert peer.link.lane._closed
    assert not set(os.listdir("/dev/fd")) - before


KINDS = pytest.mark.parametrize("kind", ["memory", "socket", "serial"])
OVER_A_DESCRIPTOR = pytest.mark.parametrize("kind", ["socket", "serial"])


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await trio.sleep(0.001)


@KINDS
async def test_notices_come_in_order_and_one_at_a_time_over(kind: str) -> None:
    heard: list[float] = []

    async def hear(notice: Event) -> None:
        await trio.lowlevel.checkpoint()
        heard.append(notice.time)
        if notice.time % 7 == 0:
            await trio.lowlevel.checkpoint()

    async with wired(kind, lambda peer: peer.service.on_notice(Event, hear)) as peer:
        for first in range(0, 2000, 100):
            await peer.say(*[notice(number) for number in range(first, first + 100)])
        await until(lambda: len(heard) >= 2000)
        assert heard == list(range(2000))


def notice(number: int, size: int = 1) -> messages.Notify:
    return messages.Notify("event", [float(number), "k", "x" * size])


@KINDS
async def test_a_handler_of_notices_that_is_slow_holds_the_peer_back_over(kind: str) -> None:
    """No more is read than the limit says, with what one read or two brought."""
    going, heard = trio.Event(), []

    async def hear(notice: Event) -> None:
        await going.wait()
        heard.append(notice.time)

    async with wired(kind, lambda peer: peer.service.on_notice(Event, hear)) as peer:
        async with trio.open_nursery() as nursery:

            async def talk() -> None:
                for first in range(0, 5000, 50):
                    await peer.say(*[notice(number, 1000) for number in range(first, first + 50)])

            nursery.start_soon(talk)
            await trio.testing.wait_all_tasks_blocked(0.02)
            if kind != "memory":  # there a read is as much as was ever written
                assert len(peer.link._serving._notices) <= MAX_NOTICES + 3 * 131
            going.set()
            await until(lambda: len(heard) == 5000)
        assert heard == list(range(5000))


@KINDS
async def test_much_that_comes_at_once_is_all_heard_over(kind: str) -> None:
    """More than one read, and then silence: nothing waits for what comes next."""
    heard: list[float] = []

    async def hear(notice: Event) -> None:
        heard.append(notice.time)

    async with wired(kind, lambda peer: peer.service.on_notice(Event, hear)) as peer:
        for count in (1, 50, 150, 2000):
            heard.clear()
            await peer.say(*[notice(number, 1000) for number in range(count)])
            await until(lambda: len(heard) == count)  # noqa: B023  (not used later)


async def test_what_came_with_the_session_is_all_heard() -> None:
    """A peer that says much before it is answered, as after a restart: one read of the session does not hold it."""
    heard: list[float] = []

    async def hear(notice: Event) -> None:
        heard.append(notice.time)

    ours, theirs, ports = await transports("serial")
    peer = Wired(ours, theirs)
    peer.service.on_notice(Event, hear)
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(peer.say, Hello(), *[notice(number, 1000) for number in range(180)])
            await trio.testing.wait_all_tasks_blocked(0.01)
            await nursery.start(peer.run)
            await until(lambda: len(heard) == 180)
            peer.scope.cancel()
    for port in ports:
        await trio.aclose_forcefully(port)


@KINDS
async def test_nothing_is_read_while_the_peer_does_not_read_over(kind: str) -> None:
    """Whoever has ``pause_above`` does not end the link of a peer that is slow, and does not collect answers either."""
    taken = 0

    async def answer(message: GetGuestInfo) -> GuestInfo:
        nonlocal taken
        taken += 1
        return GuestInfo("x" * 5000, 1, 1, 1, 1, 1, 1, "")

    async with wired(
        kind,
        lambda peer: peer.service.on_request(GetGuestInfo, answer),
        pause_above=20_000,
        max_backlog=1 << 20,
    ) as peer:
        async with trio.open_nursery() as nursery:

            async def ask() -> None:
                for number in range(1, 2000, 2):
                    await peer.say(messages.Request(number, GetGuestInfo.METHOD, []))
                    await trio.lowlevel.checkpoint()

            nursery.start_soon(ask)
            if kind != "memory":  # which takes everything
                await trio.testing.wait_all_tasks_blocked(0.05)
                assert taken < 1000
                assert peer.link.backlog < 1 << 20
            answers = [await peer.hear() for _ in range(1000)]
        assert {type(frame) for frame in answers} <= {messages.Reply, messages.Failure}
        assert sorted(frame.id for frame in answers) == list(range(1, 2000, 2))  # type: ignore[union-attr]
        assert peer.link._error is None


@KINDS
async def test_a_stream_there_and_back_over(kind: str) -> None:
    streams: list[MuxStream] = []
    async with wired(kind) as peer:
        async with trio.open_nursery() as nursery:

            async def dial() -> None:
                streams.append(await peer.link.open(DialTcp("", 1)))

            nursery.start_soon(dial)
            opening = await peer.hear()
            assert isinstance(opening, messages.Open)
            await peer.say(messages.Opened(opening.stream, INITIAL_WINDOW))
        (stream,) = streams
        for size in (1, 10, 1000, 60_000):
            await peer.say(messages.Data(opening.stream, bytes(size)))
            received = 0
            while received < size:
                received += len(await stream.receive_some())
            await stream.send_all(bytes(size))
            frame = await peer.hear()
            while isinstance(frame, messages.Credit):
                frame = await peer.hear()
            assert frame == messages.Data(opening.stream, bytes(size))
        # All of it in one read.
        await peer.say(
            messages.Data(opening.stream, b"last "),
            messages.Data(opening.stream, b"words"),
            messages.Eof(opening.stream),
            messages.Reset(opening.stream, "reset", ""),
        )
        assert await stream.receive_some() + await stream.receive_some() == b"last words"
        assert await stream.receive_some() == b""
        with pytest.raises(trio.BrokenResourceError):
            await stream.send_all(b"x")


@pytest.mark.parametrize(
    "first",
    [
        messages.Open(1, "tcp", ["::1", 1], 100),
        messages.Open(1, "tcp", "not what it takes", 100),
        messages.Open(1, "unheard-of", [], 100),
        messages.Request(1, "unheard-of", []),
        messages.Request(1, "shutdown", []),
        notice(1),
        messages.Ping(1),
    ],
)
@pytest.mark.parametrize("at_once", [True, False])
@KINDS
async def test_what_is_taken_back_in_the_same_read_over(
    kind: str, at_once: bool, first: messages.AnyFrame
) -> None:
    """A session knows of the end before the link hears of the beginning."""
    log: list[str] = []

    def prepare(peer: Wired) -> None:
        service = peer.link._service = sleeper(log)

        async def accept(target: DialTcp, incoming: Incoming) -> None:
            await incoming.accept()
            await trio.sleep_forever()

        service.on_stream(
            DialTcp, accept, (lambda _, incoming: bool(incoming.accept_now())) if at_once else None
        )

    if isinstance(first, messages.Open):
        async with wired(kind, prepare) as peer:
            await peer.say(first, messages.Reset(1, "cancelled", ""))
            assert await peer.hear() == messages.Reset(1, "reset", "")
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert peer.link._serving.idle
            assert not peer.link._streams
            await peer.say(messages.Ping(5))
            assert await peer.hear() == messages.Pong(5)
    async with wired(kind, prepare) as peer:
        await peer.say(first, messages.Goodbye("gone", "that was all"))
        await peer.over.wait()
        assert peer.error is None


@KINDS
async def test_the_end_in_good_order_over(kind: str) -> None:
    async with wired(kind) as peer:
        await peer.say(messages.Goodbye("gone", "maintenance"))
        await peer.over.wait()
        assert peer.error is None
        await expect_link_error(lambda: peer.link.request(GetStatus()), "maintenance")
    async with wired(kind) as peer:
        await peer.link.goodbye("enough")
        assert (await peer.hear_goodbye()).reason == "enough"
        await peer.over.wait()
        assert peer.error is None


@KINDS
async def test_a_cancelled_link_says_goodbye_over(kind: str) -> None:
    async with wired(kind) as peer:
        peer.scope.cancel()
        assert (await peer.hear_goodbye()).code == "gone"


@KINDS
@pytest.mark.parametrize(
    "garbage", [bytes(8), b"\xff" * 8, b"".join(messages.encode(messages.Data(99, b"x")))]
)
async def test_a_malformed_peer_is_told_over(kind: str, garbage: bytes) -> None:
    async with wired(kind) as peer:
        await peer.stream.send_all(garbage)
        assert (await peer.hear_goodbye()).code == "protocol"
        await peer.over.wait()
        assert isinstance(peer.error, RemoteProtocolError)


@OVER_A_DESCRIPTOR
@pytest.mark.parametrize("last", [b"", bytes(2), b"".join(messages.encode(messages.Ping(1)))])
async def test_the_end_of_a_port_is_an_error_that_everybody_hears_of(kind: str, last: bytes) -> None:
    """A port has no end of file: when its socket has one, it is gone."""
    async with wired(kind) as peer:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(expect_link_error, lambda: peer.link.request(GetStatus()), "socket")
            assert isinstance(await peer.hear(), messages.Request)
            if last:
                await peer.stream.send_all(last)
            await trio.aclose_forcefully(peer.pipe)
        await peer.over.wait()
        assert peer.error is not None
        assert not isinstance(peer.error, LinkClosed)


async def test_a_peer_that_begins_anew_ends_the_session_that_was() -> None:
    async with wired("serial") as peer:
        channel = peer.stream._channel  # type: ignore[attr-defined]
        await peer.say(messages.Ping(1))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(channel.establish)
            await peer.over.wait()
            nursery.cancel_scope.cancel()
        assert peer.error is not None
        assert "new session" in str(peer.error)


async def test_a_lane_that_is_shared_outlives_its_links() -> None:
    lane = Lane()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lane.run)
        for _ in range(3):
            ours, theirs = socket_ports()
            peer = Wired(ours, theirs, lane=lane)
            async with trio.open_nursery() as running:
                await peer.say(Hello())
                await running.start(peer.run)
                await peer.hear()
                await trio.testing.wait_all_tasks_blocked(0.01)
                assert set(lane._watched) == {ours.fileno()}
                await peer.say(messages.Ping(1))
                assert await peer.hear() == messages.Pong(1)
                peer.scope.cancel()
            assert not lane._watched
            assert not lane._closed
            await trio.aclose_forcefully(theirs)
        nursery.cancel_scope.cancel()
    lane.close()


class Torrent(trio.abc.Stream):
    """A transport that always has one more frame; ``answers`` go before it. Notes what is said."""

    MOST = 20_000
    """Reads without a turn of the test's, which takes two milliseconds at the most: a fraction of this."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end  # always readable
        self.flow = b""
        self.answers = [b"".join(messages.encode(Hello()))]
        self._said = FrameDecoder()
        self.said: list[messages.AnyFrame] = []
        self.reads = 0
        self.starved = False
        self.rests = False  # for one read, so that it is somebody else's turn to read

    def fileno(self) -> int:
        return self._end.fileno()

    def receive_nowait(self) -> bytes | None:
        self.reads += 1
        self.starved |= self.reads > self.MOST
        if self.starved or self.rests:
            self.rests = False
            return None
        return self.answers.pop(0) if self.answers else self.flow or None

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        while not (data := self.receive_nowait()):
            await trio.lowlevel.checkpoint()
        return data

    def send_nowait(self, data: bytes | bytearray | memoryview) -> bool:
        self._said.receive_data(data)
        while (raw := self._said.next_frame()) is not None:
            self.said.append(messages.decode(raw))
        return True

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.lowlevel.checkpoint()
        self.send_nowait(data)

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()

    async def turns(self, condition: Callable[[], object]) -> int:
        """How many turns of trio's it takes until this holds."""
        for count in range(200):
            self.reads = 0
            if condition():
                return count
            await trio.lowlevel.checkpoint()
        raise AssertionError("200 turns are not enough")

    def heard(self, kind: type[messages.AnyFrame]) -> bool:
        return any(isinstance(frame, kind) for frame in self.said)


@pytest.mark.parametrize("flow", ["data", "credit"])
async def test_nobody_starves_beside_a_stream_that_never_rests(
    flow: str, mock_clock: trio.testing.MockClock
) -> None:
    one, other = socket.socketpair()
    with one, other:
        one.setblocking(False)
        other.send(b"x")
        torrent = Torrent(one)
        link = Link(torrent, Role.HOST, Service(), Hello())
        async with trio.open_nursery() as nursery:
            await nursery.start(link.run)
            answer: list[MuxStream] = []
            done: list[Done] = []

            def opened(stream: object) -> None:
                assert isinstance(stream, MuxStream)
                answer.append(stream)

                def drop() -> None:
                    while (view := stream.peek()) is not None:
                        stream.advance(len(view))

                stream.on_readable = drop

            assert link.open_now(DialTcp("", 1), opened)
            torrent.answers.append(b"".join(messages.encode(messages.Opened(2, INITIAL_WINDOW))))
            await torrent.turns(lambda: answer)
            frame = messages.Data(2, b"x" * 4000) if flow == "data" else messages.Credit(2, 1)
            torrent.flow = b"".join(messages.encode(frame))
            for rest in [*[False] * 50, *[True, False] * 25]:
                torrent.reads, torrent.rests = 0, rest
                await trio.lowlevel.checkpoint()
                assert not torrent.starved
            mock_clock.jump(5)
            await torrent.turns(lambda: torrent.heard(messages.Ping))
            torrent.answers.append(b"".join(messages.encode(messages.Pong(1))))

            async def ask() -> None:
                done.append(await link.request(Shutdown()))

            nursery.start_soon(ask)
            await torrent.turns(lambda: torrent.heard(messages.Request))
            request = next(frame for frame in torrent.said if isinstance(frame, messages.Request))
            torrent.answers.append(b"".join(messages.encode(messages.Reply(request.id, []))))
            await torrent.turns(lambda: done)
            assert done == [Done()]
            if flow == "data":
                assert torrent.heard(messages.Credit)
            nursery.start_soon(link.goodbye)
            await torrent.turns(link._gone.is_set)
            assert torrent.heard(messages.Goodbye)
        assert not torrent.starved


async def test_first_words_that_have_to_be_queued_before_the_answer_arrive() -> None:
    heard: list[bytes] = []

    async def listen(target: DialTcp, incoming: Incoming) -> None:
        stream = await incoming.accept()
        heard.append(await stream.receive_some())
        await stream.aclose()

    guest = Service()
    guest.on_stream(DialTcp, listen)
    async with linked(guest=guest) as (host, _):
        send_early = host.open_now(DialTcp("127.0.0.1", 1), lambda answer: None)
        assert send_early is not None
        send_early(b"first words")  # over a transport that takes nothing at once
        await trio.testing.wait_all_tasks_blocked()
    assert heard == [b"first words"]
