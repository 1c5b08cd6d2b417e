"""The control link over a fake of QEMU's socket, with a guest's end of the real protocol behind it."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import pytest
import trio
import trio.lowlevel
import trio.testing

import protocol.link
from host_agent import guest_link
from host_agent.client import hello
from host_agent.guest_link import GuestLink
from host_agent.paths import InstancePaths
from protocol.api import Configure, Configured, DialTcp, Listeners
from protocol.errors import ErrorCode, LinkError, OpenRefused, RpcError
from protocol.lane import Lane
from protocol.link import Incoming, Link, MuxStream, Role, SerialChannel, Service
from protocol.stream import EARLY

CONFIGURE = Configure("agentctl", 1, "me", 1000)


async def until(condition: Callable[[], object]) -> None:
    with trio.fail_after(10):
        while not condition():
            await trio.sleep(0.005)


class Qemu:
    """A port's socket: one connection, which is the port; its guest side is ``channel``."""

    def __init__(self, listener: trio.SocketListener) -> None:
        self._listener = listener

    async def accept(self) -> SerialChannel:
        return SerialChannel(await self._listener.accept())


@asynccontextmanager
async def qemu(paths: InstancePaths) -> AsyncIterator[Qemu]:
    path = str(paths.control_socket)
    sock = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
    await sock.bind(path)
    sock.listen(1)
    async with trio.SocketListener(sock) as listener:
        yield Qemu(listener)
    os.unlink(path)


@dataclass
class Host:
    link: GuestLink
    diary: list[str] = field(default_factory=list)


@asynccontextmanager
async def hosting(paths: InstancePaths) -> AsyncIterator[Host]:
    diary: list[str] = []

    async def on_up(link: Link) -> None:
        assert host.link.current is None, "nobody may use a session that is not configured"
        await link.request(CONFIGURE)
        diary.append("up")

    async def on_listeners(notice: Listeners) -> None:
        await trio.lowlevel.checkpoint()
        diary.append(f"{len(notice.added)} listeners")

    def on_down() -> None:
        assert host.link.current is None
        diary.append("down")

    service = Service()
    service.on_notice(Listeners, on_listeners)
    host = Host(GuestLink(paths.control_socket, hello("host"), service, on_up=on_up, on_down=on_down), diary)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(host.link.run)
        yield host
        nursery.cancel_scope.cancel()


def guest_service(diary: list[str], *, refuse: bool = False, hold: bool = False) -> Service:
    async def configure(request: Configure) -> Configured:
        await trio.lowlevel.checkpoint()
        assert request == CONFIGURE
        diary.append("configured")
        if refuse:
            raise RpcError(ErrorCode.INVALID, "no such user")
        return Configured(5)

    async def echo(target: DialTcp, incoming: Incoming) -> None:
        if target.port != 7:
            raise OpenRefused(ErrorCode.REFUSED, "connection refused")
        if hold:
            await trio.sleep_forever()
        stream = await incoming.accept()
        while data := await stream.receive_some():
            await stream.send_all(data)
        await stream.send_eof()

    service = Service()
    service.on_request(Configure, configure)
    service.on_stream(DialTcp, echo)
    return service


@asynccontextmanager
async def guest_agent(channel: SerialChannel, service: Service) -> AsyncIterator[Link]:
    """One life of the guest agent; at its end it is killed, and says nothing."""
    stream = await channel.establish()
    async with trio.open_nursery() as nursery:
        link = Link(stream, Role.GUEST, service, hello("guest"))

        async def run(task_status: trio.TaskStatus[Link]) -> None:
            with suppress(LinkError):
                await link.run(task_status)

        await nursery.start(run)
        yield link
        nursery.cancel_scope.cancel()


async def test_a_session_is_configured_before_anybody_uses_it(instance: InstancePaths) -> None:
    async with qemu(instance) as machine, hosting(instance) as host:
        channel = await machine.accept()
        async with guest_agent(channel, guest_service(host.diary)) as guest:
            stream = await host.link.dial(DialTcp("127.0.0.1", 7))
            assert host.diary == ["configured", "up"]
            assert host.link.current is await host.link.wait()
            await stream.send_all(b"hello")
            assert await stream.receive_some() == b"hello"
            await guest.notify(Listeners(True, []))
            await until(lambda: host.diary[-1] == "0 listeners")
        await until(lambda: host.diary[-1] == "down")
        assert host.link.sessions == 1
        await channel.aclose()


async def test_sessions_come_and_go_on_one_connection(instance: InstancePaths) -> None:
    """The guest agent is killed and started again; QEMU and the port stay."""
    async with qemu(instance) as machine, hosting(instance) as host:
        channel = await machine.accept()
        for number in range(3):
            async with guest_agent(channel, guest_service(host.diary)):
                await until(lambda: host.link.current)
                assert host.link.sessions == number + 1
                stream = await host.link.dial(DialTcp("::1", 7))
                await stream.send_eof()
                assert await stream.receive_some() == b""
        await until(lambda: host.link.current is None)
        assert host.diary == ["configured", "up", "down"] * 3
        await channel.aclose()


async def test_streams_of_a_session_end_with_it(instance: InstancePaths) -> None:
    async with qemu(instance) as machine, hosting(instance) as host:
        channel = await machine.accept()
        async with guest_agent(channel, guest_service(host.diary)):
            stream = await host.link.dial(DialTcp("127.0.0.1", 7))
        await channel.aclose()
        with trio.fail_after(5), pytest.raises(trio.BrokenResourceError):
            await stream.receive_some()


async def test_a_connection_of_a_user_waits_for_the_next_session(instance: InstancePaths) -> None:
    async with qemu(instance) as machine, hosting(instance) as host:
        channel = await machine.accept()
        echoed: list[bytes] = []

        async def connect() -> None:
            stream = await host.link.dial(DialTcp("127.0.0.1", 7))
            await stream.send_all(b"patient")
            echoed.append(await stream.receive_some())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(connect)
            await trio.sleep(0.1)
            assert echoed == []
            async with guest_agent(channel, guest_service(host.diary)):
                await until(lambda: echoed)
        assert echoed == [b"patient"]
        await channel.aclose()


async def test_a_refusal_is_the_guests_own(instance: InstancePaths) -> None:
    async with qemu(instance) as machine, hosting(instance) as host:
        channel = await machine.accept()
        async with guest_agent(channel, guest_service(host.diary)):
            with pytest.raises(OpenRefused, match="connection refused"):
                await host.link.dial(DialTcp("127.0.0.1", 8))
        await channel.aclose()


async def test_qemu_may_be_started_again(instance: InstancePaths) -> None:
    async with hosting(instance) as host:
        for _ in range(2):
            async with qemu(instance) as machine:
                channel = await machine.accept()
                async with guest_agent(channel, guest_service(host.diary)):
                    await until(lambda: host.link.current)
                await channel.aclose()
            await until(lambda: host.link.current is None)
        assert host.diary == ["configured", "up", "down"] * 2


async def test_a_guest_that_refuses_its_configuration_is_not_asked_in_a_busy_loop(
    instance: InstancePaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guest_link, "RECONNECT_DELAY", 0.2)
    async with qemu(instance) as machine, hosting(instance) as host:
        channel = await machine.accept()
        with trio.move_on_after(0.5):
            while True:
                async with guest_agent(channel, guest_service(host.diary, refuse=True)) as guest:
                    await trio.sleep(0.01)
                    with suppress(LinkError):
                        await guest.request(Configure("", 0, "", 0), timeout=None)
        # Never up, so never down.
        assert 1 <= host.diary.count("configured") <= 4
        assert set(host.diary) == {"configured"}
        assert host.link.current is None
        assert host.link.sessions == 0
        await channel.aclose()


async def never_up(link: Link) -> None:
    await trio.lowlevel.checkpoint()
    raise AssertionError("there is nobody to come up")


async def test_patience_has_an_end(instance: InstancePaths, autojump_clock: trio.testing.MockClock) -> None:
    link = GuestLink(
        instance.control_socket,
        hello("host"),
        Service(),
        on_up=never_up,
        on_down=lambda: None,
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(link.run)
        began = trio.current_time()
        with pytest.raises(LinkError, match="has not been reachable for 20 s"):
            await link.dial(DialTcp("127.0.0.1", 80))
        assert trio.current_time() - began == pytest.approx(guest_link.PATIENCE)
        nursery.cancel_scope.cancel()


# --- for who cannot wait ---------------------------------------------------------------------------

ECHO = DialTcp("127.0.0.1", 7)


async def test_a_stream_is_dialled_without_waiting(instance: InstancePaths) -> None:
    answers: list[MuxStream | OpenRefused | LinkError] = []
    async with qemu(instance) as machine, hosting(instance) as host:
        assert not host.link.dial_now(ECHO, answers.append), "there is no session yet"
        channel = await machine.accept()
        async with guest_agent(channel, guest_service(host.diary)):
            await host.link.wait()
            assert host.link.dial_now(ECHO, answers.append)
            assert answers == [], "it is told later"
            await until(lambda: answers)
            (stream,) = answers
            assert isinstance(stream, MuxStream)
            await stream.send_all(b"hello")
            assert await stream.receive_some() == b"hello"
            assert host.link.dial_now(DialTcp("127.0.0.1", 8), answers.append)
            await until(lambda: answers[1:])
            assert isinstance(answers[1], OpenRefused)
            assert answers[1].code is ErrorCode.REFUSED
        await until(lambda: host.diary[-1] == "down")
        assert not host.link.dial_now(ECHO, answers.append)
        assert len(answers) == 2
        await channel.aclose()


async def test_what_is_said_first_goes_before_the_answer(instance: InstancePaths) -> None:
    answers: list[MuxStream | OpenRefused | LinkError] = []
    async with qemu(instance) as machine, hosting(instance) as host:
        channel = await machine.accept()
        async with guest_agent(channel, guest_service(host.diary)):
            await host.link.wait()
            send_early = host.link.dial_now(ECHO, answers.append)
            assert send_early is not None
            send_early(b"hello")
            await until(lambda: answers)
            assert isinstance(answers[0], MuxStream)
            assert await answers[0].receive_some() == b"hello"
            refused = host.link.dial_now(DialTcp("127.0.0.1", 8), answers.append)
            assert refused is not None
            refused(b"x" * EARLY)
            await until(lambda: answers[1:])
            assert isinstance(answers[1], OpenRefused)
            refused(b"too late, and nobody's fault")
            await answers[0].send_all(b"the link lives")
            assert await answers[0].receive_some() == b"the link lives"
        await channel.aclose()


async def test_who_cannot_wait_is_told_that_nobody_answers(
    instance: InstancePaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol.link, "OPEN_TIMEOUT", 0.01)
    answers: list[MuxStream | OpenRefused | LinkError] = []
    async with qemu(instance) as machine, hosting(instance) as host:
        channel = await machine.accept()
        async with guest_agent(channel, guest_service([], hold=True)):
            await host.link.wait()
            for _ in range(3):
                assert host.link.dial_now(ECHO, answers.append)
            await until(lambda: len(answers) == 3)
            for answer in answers:
                assert isinstance(answer, LinkError)
                assert answer.code is ErrorCode.TIMEOUT
        await channel.aclose()


async def test_who_cannot_wait_is_told_that_the_session_has_ended(instance: InstancePaths) -> None:
    answers: list[MuxStream | OpenRefused | LinkError] = []
    async with qemu(instance) as machine, hosting(instance) as host:
        channel = await machine.accept()
        async with guest_agent(channel, guest_service([], hold=True)):
            await host.link.wait()
            for _ in range(3):
                assert host.link.dial_now(ECHO, answers.append)
        await until(lambda: len(answers) == 3)
        assert all(isinstance(answer, LinkError) for answer in answers)
        await channel.aclose()


async def test_sessions_share_a_lane_that_outlives_them(instance: InstancePaths) -> None:
    lane = Lane()

    async def on_up(link: Link) -> None:
        await link.request(CONFIGURE)

    link = GuestLink(
        instance.control_socket, hello("host"), Service(), on_up=on_up, on_down=lambda: None, lane=lane
    )
    async with qemu(instance) as machine, trio.open_nursery() as nursery:
        nursery.start_soon(lane.run)
        nursery.start_soon(link.run)
        channel = await machine.accept()
        for number in range(3):
            async with guest_agent(channel, guest_service([])):
                await until(lambda: link.current)
                assert link.sessions == number + 1
                stream = await link.dial(ECHO)
                assert stream.lane is lane
                await until(lambda: len(lane._watched) == 1)
                await stream.send_all(b"hello")
                assert await stream.receive_some() == b"hello"
            await until(lambda: link.current is None)
        assert not lane._watched
        nursery.cancel_scope.cancel()
        await channel.aclose()
    assert not lane._closed
    lane.close()
