"""Lines of the kernel's trace as edges: who began to listen, what ceased to. Pure, sans-IO.

The law: an edge is never the truth, only a reason to read it, so a doubtful one counts. What may be
left out is what cannot have changed the truth: containers listen and stop in network namespaces of
their own all the time, and the trace does not tell namespaces apart.

Formats: the default ``trace_pipe`` text (Documentation/trace/ftrace.rst) of the events
sock:inet_sock_set_state and syscalls:sys_exit_listen.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

_LINE = re.compile(
    r".*-(?P<pid>\d+)\s+\[\d+\].*?: (?:inet_sock_set_state: .* sport=(?P<port>\d+) |sys_listen -> )"
)
"""A task's name may hold nearly anything; greedy, so that the last ``-PID [CPU]`` counts."""

MAX_LINE = 4096
"""Longer than any line of ours (about 300); what is longer is dropped and counts as an edge."""


@dataclass(frozen=True, slots=True)
class Edge:
    """One line. ``closed_port`` is the port of a listener that went, None if one came."""

    pid: int
    closed_port: int | None = None


class EdgeReader:
    """Cuts the trace into lines at any read boundary. A line it cannot read is a None."""

    def __init__(self) -> None:
        self._rest = b""

    def receive_data(self, data: bytes) -> list[Edge | None]:
        *lines, self._rest = (self._rest + data).split(b"\n")
        edges = [parse_line(line.decode(errors="replace")) for line in lines]
        if len(self._rest) > MAX_LINE:
            self._rest = b""
            edges.append(None)
        return edges


def parse_line(line: str) -> Edge | None:
    """The edge in one line; None for what is not one, such as ``CPU:1 [LOST 3 EVENTS]``."""
    if (match := _LINE.match(line)) is None:
        return None
    closed = line.rstrip().endswith("oldstate=TCP_LISTEN newstate=TCP_CLOSE")
    return Edge(int(match["pid"]), int(match["port"]) if closed and match["port"] else None)


def matters(edge: Edge | None, known_ports: Collection[int], foreign: Callable[[int], bool]) -> bool:
    """Whether the truth must be read because of ``edge``.

    ``known_ports`` are those of the last picture, ``foreign`` says of a pid whether its network
    namespace is certainly another one. A port that closes without being in the last picture closed
    elsewhere: had it opened here since, its opening would be an edge behind that picture, too.
    """
    if edge is None:
        return True
    if edge.closed_port is not None:
        return edge.closed_port in known_ports
    return not foreign(edge.pid)
