"""Ports of this machine that are free, for whoever listens on one later on, or for nobody at all.

They lie below those that Linux gives to connections (32,768 and up, ip(7)): a port from there may become some client's
own in between, and stays taken for a minute after that. And none is given twice, since the end of what went before may
still be under way. The tests that need many ports in a row have theirs from 20,000 on.
"""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator

FIRST, END = 10_000, 20_000


def _shuffled() -> Iterator[int]:
    while True:
        yield from random.SystemRandom().sample(range(FIRST, END), END - FIRST)


_candidates = _shuffled()


def is_free(port: int) -> bool:
    """Whether nobody has it, in either family, for streams or datagrams, not even a connection that has just ended."""
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        try:
            with socket.socket(socket.AF_INET, kind) as probe:
                probe.bind(("0.0.0.0", port))
            if socket.has_dualstack_ipv6():
                with socket.socket(socket.AF_INET6, kind) as probe:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                    probe.bind(("::", port))
        except OSError:
            return False
    return True


def free_port() -> int:
    return next(port for port in _candidates if is_free(port))
