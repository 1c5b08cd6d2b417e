"""Lines of the kernel's trace as edges: who began to listen, what ceased to. Pure, sans-IO.

The law: an edge is never the truth, only a reason to read it, so a doubtful one counts. What may be
left out is what cannot have changed the truth: containers listen and stop in network namespaces of
their own all the time, and the trace does not tell namespaces apart.

Of UDP nothing shows but bind(2), and there only the return is a moment at which the truth is ready to be read. It does
not tell what was bound, but its entry tells how long the address is, which leaves out netlink: glibc binds such a
socket whenever it looks a name up. So the two are paired.

Formats: the default ``trace_pipe`` text (Documentation/trace/ftrace.rst) of the events
sock:inet_sock_set_state, syscalls:sys_exit_listen, sys_enter_bind (filtered) and sys_exit_bind.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

from guest_agent.listeners import ALL_PROTOS, Protos
from protocol.api import Proto

_LINE = re.compile(
    r".*-(?P<pid>\d+)\s+\[\d+\].*?: "
    r"(?:inet_sock_set_state: .* sport=(?P<port>\d+) |sys_listen -> |(?P<enter>sys_bind\()|(?P<exit>sys_bind -> ))"
)
"""A task's name may hold nearly anything; greedy, so that the last ``-PID [CPU]`` counts."""

MAX_LINE = 4096
"""Longer than any line of ours (about 300); what is longer is dropped and counts as an edge."""

MAX_BINDING = 1024
"""Threads that have entered bind(2) and not left it. It takes microseconds; more are lost lines or lies."""

NOTHING: Protos = frozenset()
_TCP: Protos = frozenset({Proto.TCP})
_UDP: Protos = frozenset({Proto.UDP})


@dataclass(frozen=True, slots=True)
class Edge:
    """Of ``proto``. ``closed_port`` is the port of a listener that went, None if one came."""

    pid: int
    closed_port: int | None = None
    proto: Proto = Proto.TCP


@dataclass(frozen=True, slots=True)
class _Enter:
    """A thread is about to bind something that may be UDP."""

    pid: int


@dataclass(frozen=True, slots=True)
class _Exit:
    """A thread has bound something, or failed to."""

    pid: int


class EdgeReader:
    """Cuts the trace into lines at any read boundary. A line it cannot read is a None."""

    def __init__(self) -> None:
        self._rest = b""
        self._binding: set[int] = set()

    def receive_data(self, data: bytes) -> list[Edge | None]:
        *lines, self._rest = (self._rest + data).split(b"\n")
        edges: list[Edge | None] = []
        for line in lines:
            self._receive_line(line.decode(errors="replace"), edges)
        if len(self._rest) > MAX_LINE:
            self._rest = b""
            edges.append(None)
        return edges

    def _receive_line(self, line: str, edges: list[Edge | None]) -> None:
        match parse_line(line):
            case _Enter(pid):
                self._binding.add(pid)
                if len(self._binding) > MAX_BINDING:
                    self._binding.clear()
                    edges.append(None)
            case _Exit(pid):
                if pid in self._binding:
                    self._binding.discard(pid)
                    edges.append(Edge(pid, proto=Proto.UDP))
            case edge:
                edges.append(edge)


def parse_line(line: str) -> Edge | _Enter | _Exit | None:
    """What one line says; None for what is not one, such as ``CPU:1 [LOST 3 EVENTS]``."""
    if (match := _LINE.match(line)) is None:
        return None
    pid = int(match["pid"])
    if match["enter"]:
        return _Enter(pid)
    if match["exit"]:
        return _Exit(pid)
    closed = line.rstrip().endswith("oldstate=TCP_LISTEN newstate=TCP_CLOSE")
    return Edge(pid, int(match["port"]) if closed and match["port"] else None)


Known = Collection[tuple[Proto, int]]
"""Protocol and port of each listener of a picture."""


def concerns(edge: Edge | None, known: Known, foreign: Callable[[int], bool]) -> Protos:
    """Of which protocols the truth must be read because of ``edge``.

    ``known`` is the last picture, ``foreign`` says of a pid whether its network
    namespace is certainly another one. A port that closes without being in the last picture closed
    elsewhere: had it opened here since, its opening would be an edge behind that picture, too.
    """
    if edge is None:
        return ALL_PROTOS
    concerned = _UDP if edge.proto is Proto.UDP else _TCP
    if edge.closed_port is not None:
        return concerned if (edge.proto, edge.closed_port) in known else NOTHING
    return NOTHING if foreign(edge.pid) else concerned
