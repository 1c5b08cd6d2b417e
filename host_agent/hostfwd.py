"""A connection to the guest's sshd through QEMU's user network, without the guest agent.

QEMU listens for us on a port of 127.0.0.1 (``hostfwd_add``), which the kernel chooses. The law: it does so until sshd
has said its first word on our connection, and no longer; what a host agent that was killed in that moment has left is
removed by the next. A connection that stands does not need the port (tried with QEMU 7.2).
"""

from __future__ import annotations

import logging
import os
import socket
from contextlib import AbstractAsyncContextManager
from typing import Final, Protocol

import trio

from host_agent.qmp import QmpClient, QmpClosed, QmpError
from provision.machine import GUEST_ADDRESS, NETWORK

logger = logging.getLogger(__name__)

LOOPBACK: Final = "127.0.0.1"
SSHD_PORT: Final = 22

#: How long sshd may take to say that it is one, seconds: systemd starts it for the connection.
GREETING_TIME: Final = 30.0

#: How long QEMU may take to close the port, seconds; it does so in a millisecond, or its main loop is stuck.
REMOVE_TIME: Final = 5.0


class NoConnection(Exception):
    """The guest's sshd is not reached; the message is a clause."""


class Monitored(Protocol):
    """A VM, as far as it is needed here."""

    def monitor(self) -> AbstractAsyncContextManager[QmpClient]: ...


async def dial(vm: Monitored) -> socket.socket:
    """A connection to the guest's sshd, which has begun to speak. Raises ``NoConnection``."""
    try:
        try:
            return await _connected(await _open(vm))
        finally:
            with trio.move_on_after(REMOVE_TIME, shield=True):
                await close(vm)
    except (QmpClosed, QmpError) as error:
        raise NoConnection(f"QEMU opens no port: {error}") from error


async def close(vm: Monitored) -> None:
    """Have no port open any more. Raises ``QmpClosed`` or ``QmpError``."""
    async with vm.monitor() as monitor:
        for port in forwarded(await _say(monitor, "info usernet")):
            await _say(monitor, f"hostfwd_remove {NETWORK} tcp:{LOOPBACK}:{port}")


async def _open(vm: Monitored) -> int:
    async with vm.monitor() as monitor:
        refusal = await _say(monitor, f"hostfwd_add {NETWORK} tcp:{LOOPBACK}:0-{GUEST_ADDRESS}:{SSHD_PORT}")
        if ports := forwarded(await _say(monitor, "info usernet")):
            return ports[0]
    raise NoConnection(f"QEMU opens no port: {refusal.strip() or 'it does not say why'}")


async def _connected(port: int) -> socket.socket:
    connection = trio.socket.socket()
    try:
        with trio.move_on_after(GREETING_TIME):
            await connection.connect((LOOPBACK, port))
            if await connection.recv(1, socket.MSG_PEEK):
                return socket.socket(fileno=connection.detach())
            raise NoConnection("the VM's SSH server refuses connections")
    except OSError as error:
        said = os.strerror(error.errno) if error.errno else str(error)  # trio puts the address before it
        raise NoConnection(f"the VM's SSH server is not reached: {said}") from error
    finally:
        if connection.fileno() >= 0:
            connection.close()
    raise NoConnection(f"the VM's SSH server has not answered within {GREETING_TIME:.0f} s")


def forwarded(usernet: str) -> list[int]:
    """Our ports, from what ``info usernet`` says; the newest first.

    ``TCP[HOST_FORWARD]  FD  ADDRESS PORT  GUEST PORT  …`` (slirp_connection_info of libslirp).
    """
    rows = (line.split() for line in usernet.splitlines())
    return [
        int(row[3])
        for row in rows
        if row[:1] == ["TCP[HOST_FORWARD]"] and row[2:3] == [LOOPBACK] and row[5:6] == [str(SSHD_PORT)]
    ]


async def _say(monitor: QmpClient, command: str) -> str:
    """A command that QMP has no name for; its answer is for people, and so is a refusal."""
    return str(await monitor.execute("human-monitor-command", {"command-line": command}))
