"""The composition root of the process: what is around it, and the sessions in which that is served."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import trio

from fileserver.budget import raise_limit
from guest_agent import dockerd
from guest_agent.remote.capabilities import docker_sockets
from guest_agent.transports import PORTS, OpenTransport
from guest_agent.view.around import in_vm, on_machine
from guest_agent.view.server import PAUSE, ViewServer
from guest_agent.view.watching import Watch

log = logging.getLogger(__name__)

VIEW_PORT: Final = PORTS / "org.agentctl.view"

SWITCH_INTERVAL: Final = 0.0005
"""Seconds, as of the host's file server: each call changes threads twice."""


async def run(open_transport: OpenTransport, *, vm: bool = True, watch: Watch | None = None) -> None:
    """The process's life, until a signal ends it. ``vm``: on a machine that is all ours."""
    # The host says which permissions a new file has, its umask is already in them.
    os.umask(0)
    sys.setswitchinterval(SWITCH_INTERVAL)
    raise_limit()
    if watch is None:
        watch = Watch(in_vm if vm else on_machine, [dockerd.SOCKET] if vm else _distinct(docker_sockets()))
    async with trio.open_nursery() as nursery:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as received:
            server = ViewServer(nursery, watch)
            async with trio.open_nursery() as sessions:
                sessions.start_soon(server.serve, open_transport, PAUSE if vm else 0)
                log.info("agent.stop signal=%s", signal.Signals(await anext(aiter(received))).name)
                sessions.cancel_scope.cancel()
            await server.close()
        nursery.cancel_scope.cancel()


def _distinct(sockets: Sequence[Path]) -> list[Path]:
    """Without those that are others by another name: /var/run is a link to /run."""
    return list({os.path.realpath(socket): socket for socket in reversed(sockets)}.values())[::-1]
