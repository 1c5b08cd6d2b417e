"""Queries put to nameservers that a test scripts, on sockets of this machine's loopback."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from host_agent import dns_messages, dns_relay
from host_agent.dns_messages import Code, Type, parse
from host_agent.dns_relay import Unanswered, relay
from host_agent.network_settings import Nameserver
from tests.free_ports import free_port
from tests.host_agent.dns_client import ask, read

QUERY = ask("a.example", Type.A, ident=4711, option=1232)
MANY = [f"192.0.2.{number}" for number in range(60)]

Reply = Callable[[bytes], list[bytes]]


@asynccontextmanager
async def nameserver(reply: Reply, by_stream: Reply | None = None) -> AsyncIterator[Nameserver]:
    """Says what ``reply`` makes of each query, in datagrams; and ``by_stream`` over TCP."""
    port = free_port()
    (listener,) = await trio.open_tcp_listeners(port, host="127.0.0.1")
    with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
        await datagrams.bind(("127.0.0.1", port))

        async def receive() -> None:
            while True:
                message, sender = await datagrams.recvfrom(4096)
                for answer in reply(message):
                    await datagrams.sendto(answer, sender)

        async def serve(connection: trio.SocketStream) -> None:
            message = await dns_relay.receive(connection)
            for answer in by_stream(message) if by_stream else []:
                await connection.send_all(len(answer).to_bytes(2, "big") + answer)

        async with listener, trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            nursery.start_soon(trio.serve_listeners, serve, [listener])
            yield Nameserver("127.0.0.1", port)
            nursery.cancel_scope.cancel()


def says(*addresses: str, limit: int = 1232) -> Reply:
    return lambda message: [dns_messages.answer(parse(message), addresses, 60, limit)]


def refuses(code: Code) -> Reply:
    return lambda message: [dns_messages.failure(parse(message), code)]


async def test_what_a_nameserver_says_is_passed_on_under_the_clients_number() -> None:
    seen = []

    def reply(message: bytes) -> list[bytes]:
        seen.append(message)
        return says("192.0.2.1")(message)

    async with nameserver(reply) as server:
        for _ in range(3):
            answer = read(await relay(QUERY, parse(QUERY), [server]))
            assert (answer.ident, answer.addresses) == (4711, ["192.0.2.1"])
    assert {message[2:] for message in seen} == {QUERY[2:]}
    assert len({message[:2] for message in seen}) > 1  # numbers that nobody can guess


async def test_no_such_name_is_an_answer() -> None:
    async with nameserver(refuses(Code.NO_SUCH_NAME)) as first, nameserver(says("192.0.2.1")) as second:
        assert read(await relay(QUERY, parse(QUERY), [first, second])).code == Code.NO_SUCH_NAME


async def test_who_cannot_say_is_not_the_last_to_be_asked() -> None:
    async with nameserver(refuses(Code.SERVER_FAILURE)) as first, nameserver(says("192.0.2.1")) as second:
        assert read(await relay(QUERY, parse(QUERY), [first, second])).addresses == ["192.0.2.1"]
        answer = read(await relay(QUERY, parse(QUERY), [first]))
        assert (answer.ident, answer.code) == (4711, Code.SERVER_FAILURE)


async def test_who_is_silent_or_not_there_costs_its_time_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dns_relay, "SERVER_TIME", 0.05)
    gone = Nameserver("127.0.0.1", free_port())
    async with nameserver(lambda message: []) as silent, nameserver(says("192.0.2.1")) as there:
        assert read(await relay(QUERY, parse(QUERY), [silent, gone, there])).addresses == ["192.0.2.1"]
        with pytest.raises(Unanswered, match="no nameserver answers"):
            await relay(QUERY, parse(QUERY), [silent, gone])
    with pytest.raises(Unanswered, match="there is no nameserver"):
        await relay(QUERY, parse(QUERY), [])


async def test_what_answers_something_else_is_not_believed() -> None:
    def reply(message: bytes) -> list[bytes]:
        ident = int.from_bytes(message[:2], "big")
        truth = says("192.0.2.1")(message)[0]
        other = ask("other.example", Type.A, ident=ident)
        return [
            dns_messages.with_ident(truth, ident ^ 1),
            dns_messages.answer(parse(other), ["192.0.2.66"], 60, 512),
            b"x",
            message,
            truth,
        ]

    async with nameserver(reply) as server:
        assert read(await relay(QUERY, parse(QUERY), [server])).addresses == ["192.0.2.1"]


async def test_what_does_not_fit_is_fetched_by_a_stream_for_who_came_by_one() -> None:
    async with nameserver(says(*MANY, limit=512), says(*MANY)) as server:
        short = read(await relay(QUERY, parse(QUERY), [server]))
        assert (short.truncated, short.addresses) == (True, [])
        whole = read(await relay(QUERY, parse(QUERY), [server], stream=True))
        assert (whole.truncated, whole.addresses, whole.ident) == (False, MANY, 4711)


async def test_a_stream_that_ends_is_no_answer() -> None:
    async with nameserver(says(*MANY, limit=512), lambda message: [b"what?"]) as server:
        with pytest.raises(Unanswered):
            await relay(QUERY, parse(QUERY), [server], stream=True)
    async with nameserver(says(*MANY, limit=512)) as server:
        with pytest.raises(Unanswered):
            await relay(QUERY, parse(QUERY), [server], stream=True)
