from __future__ import annotations

import errno
import os
import select
import socket

import pytest

from guest_agent.edges import Edge
from guest_agent.udp_closes import open_closes, read_closes
from protocol.api import Proto


def closed_within(closes: socket.socket, port: int, seconds: float) -> bool:
    """Whether the kernel says that ``port`` closed; others of this machine may close as well."""
    edges: list[Edge | None] = []
    while select.select([closes], [], [], seconds)[0]:
        edges += read_closes(closes)
        if Edge(0, port, Proto.UDP) in edges:
            return True
    return False


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("connected", [False, True])
def test_what_was_closed_is_told_by_its_port(address: str, connected: bool) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with open_closes() as closes:
        with socket.socket(family, socket.SOCK_DGRAM) as server:
            server.bind((address, 0))
            port = server.getsockname()[1]
            if connected:
                server.connect((address, 9))
        assert closed_within(closes, port, 0.3)


def test_what_was_lost_counts_as_doubt() -> None:
    class Full(socket.socket):
        full = True

        def recvfrom(self, *arguments: int) -> tuple[bytes, tuple[int, int]]:
            if self.full:
                self.full = False
                raise OSError(errno.ENOBUFS, "No buffer space available")
            raise BlockingIOError

    with Full(socket.AF_NETLINK, socket.SOCK_RAW, 4) as closes:
        assert read_closes(closes) == [None]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may send to a netlink socket of somebody else's")
def test_only_the_kernel_is_believed() -> None:
    with open_closes() as closes, socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 4) as stranger:
        stranger.sendto(bytes(100), (closes.getsockname()[0], 0))
        select.select([closes], [], [], 0.3)
        assert None not in read_closes(closes)
