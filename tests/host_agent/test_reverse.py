"""Which connections of the guest reach the host, with a real link; the guest is made up."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio
import trio.testing

from host_agent import reverse
from host_agent.reverse import NOT_ALLOWED, WAITING, ReverseForwards
from host_agent.unix_listening import listen_unix
from protocol.api import (
    DialHost,
    DialName,
    DialTcp,
    DialUdp,
    DialUnix,
    Exec,
    ForwardState,
    HostEntrances,
    OpenHostEntrances,
    SocketForward,
    SocketRow,
    Target,
)
from protocol.errors import ErrorCode, LinkClosed, OpenRefused, RpcError
from protocol.link import Hello, Link, MuxStream, Role, Service
from tests.free_ports import free_port


@dataclass
class Guest:
    """The guest's side: what it was told, and what it says."""

    told: list[list[str]] = field(default_factory=list)
    answer: Callable[[OpenHostEntrances], Awaitable[HostEntrances]] | None = None

    async def on_entrances(self, request: OpenHostEntrances) -> HostEntrances:
        self.told.append(request.paths)
        return await self.answer(request) if self.answer else HostEntrances()


@asynccontextmanager
async def session(
    forwards: ReverseForwards, guest: Guest, *, knows: bool = True, hangs: bool = False
) -> AsyncIterator[Link]:
    """The guest's end of a session, which the host has begun, and told the guest unless that one ``hangs``."""
    host_end, guest_end = trio.testing.memory_stream_pair()
    ours, theirs = Service(), Service()
    forwards.register(ours)
    if knows:
        theirs.on_request(OpenHostEntrances, guest.on_entrances)
    host = Link(host_end, Role.HOST, ours, Hello(name="host"))
    link = Link(guest_end, Role.GUEST, theirs, Hello(name="guest"))
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            async with trio.open_nursery() as starting:
                starting.start_soon(nursery.start, host.run)
                starting.start_soon(nursery.start, link.run)
            async with trio.open_nursery() as telling:
                telling.start_soon(forwards.run)
                told = forwards.link_up(host)
                if not hangs:
                    await told.wait()
                yield link
                telling.cancel_scope.cancel()
            forwards.link_lost()
            with suppress(LinkClosed):
                await host.goodbye()


@asynccontextmanager
async def echoing(listener: trio.SocketListener) -> AsyncIterator[None]:
    async def echo(stream: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError):
            async for data in stream:
                await stream.send_all(data)
            await stream.send_eof()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, echo, [listener])
        yield
        nursery.cancel_scope.cancel()


async def asked_through(stream: MuxStream, question: bytes) -> bytes:
    async with stream:
        await stream.send_all(question)
        await stream.send_eof()
        return b"".join([bytes(data) async for data in stream])


async def refusal(link: Link, name: str) -> OpenRefused:
    with pytest.raises(OpenRefused) as caught:
        await link.open(DialHost(name))
    return caught.value


def reverse_forward(guest: str, host: object) -> SocketForward:
    return SocketForward(guest, str(host), reverse=True)


async def test_the_guest_is_told_where_to_listen() -> None:
    agent, database = (
        reverse_forward("/run/ssh-agent", "/agent"),
        reverse_forward("/run/db", "localhost:5432"),
    )
    forwards, guest = ReverseForwards([agent, database]), Guest()
    assert forwards.row(agent) == SocketRow(agent, ForwardState.PENDING, WAITING)
    async with session(forwards, guest):
        assert guest.told == [["/run/ssh-agent", "/run/db"]]
        assert forwards.row(agent) == SocketRow(agent, ForwardState.LISTENING)
        assert forwards.row(database) == SocketRow(database, ForwardState.LISTENING)
    assert forwards.row(agent).state is ForwardState.PENDING


async def test_the_guest_reaches_a_socket_of_the_host(folder: Path) -> None:
    path = folder / "agent"
    forwards = ReverseForwards([reverse_forward("/g", path)])
    payload = os.urandom(50_000)
    async with echoing(listen_unix(path)), session(forwards, Guest()) as link:
        assert await asked_through(await link.open(DialHost("/g")), payload) == payload


@pytest.mark.parametrize("address", ["localhost", "127.0.0.1"])
async def test_the_guest_reaches_a_port_of_the_host(address: str) -> None:
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    forwards = ReverseForwards([reverse_forward("/g", f"{address}:{listener.socket.getsockname()[1]}")])
    async with echoing(listener), session(forwards, Guest()) as link:
        assert await asked_through(await link.open(DialHost("/g")), b"question") == b"question"


@pytest.mark.parametrize("name", ["/other", "", "127.0.0.1:22", "/host/agent", "\n" * 5000])
async def test_a_guest_that_asks_for_what_no_rule_allows_is_refused(
    folder: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = folder / "agent"
    forwards = ReverseForwards([reverse_forward("/g", path)])
    with caplog.at_level(logging.WARNING):
        async with echoing(listen_unix(path)), session(forwards, Guest()) as link:
            for asked in (name, str(path)):
                refused = await refusal(link, asked)
                assert (refused.code, refused.message) == (ErrorCode.DENIED, NOT_ALLOWED)
            assert await asked_through(await link.open(DialHost("/g")), b"fine") == b"fine"
    assert "to which no rule leads" in caplog.text
    assert max(map(len, caplog.messages)) < 500


@pytest.mark.parametrize(
    "target",
    [
        DialTcp("127.0.0.1", 22),
        DialUnix("/run/docker.sock"),
        DialUdp("127.0.0.1", 53),
        DialName("localhost", 22),
        Exec(["sh"]),
    ],
)
async def test_a_guest_that_asks_of_the_host_what_only_the_host_may_ask_is_refused(
    folder: Path, target: Target
) -> None:
    path = folder / "agent"
    async with (
        echoing(listen_unix(path)),
        session(ReverseForwards([reverse_forward("/g", path)]), Guest()) as link,
    ):
        with pytest.raises(OpenRefused) as caught:
            await link.open(target)
        assert caught.value.code is ErrorCode.UNSUPPORTED
        assert await asked_through(await link.open(DialHost("/g")), b"fine") == b"fine"


async def test_what_was_taken_from_the_list_is_refused_at_once(folder: Path) -> None:
    path = folder / "agent"
    one = reverse_forward("/g", path)
    forwards, guest = ReverseForwards([one]), Guest()
    async with echoing(listen_unix(path)), session(forwards, guest) as link:
        stream = await link.open(DialHost("/g"))
        await forwards.replace([]).wait()
        assert guest.told[-1] == []
        assert (await refusal(link, "/g")).code is ErrorCode.DENIED
        assert await asked_through(stream, b"ends by itself") == b"ends by itself"
        await forwards.replace([one]).wait()
        assert guest.told[-1] == ["/g"]


async def test_a_list_that_changes_between_sessions_is_told_in_the_next() -> None:
    forwards, guest = ReverseForwards([reverse_forward("/g", "/h")]), Guest()
    async with session(forwards, guest):
        pass
    forwards.replace([])
    assert len(guest.told) == 1
    async with session(forwards, guest):
        assert guest.told[1:] == [[]], "what the guest has of before must go"


async def test_a_host_program_that_is_not_there(folder: Path) -> None:
    port = free_port()
    forwards = ReverseForwards(
        [
            reverse_forward("/a", folder / "none"),
            reverse_forward("/b", f"127.0.0.1:{port}"),
        ]
    )
    async with session(forwards, Guest()) as link:
        for name in ("/a", "/b"):
            assert (await refusal(link, name)).code is ErrorCode.REFUSED


async def test_a_host_program_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(host: str) -> trio.SocketStream:
        await trio.sleep_forever()
        raise AssertionError

    monkeypatch.setattr(reverse, "CONNECT_TIME", 0.05)
    monkeypatch.setattr(reverse, "_connect", never)
    forwards = ReverseForwards([reverse_forward("/a", "/h")])
    async with session(forwards, Guest()) as link:
        assert (await refusal(link, "/a")).code is ErrorCode.REFUSED


async def test_too_many_connections_are_refused_until_one_ends(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reverse, "MAX_CONNECTIONS", 2)
    path = folder / "agent"
    forwards = ReverseForwards([reverse_forward("/g", path)])
    async with echoing(listen_unix(path)), session(forwards, Guest()) as link:
        first, second = await link.open(DialHost("/g")), await link.open(DialHost("/g"))
        assert (await refusal(link, "/g")).code is ErrorCode.LIMIT
        assert await asked_through(first, b"1") == b"1"
        await trio.testing.wait_all_tasks_blocked(0.01)
        third = await link.open(DialHost("/g"))
        await third.aclose()
        await second.aclose()


async def test_what_the_guest_cannot_open_is_shown() -> None:
    good, bad = (reverse_forward(path, "/h") for path in ("/good", "/bad"))

    async def answer(request: OpenHostEntrances) -> HostEntrances:
        await trio.lowlevel.checkpoint()
        return HostEntrances({"/bad": "x" * 100_000, "/made up": "y"})

    forwards = ReverseForwards([good, bad])
    async with session(forwards, Guest(answer=answer)):
        assert forwards.row(good) == SocketRow(good, ForwardState.LISTENING)
        assert forwards.row(bad) == SocketRow(bad, ForwardState.CONFLICT, "x" * reverse.MAX_SHOWN)


async def test_a_guest_that_will_not_is_shown_and_its_session_goes_on() -> None:
    async def answer(request: OpenHostEntrances) -> HostEntrances:
        raise RpcError(ErrorCode.LIMIT, "too many")

    one = reverse_forward("/g", "/h")
    forwards = ReverseForwards([one])
    async with session(forwards, Guest(answer=answer)):
        assert forwards.row(one) == SocketRow(one, ForwardState.CONFLICT, "too many")
    async with session(forwards, Guest(), knows=False):
        assert forwards.row(one).state is ForwardState.CONFLICT
        assert "no such request" in forwards.row(one).reason


async def test_a_guest_that_takes_its_time_is_waited_for_by_nobody_but_who_asks() -> None:
    """A folder of the guest's on a share whose disk hangs."""
    one, other = reverse_forward("/g", "/h"), reverse_forward("/o", "/h")
    hangs = trio.Event()

    async def answer(request: OpenHostEntrances) -> HostEntrances:
        await hangs.wait()
        return HostEntrances()

    forwards, guest = ReverseForwards([one]), Guest(answer=answer)
    async with session(forwards, guest, hangs=True) as link:
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert (await refusal(link, "/other")).code is ErrorCode.DENIED, "the session is there"
        assert forwards.row(one) == SocketRow(one, ForwardState.PENDING, WAITING)
        told = forwards.replace([other])
        with trio.move_on_after(0.01) as impatient:  # who asked for it leaves
            await told.wait()
        assert impatient.cancelled_caught
        hangs.set()
        await told.wait()
        assert guest.told == [["/g"], ["/o"]]
        assert forwards.row(other) == SocketRow(other, ForwardState.LISTENING)


async def test_the_guest_is_told_again_so_that_it_looks_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reverse, "AGAIN", 0.01)
    one = reverse_forward("/g", "/h")
    taken = {"/g": "another process listens at /g"}

    async def answer(request: OpenHostEntrances) -> HostEntrances:
        await trio.lowlevel.checkpoint()
        return HostEntrances(dict(taken))

    forwards = ReverseForwards([one])
    async with session(forwards, Guest(answer=answer)):
        assert forwards.row(one).state is ForwardState.CONFLICT
        taken.clear()
        while forwards.row(one).state is not ForwardState.LISTENING:
            await trio.sleep(0.005)


async def test_nobody_waits_for_a_guest_that_is_not_there() -> None:
    forwards = ReverseForwards()
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(forwards.run)
            await forwards.replace([reverse_forward("/g", "/h")]).wait()
            nursery.cancel_scope.cancel()
