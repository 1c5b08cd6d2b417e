"""``python -m host_agent.fileserver``: the process that serves the host's folders to the guest."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import sys
from pathlib import Path

import trio

from fileserver.budget import raise_limit
from fileserver.journal import Journal
from fileserver.keepsakes import Keepsakes
from host_agent import groups
from host_agent.agentlog import FORMAT
from host_agent.bulk_plane import plane
from host_agent.fileserver.server import FileServer
from host_agent.paths import InstancePaths
from protocol.region import FILES

logger = logging.getLogger(__name__)

#: Seconds for which a thread may keep the interpreter while another is ready. Python's 5 ms are for computing; here
#: each call changes threads twice, and whoever comes back from the disk would wait for the one that reads frames.
SWITCH_INTERVAL = 0.0005


def main() -> None:
    """Serve until the other end of ``--control-fd`` is closed, or SIGTERM."""
    arguments = _arguments()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format=FORMAT)
    # The guest says which permissions a new file has, its umask is already in them.
    os.umask(0)
    raise_limit()
    sys.setswitchinterval(SWITCH_INTERVAL)
    groups.run(_serve, arguments)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m host_agent.fileserver")
    parser.add_argument("--guest-socket", type=Path, required=True, help="QEMU's socket of the port")
    parser.add_argument("--control-fd", type=int, required=True, help="a connected stream socket")
    parser.add_argument("--store-fd", type=int, help="where descriptors outlive us: a SOCK_SEQPACKET socket")
    parser.add_argument("--instance", type=Path, help="whose VM may share memory with us")
    parser.add_argument("--journal", type=Path, required=True)
    parser.add_argument("--packed", action="store_true", help="pack what travels where that pays")
    parser.add_argument("--hide", action="append", default=[], help="a directory that guests see empty")
    return parser.parse_args()


async def _serve(arguments: argparse.Namespace) -> None:
    control = trio.SocketStream(trio.socket.from_stdlib_socket(socket.socket(fileno=arguments.control_fd)))
    store = None if arguments.store_fd is None else socket.socket(fileno=arguments.store_fd)
    keepsakes = Keepsakes(store)
    journal = Journal(arguments.journal)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_end_on_signal, nursery.cancel_scope)
            bulk = None if arguments.instance is None else plane(FILES, InstancePaths(arguments.instance))
            server = FileServer(
                arguments.guest_socket,
                control,
                journal,
                arguments.hide,
                keepsakes,
                bulk,
                packed=arguments.packed,
            )
            await server.run()
            nursery.cancel_scope.cancel()
    finally:
        journal.close()
        keepsakes.close()
    logger.info("the file server ends")


async def _end_on_signal(scope: trio.CancelScope) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for _ in signals:
            scope.cancel()
            return


if __name__ == "__main__":
    main()
