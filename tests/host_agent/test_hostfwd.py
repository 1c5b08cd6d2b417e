"""A port that QEMU opens for us, by a monitor that a test plays and a server in sshd's place."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

from host_agent import hostfwd
from host_agent.hostfwd import NoConnection
from host_agent.qmp import QmpClosed

# What QEMU 7.2 says, with two ports and a connection over the first.
USERNET = (
    "Hub -1 (net):\r\n"
    "  Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ\r\n"
    "  TCP[ESTABLISHED]   15       127.0.0.1 38969       10.0.2.15    22     0     0\r\n"
    "  TCP[HOST_FORWARD]  14       127.0.0.1 38969       10.0.2.15    22     0     0\r\n"
    "  TCP[HOST_FORWARD]  13       127.0.0.1 45407       10.0.2.15    22     0     0\r\n"
    "  TCP[HOST_FORWARD]  12               * 8080       10.0.2.15    80     0     0\r\n"
    "  UDP[236 sec]       11       10.0.2.15 41234        10.0.2.3    53     0     0\r\n"
)


def test_only_our_own_ports_are_found() -> None:
    assert hostfwd.forwarded(USERNET) == [38969, 45407]
    assert hostfwd.forwarded("") == []


class Qemu:
    """Forwards ``port``, unless it refuses; ``dead``: the monitor is gone."""

    def __init__(self, port: int = 0, *, refusal: str = "", dead: bool = False) -> None:
        self._port, self._refusal, self._dead = port, refusal, dead
        self.open: list[int] = []
        self.said: list[str] = []

    @asynccontextmanager
    async def monitor(self) -> AsyncIterator[Any]:
        await trio.lowlevel.checkpoint()
        if self._dead:
            raise QmpClosed("no monitor")
        yield self

    async def execute(self, command: str, arguments: dict[str, str]) -> str:
        await trio.lowlevel.checkpoint()
        line = arguments["command-line"]
        self.said.append(line)
        if line.startswith("hostfwd_add") and self._refusal:
            return self._refusal
        if line.startswith("hostfwd_add"):
            self.open.append(self._port)
        if line.startswith("hostfwd_remove"):
            self.open.remove(int(line.rpartition(":")[2]))
        return "".join(f" TCP[HOST_FORWARD] 13 127.0.0.1 {port} 10.0.2.15 22 0 0\r\n" for port in self.open)


@asynccontextmanager
async def server(said: bytes) -> AsyncIterator[int]:
    """Says something to whoever connects, and hangs up if that is nothing."""
    async with trio.open_nursery() as nursery:

        async def answer(stream: trio.SocketStream) -> None:
            if said:
                await stream.send_all(said)
                await trio.sleep_forever()

        listeners = await nursery.start(
            trio.serve_tcp,
            answer,
            0,
        )
        yield listeners[0].socket.getsockname()[1]
        nursery.cancel_scope.cancel()


async def test_the_port_is_open_until_sshd_has_spoken() -> None:
    async with server(b"SSH-2.0-test\r\n") as port:
        qemu = Qemu(port)
        with await hostfwd.dial(qemu) as connection:
            assert qemu.open == []
            connection.setblocking(True)
            assert connection.recv(100) == b"SSH-2.0-test\r\n"  # all of it is still there
        assert qemu.said[0] == "hostfwd_add net tcp:127.0.0.1:0-10.0.2.15:22"


async def test_who_hangs_up_at_once_is_no_sshd() -> None:
    async with server(b"") as port:
        qemu = Qemu(port)
        with pytest.raises(NoConnection, match="refuses connections"):
            await hostfwd.dial(qemu)
    assert qemu.open == []


async def test_one_that_is_silent_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hostfwd, "GREETING_TIME", 0.2)
    listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
    async with listener:
        qemu = Qemu(listener.socket.getsockname()[1])
        with pytest.raises(NoConnection, match="has not answered within"):
            await hostfwd.dial(qemu)
    assert qemu.open == []


async def test_the_port_is_closed_when_nobody_waits_any_more() -> None:
    listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
    async with listener:
        qemu = Qemu(listener.socket.getsockname()[1])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(hostfwd.dial, qemu)
            with trio.fail_after(20):
                async with await listener.accept():
                    assert qemu.open
                    nursery.cancel_scope.cancel()
    assert qemu.open == []


async def test_a_qemu_that_refuses_or_is_gone_says_why() -> None:
    with pytest.raises(NoConnection, match="QEMU opens no port: could not set up"):
        await hostfwd.dial(Qemu(refusal="could not set up host forwarding rule"))
    with pytest.raises(NoConnection, match="no monitor"):
        await hostfwd.dial(Qemu(dead=True))
