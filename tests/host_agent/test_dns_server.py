from __future__ import annotations

import socket

import pytest
import trio
import trio.testing

from host_agent import dns_messages, dns_relay, dns_server
from host_agent.dns_messages import parse
from host_agent.dns_server import DnsServer
from tests.host_agent.dns_client import ask, read


class Answers:
    """Says 192.0.2.1 to everything that is not noise; where it is held, later."""

    def __init__(self) -> None:
        self.held: trio.Event | None = None
        self.under_way = self.most = 0

    async def __call__(self, message: bytes, *, stream: bool = False) -> bytes:
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            if self.held is not None:
                await self.held.wait()
            await trio.lowlevel.checkpoint()
            if message.startswith(b"noise"):
                return b""
            if message.startswith(b"bug"):
                raise RuntimeError("a bug")
            return dns_messages.answer(parse(message), ["192.0.2.2" if stream else "192.0.2.1"], 5, 512)
        finally:
            self.under_way -= 1


@pytest.fixture
def answers() -> Answers:
    return Answers()


@pytest.fixture
async def port(nursery: trio.Nursery, answers: Answers) -> int:
    port: int = await nursery.start(DnsServer(answers).run)
    return port


async def ask_by_datagram(port: int, message: bytes) -> bytes:
    with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        await client.connect(("127.0.0.1", port))
        await client.send(message)
        with trio.fail_after(10):
            return await client.recv(4096)


async def test_datagrams(port: int) -> None:
    assert read(await ask_by_datagram(port, ask("a.example", 1, ident=9))).addresses == ["192.0.2.1"]


async def test_what_deserves_no_answer_has_none_and_the_next_is_answered(port: int) -> None:
    with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        await client.connect(("127.0.0.1", port))
        for message in (b"noise", b"", ask("a.example", 1, ident=9)):
            await client.send(message if message else b"noise")
        with trio.fail_after(10):
            assert read(await client.recv(4096)).ident == 9


async def test_queries_by_stream_one_after_the_other_in_any_pieces(port: int) -> None:
    async with await trio.open_tcp_stream("127.0.0.1", port) as client:
        for ident in (1, 2, 3):
            message = ask("a.example", 1, ident=ident)
            for byte in len(message).to_bytes(2, "big") + message:
                await client.send_all(bytes([byte]))
            with trio.fail_after(10):
                answer = read(await dns_relay.receive(client))
            assert (answer.ident, answer.addresses) == (ident, ["192.0.2.2"])


async def test_a_stream_of_noise_is_closed(port: int) -> None:
    async with await trio.open_tcp_stream("127.0.0.1", port) as client:
        await client.send_all(b"\0\5noise")
        with trio.fail_after(10):
            assert await client.receive_some() == b""


async def test_a_bug_costs_one_answer(port: int, caplog: pytest.LogCaptureFixture) -> None:
    with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        await client.connect(("127.0.0.1", port))
        await client.send(b"bug")
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            await stream.send_all(b"\0\3bug")
            with trio.fail_after(10):
                assert await stream.receive_some() == b""
        await client.send(ask("a.example", 1, ident=9))
        with trio.fail_after(10):
            assert read(await client.recv(4096)).ident == 9
    assert caplog.text.count("a query was not answered") == 2


async def test_who_sits_there_is_hung_up_on(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dns_server, "IDLE_TIME", 0.05)
    async with await trio.open_tcp_stream("127.0.0.1", port) as client:
        await client.send_all(b"\0")
        with trio.fail_after(10):
            assert await client.receive_some() == b""


async def test_only_so_many_connections(nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dns_server, "MAX_CONNECTIONS", 2)
    port = await nursery.start(DnsServer(Answers()).run)
    async with await trio.open_tcp_stream("127.0.0.1", port), await trio.open_tcp_stream("127.0.0.1", port):
        async with await trio.open_tcp_stream("127.0.0.1", port) as third:
            with trio.fail_after(10):
                assert await third.receive_some() == b""


async def test_only_so_many_queries_and_the_rest_is_dropped(
    port: int, answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dns_server, "MAX_QUERIES", 8)
    answers.held = trio.Event()
    with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        await client.connect(("127.0.0.1", port))
        for ident in range(40):
            await client.send(ask("a.example", 1, ident=ident))
        with trio.fail_after(10):
            while answers.under_way < 8:
                await trio.sleep(0.01)
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert answers.most == 8
        held, answers.held = answers.held, None
        held.set()
        with trio.fail_after(10):
            assert len({(await client.recv(4096))[:2] for _ in range(8)}) == 8
    assert (await ask_by_datagram(port, ask("a.example", 1)))[3] & 0xF == 0


async def test_nobody_else_than_this_machine_can_ask(port: int) -> None:
    listening = trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with listening, pytest.raises(OSError, match="in use"):
        await listening.bind(("127.0.0.1", port))
    with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        await other.bind(("127.0.0.2", port))  # which an address of all would not allow


async def test_a_port_that_udp_has_not_free_is_given_up_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[trio.socket.SocketType] = []
    original = trio.open_tcp_listeners

    async def open_tcp_listeners(port: int, *, host: str) -> list[trio.SocketListener]:
        listeners = await original(port, host=host)
        if len(taken) < 3:
            taken.append(trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            await taken[-1].bind((host, listeners[0].socket.getsockname()[1]))
        return listeners

    monkeypatch.setattr(trio, "open_tcp_listeners", open_tcp_listeners)
    async with trio.open_nursery() as nursery:
        port = await nursery.start(DnsServer(Answers()).run)
        assert port not in [each.getsockname()[1] for each in taken]
        nursery.cancel_scope.cancel()
    for each in taken:
        each.close()
