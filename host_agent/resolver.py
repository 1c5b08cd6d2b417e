"""Answers to the guest's DNS queries: what this host would find itself, asked anew each time.

The law: each query has its answer within ``QUERY_TIME``, whatever the host's resolver does, and what is under way at
one time is bounded. Nothing is remembered for longer than ``FRESH``, so a VPN or an edited hosts file counts at once.

In this order: the names that mean the host; ``hosts`` of the configuration; the host's hosts file; the nameservers of
the configuration, if there are any; else for addresses getaddrinfo(3), which is all that the host knows (split DNS,
mDNS, directories), and for other types the host's nameservers.
"""

from __future__ import annotations

import ipaddress
import logging
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import trio

from host_agent import dns_messages, host_files
from host_agent.dns_messages import Code, Malformed, Query, Type
from host_agent.dns_relay import Unanswered, relay
from host_agent.host_files import Hosts, WatchedFile
from host_agent.network_settings import Nameserver, NetworkSettings, numeric

logger = logging.getLogger(__name__)

#: What the host is called in the guest and its containers; the second is Docker Desktop's name for it.
HOST_NAMES = ("host.agentctl.internal", "host.docker.internal")

#: Seconds until a query is answered SERVFAIL: less than the 5 that the C library waits for one (resolv.conf(5)).
QUERY_TIME = 4.0

#: Seconds for which a lookup is used again: the two queries of one getaddrinfo(3), A and AAAA, come together.
FRESH = 1.0

#: What clients are told, in seconds: names move with VPNs.
TTL = 5

#: Threads that wait in getaddrinfo(3) at one time; it cannot be cancelled.
MAX_THREADS = 32

#: Names that are looked up, or remembered, at one time.
MAX_LOOKUPS = 512

#: Of a name, as many addresses: about what fits into a datagram.
MAX_ADDRESSES = 64

#: Names that stand for names that stand for names.
MAX_ALIASES = 8

#: Bytes of an address.
_LENGTHS: dict[int, int] = {Type.A: 4, Type.AAAA: 16}


class NoSuchName(Exception):
    """There is nothing of that name."""


def look_up(name: str) -> list[str]:
    """Addresses of ``name`` as this host finds them. Blocks. Raises ``NoSuchName``, ``Unanswered``."""
    # The last dot keeps the host's search domains from being tried; a single label means them to be.
    absolute = f"{name}." if "." in name else name
    try:
        rows = socket.getaddrinfo(absolute.encode("ascii"), None, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        if error.errno == socket.EAI_NONAME:
            raise NoSuchName from None
        if error.errno == getattr(socket, "EAI_NODATA", None):
            return []
        raise Unanswered(error.strerror) from None
    except (OSError, ValueError) as error:
        raise Unanswered(str(error)) from None
    return list(dict.fromkeys(str(row[4][0]) for row in rows))


@dataclass(slots=True)
class _Lookup:
    """One lookup of a name, for which any number of queries wait. ``ended`` is a time of trio's clock."""

    done: trio.Event = field(default_factory=trio.Event)
    ended: float = 0.0
    addresses: Sequence[str] = ()
    error: NoSuchName | Unanswered | None = None

    def is_stale(self) -> bool:
        return self.done.is_set() and trio.current_time() - self.ended > FRESH


class Resolver:
    """Answers for one instance. ``host`` is the host's loopback as the guest reaches it, a numeric IPv4 address."""

    def __init__(
        self,
        settings: NetworkSettings,
        host: str,
        *,
        hosts: WatchedFile[Hosts] | None = None,
        resolv_conf: WatchedFile[tuple[Nameserver, ...]] | None = None,
        look_up: Callable[[str], Sequence[str]] = look_up,
    ) -> None:
        self._nameservers = settings.nameservers
        self._own = dict(settings.hosts) | dict.fromkeys(HOST_NAMES, host)
        self._host = host
        self._machine = {socket.gethostname().lower(), socket.gethostname().partition(".")[0].lower()}
        self._hosts = hosts or WatchedFile(host_files.HOSTS, host_files.hosts)
        self._resolv_conf = resolv_conf or WatchedFile(host_files.RESOLV_CONF, host_files.nameservers)
        self._look_up = look_up
        self._threads = trio.CapacityLimiter(MAX_THREADS)
        self._lookups: dict[str, _Lookup] = {}
        self._nursery: trio.Nursery | None = None

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Look names up, until cancelled."""
        async with trio.open_nursery() as self._nursery:
            task_status.started()
            await trio.sleep_forever()

    async def answer(self, message: bytes, *, stream: bool = False) -> bytes:
        """What to say to ``message``, b"" for nothing. ``stream``: it came where answers may be long."""
        try:
            query = dns_messages.parse(message)
        except Malformed as error:
            await trio.lowlevel.checkpoint()
            return error.answer
        with trio.move_on_after(QUERY_TIME):
            try:
                return await self._answer(query, message, stream)
            except NoSuchName:
                return dns_messages.failure(query, Code.NO_SUCH_NAME)
            except Unanswered as error:
                logger.debug("dns: %r is not answered: %s", query.name, error)
        return dns_messages.failure(query, Code.SERVER_FAILURE)

    async def _answer(self, query: Query, message: bytes, stream: bool) -> bytes:
        """Raises ``NoSuchName``, ``Unanswered``."""
        if not (query.internet and query.name):
            return await self._relayed(query, message, stream)
        name = self._meant(query.name)
        addresses = await self._known(name)
        is_local = addresses is not None or name in self._machine
        if addresses is None:
            # A name that stands for another cannot be passed on: the answer would be about the other one.
            own = name != query.name
            if not own and (self._nameservers or query.kind not in _LENGTHS):
                return await self._relayed(query, message, stream)
            addresses = await self._found(name)
        if is_local:
            addresses = self._as_guest(addresses, name)
        fitting = [
            address
            for address in addresses
            if len(ipaddress.ip_address(address).packed) == _LENGTHS.get(query.kind) and "%" not in address
        ]
        limit = dns_messages.MAX_SIZE if stream else query.max_size
        return dns_messages.answer(query, fitting[:MAX_ADDRESSES], TTL, limit)

    async def _relayed(self, query: Query, message: bytes, stream: bool) -> bytes:
        servers = self._nameservers or await self._resolv_conf.current()
        return await relay(message, query, servers, stream=stream)

    def _meant(self, name: str) -> str:
        """The name that ``name`` stands for in the end. Raises ``Unanswered`` if there is no end."""
        for _ in range(MAX_ALIASES):
            target = self._own.get(name)
            if target is None or numeric(target) is not None:
                return name
            name = target
        raise Unanswered("names that stand for each other")

    async def _known(self, name: str) -> Sequence[str] | None:
        """What nobody else has to be asked for, or None. Raises ``NoSuchName``."""
        if (address := self._own.get(name)) is not None:
            return (address,)
        if (addresses := (await self._hosts.current()).get(name)) is not None:
            return addresses
        if name.rpartition(".")[2].isdigit() or name.rpartition(".")[2].startswith("0x"):
            raise NoSuchName  # what getaddrinfo(3) takes for a number: 127.1, 0x7f000001
        return None

    def _as_guest(self, addresses: Sequence[str], name: str) -> list[str]:
        """``addresses`` as the guest reaches them: what this host calls itself is the host there.

        Not what DNS says: there, loopback is whoever asks (localtest.me), or a code (RFC 5782).
        """
        if name.rpartition(".")[2] == "localhost":  # RFC 6761, 6.3: everybody's own
            return list(addresses)
        mapped = [self._host if ipaddress.ip_address(each).is_loopback else each for each in addresses]
        return list(dict.fromkeys(mapped))

    async def _found(self, name: str) -> Sequence[str]:
        """What the host's resolver says. Raises ``NoSuchName``, ``Unanswered``."""
        assert self._nursery is not None
        lookup = self._lookups.get(name)
        if lookup is None or lookup.is_stale():
            self._make_room()
            lookup = self._lookups[name] = _Lookup()
            self._nursery.start_soon(self._run, name, lookup)
        await lookup.done.wait()
        if lookup.error is not None:
            raise type(lookup.error)(*lookup.error.args)  # one of its own for each who waits
        return lookup.addresses

    def _make_room(self) -> None:
        """Raises ``Unanswered`` if there is none."""
        if len(self._lookups) >= MAX_LOOKUPS:
            self._lookups = {name: each for name, each in self._lookups.items() if not each.is_stale()}
        if len(self._lookups) >= MAX_LOOKUPS:
            raise Unanswered("too many names are being looked up")

    async def _run(self, name: str, lookup: _Lookup) -> None:
        try:
            lookup.addresses = await trio.to_thread.run_sync(
                self._look_up, name, limiter=self._threads, abandon_on_cancel=True
            )
        except (NoSuchName, Unanswered) as error:
            lookup.error = error
        except Exception as error:  # no thread to be had, say: one name less, and not the agent
            logger.exception("dns: looking up %r failed", name)
            lookup.error = Unanswered(str(error))
        finally:
            lookup.ended = trio.current_time()
            lookup.done.set()
