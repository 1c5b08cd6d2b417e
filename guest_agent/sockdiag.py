"""What listens, as the kernel tells it: sock_diag through pyroute2, over one socket kept open.

TCP has listeners. UDP has none, so what counts as one is a socket that is bound, not connected, and whose port its
program chose. A server may connect its socket to its first client (iperf3, socat, DTLS): the listener that was there
stays while any socket has its port. What clients leave to the kernel (no bind(2), or one to port 0) the kernel
remembers to have chosen itself, and it filters that out (``SERVERS``). The range of ephemeral ports would say less:
WireGuard's 51820 is in it.

The law: this is the truth, and the only one. It sees the network namespace it was opened in, so
containers with their own are not in it (what Docker publishes for them is). pyroute2 carries the
netlink exchange; the answers are decoded here, because its own decoder takes 50 us a socket (a dump
with ours 15-20, native) and in 0.7 does not know the attribute with the cgroup.

Everything in ``SocketTable`` belongs to one thread: pyroute2 0.9 hides an event loop of its own in
each thread that touches it. ``open_dumper`` is how trio code uses it.

Formats: linux/inet_diag.h, linux/netlink.h, RFC 3549.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import queue
import socket
import struct
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import trio

from guest_agent.cgroups import Units, find_hierarchy
from guest_agent.listeners import ALL_PROTOS, MAX_UNIT, Protos, Snapshot, bounded
from protocol.api import Listener, Proto

log = logging.getLogger(__name__)

TCP_LISTEN = 10
TCP_CLOSE = 7
"""Also the state of a UDP socket that is not connected."""
TCP_ESTABLISHED = 1
"""Also the state of a UDP socket that is connected."""
NLMSG_ERROR = 2
SOCK_DIAG_BY_FAMILY = 20
INET_DIAG_CGROUP_ID = 21
NLM_F_REQUEST, NLM_F_DUMP = 0x1, 0x300

_NLMSGHDR = struct.Struct("=IHHII")
"""length, type, flags, sequence, pid"""
_INET_DIAG_MSG = struct.Struct("=BBBB HH 16s16s I8s IIIII".replace(" ", ""))
"""family, state, timer, retrans; sport, dport (big-endian, see below), src, dst; the rest is not read"""
_PORT = struct.Struct(">H")
_NLATTR = struct.Struct("=HH")
_ERRNO = struct.Struct("=i")
SERVERS = struct.pack("=BBH BBH", 6, 4, 8, 1, 4, 8)
"""A filter of two instructions (inet_diag_bc_op: code, offset if yes, offset if no); a socket passes that ends up
exactly behind them. INET_DIAG_BC_AUTO: did the kernel choose the port? No: behind. Yes: INET_DIAG_BC_JMP, to beyond."""
_MAPPED = b"\x00" * 10 + b"\xff\xff"


@dataclass(frozen=True, slots=True)
class Row:
    """One socket of a dump. ``cgroup`` is 0 where the kernel does not tell (before 5.9)."""

    state: int
    address: str
    port: int
    cgroup: int


def parse_row(message: bytes) -> Row:
    """Decode an inet_diag_msg with its attributes, without the netlink header.

    An IPv6 socket that is bound to an IPv4-mapped address (Java does that) is told as IPv4, since
    that is how it is reached. Raises ``struct.error`` if it is too short.
    """
    family, state, _, _, _, _, source, *_ = _INET_DIAG_MSG.unpack_from(message)
    (port,) = _PORT.unpack_from(message, 4)
    if family == socket.AF_INET:
        address = socket.inet_ntop(socket.AF_INET, source[:4])
    elif source.startswith(_MAPPED):
        address = socket.inet_ntop(socket.AF_INET, source[12:])
    else:
        address = socket.inet_ntop(socket.AF_INET6, source)
    return Row(state, address, port, _cgroup_id(message, _INET_DIAG_MSG.size))


def _cgroup_id(message: bytes, offset: int) -> int:
    while offset + _NLATTR.size <= len(message):
        length, kind = _NLATTR.unpack_from(message, offset)
        if kind == INET_DIAG_CGROUP_ID and length == 12:
            return int.from_bytes(message[offset + 4 : offset + 12], sys.byteorder)
        offset += max(length + 3 & ~3, _NLATTR.size)  # attributes are aligned to 4 bytes
    return 0


def still_serving(gone: Snapshot, rows: Sequence[Row]) -> Snapshot:
    """Those UDP servers of before that have no unconnected socket any more, but a connected one of ``rows``.

    connect(2) gives a socket that was bound to all addresses the one that it talks from.
    """
    if not gone:
        return gone
    connected = {(row.address, row.port) for row in rows if row.state == TCP_ESTABLISHED}
    ports = {port for _, port in connected}
    return frozenset(
        server
        for server in gone
        if (server.port in ports and server.address in ("0.0.0.0", "::"))
        or (server.address, server.port) in connected
    )


def parse_message(data: bytes, offset: int, length: int) -> dict[str, Any]:
    """A parser in pyroute2's sense: a dict with a ``header``, and what we want beside it.

    A refused request is an NLMSG_ERROR with a negative errno; pyroute2's sock_diag takes that type
    for an address family and hands it on as data, so it is made an ``OSError`` here.
    """
    _, kind, flags, sequence, pid = _NLMSGHDR.unpack_from(data, offset)
    body = bytes(data[offset + _NLMSGHDR.size : offset + length])
    error: OSError | None = None
    if kind == NLMSG_ERROR and (number := -_ERRNO.unpack_from(body)[0]):
        error = OSError(number, "sock_diag refused the request")
    header = {"type": kind, "flags": flags, "sequence_number": sequence, "pid": pid, "error": error}
    return {"header": header, "row": parse_row(body) if kind == SOCK_DIAG_BY_FAMILY else None}


def _import_diag() -> ModuleType:
    """Import ``pyroute2.netlink.diag`` alone.

    ``import pyroute2`` loads its database, command line, sqlite3 and HTTP server: 200 ms natively
    and 5-7 s in an emulated guest. With the package present but not executed the one module that is
    wanted takes 15 ms. The bare package is taken away again, so that a later import gets it whole.
    """
    if "pyroute2" in sys.modules or (spec := importlib.util.find_spec("pyroute2")) is None:
        return importlib.import_module("pyroute2.netlink.diag")
    sys.modules["pyroute2"] = importlib.util.module_from_spec(spec)
    try:
        return importlib.import_module("pyroute2.netlink.diag")
    except (ImportError, AttributeError):
        for name in [name for name in sys.modules if name.startswith("pyroute2.")]:
            del sys.modules[name]
    finally:
        del sys.modules["pyroute2"]
    return importlib.import_module("pyroute2.netlink.diag")


class SocketTable:
    """The kernel's socket table, asked over one netlink socket. Confined to the thread that made it."""

    def __init__(self, units: Units) -> None:
        self._units = units
        self._servers: Snapshot = frozenset()
        self._diag = _import_diag()
        # Which attributes a request may have is not known to pyroute2.
        attributes = ("INET_DIAG_REQ_NONE", "none"), ("INET_DIAG_REQ_BYTECODE", "cdata")
        self._request = type("inet_diag_req", (self._diag.inet_diag_req,), {"nla_map": attributes})
        self._socket = self._diag.DiagSocket()
        marshal = self._diag.MarshalDiag()
        marshal.get_parser = lambda key, flags, sequence: parse_message
        if hasattr(self._socket, "set_marshal"):  # pyroute2 0.9
            self._socket.set_marshal(marshal)
        else:
            self._socket.marshal = marshal
        self._socket.bind()

    def close(self) -> None:
        self._socket.close()

    def listeners(self, protos: Protos = ALL_PROTOS) -> Snapshot:
        """Every listener of these protocols in this network namespace. Raises ``OSError`` if the kernel refuses."""
        found: Snapshot = frozenset()
        if Proto.TCP in protos:
            found |= bounded(
                frozenset(self._listener(Proto.TCP, row) for row in self._rows(Proto.TCP, TCP_LISTEN))
            )
        if Proto.UDP in protos:
            self._servers = bounded(self._udp_servers())
            found |= self._servers
        return found

    def _udp_servers(self) -> Snapshot:
        rows = list(self._rows(Proto.UDP, TCP_CLOSE, TCP_ESTABLISHED))
        servers = frozenset(self._listener(Proto.UDP, row) for row in rows if row.state == TCP_CLOSE)
        return servers | still_serving(self._servers - servers, rows)

    def _listener(self, proto: Proto, row: Row) -> Listener:
        unit = self._units.name(row.cgroup) if row.cgroup else ""
        return Listener(proto, row.address, row.port, unit[:MAX_UNIT])

    def _rows(self, proto: Proto, *states: int) -> Iterator[Row]:
        for family in (socket.AF_INET, socket.AF_INET6):
            for row in self._dump(family, proto, states):
                if row.state in states and row.port:
                    yield row

    def _dump(self, family: int, proto: Proto, states: Sequence[int]) -> Iterator[Row]:
        request = self._request()
        request["sdiag_family"] = family
        request["sdiag_protocol"] = socket.IPPROTO_UDP if proto is Proto.UDP else socket.IPPROTO_TCP
        request["idiag_states"] = sum(1 << state for state in states)
        if proto is Proto.UDP:
            request["attrs"] = [("INET_DIAG_REQ_BYTECODE", SERVERS)]
        for message in self._socket.nlm_request(request, SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST | NLM_F_DUMP):
            if message["row"] is not None:
                yield message["row"]


_Answer = Callable[[Snapshot | Exception], None]


class Dumper:
    """Asks a ``SocketTable`` in a thread of its own; one dump at a time, in order."""

    def __init__(self, make: Callable[[], SocketTable]) -> None:
        self._make = make
        self._asked: queue.SimpleQueue[tuple[Protos, _Answer] | None] = queue.SimpleQueue()
        self.dumps = 0

    async def listeners(self, protos: Protos = ALL_PROTOS) -> Snapshot:
        """What listens now with these protocols. Raises what the dump raised; the next one starts with a new socket.

        The first takes as long as importing pyroute2 does. Cancelling leaves the thread to finish
        a dump nobody waits for any more.
        """
        answered = trio.Event()
        answers: list[Snapshot | Exception] = []

        def answer(value: Snapshot | Exception) -> None:
            answers.append(value)
            token.run_sync_soon(answered.set)

        token = trio.lowlevel.current_trio_token()
        self._asked.put((protos, answer))
        await answered.wait()
        if isinstance(answers[0], Exception):
            raise answers[0]
        self.dumps += 1
        return answers[0]

    def stop(self) -> None:
        self._asked.put(None)

    def serve(self) -> None:
        """The thread: until ``stop``."""
        table: SocketTable | None = None
        while (asked := self._asked.get()) is not None:
            protos, answer = asked
            try:
                table = table or self._make()
                answer(table.listeners(protos))
            except Exception as error:
                if table is not None:
                    table.close()
                table = None
                answer(error)
        if table is not None:
            table.close()


def make_table() -> SocketTable:
    return SocketTable(Units(find_hierarchy()))


@asynccontextmanager
async def open_dumper(make: Callable[[], SocketTable] = make_table) -> AsyncIterator[Dumper]:
    """A ``Dumper`` whose thread lives as long as the block; nothing is imported before it is asked."""
    dumper = Dumper(make)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(trio.to_thread.run_sync, dumper.serve, limiter=trio.CapacityLimiter(1)))
        try:
            yield dumper
        finally:
            dumper.stop()
