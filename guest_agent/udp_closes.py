"""Which UDP sockets of this network namespace were closed: the kernel's multicast about sockets that are destroyed.

The trace of ``tracefs`` does not show it. As there, a message is a reason to read the truth and not the truth: it comes
for clients' sockets, too, may come twice, and is lost when too many come at once, which the kernel says (ENOBUFS).

Formats: linux/sock_diag.h (groups), linux/inet_diag.h; sent by net/core/sock_diag.c when a socket is freed.
"""

from __future__ import annotations

import errno
import socket
import struct
from contextlib import suppress

from guest_agent.edges import Edge
from guest_agent.sockdiag import parse_message
from protocol.api import Proto

NETLINK_SOCK_DIAG = 4
GROUPS = 1 << 1 | 1 << 3
"""SKNLGRP_INET_UDP_DESTROY is the 2nd group, SKNLGRP_INET6_UDP_DESTROY the 4th."""
MESSAGE_BYTES = 4096
"""A message has about 100."""
MAX_MESSAGES = 256
"""Messages read at a time, before others have their turn."""


def open_closes() -> socket.socket:
    """A non-blocking socket on which the messages arrive. Raises ``OSError`` where the kernel has none."""
    closes = socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, NETLINK_SOCK_DIAG
    )
    try:
        closes.bind((0, GROUPS))
    except BaseException:
        closes.close()
        raise
    return closes


def read_closes(closes: socket.socket) -> list[Edge | None]:
    """The edges of what waits; None for what was lost or cannot be read."""
    edges: list[Edge | None] = []
    with suppress(BlockingIOError):
        for _ in range(MAX_MESSAGES):
            try:
                message, (sender, _) = closes.recvfrom(MESSAGE_BYTES)
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                edges.append(None)
            else:
                # Root's programs may send here, too; 0 is the kernel.
                edges += _closed(message) if sender == 0 else []
    return edges


def _closed(message: bytes) -> list[Edge | None]:
    try:
        row = parse_message(message, 0, len(message))["row"]
    except struct.error:
        return [None]
    if row is None:
        return []
    return [Edge(pid=0, closed_port=row.port, proto=Proto.UDP)]
