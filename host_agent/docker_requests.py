"""What a client says to dockerd, read along: the requests that name folders of the host are held until judged.

Sans-IO: bytes of the client in, bytes for dockerd out, no socket and no clock. Its laws:

- What goes on goes on byte for byte and in order. A body is never kept, whatever its size, but for the few
  small ones that are judged; nothing else is held than a head until its end, before which no server answers.
- A request to create a container or a volume goes on whole after ``decide(True)``, or not at all.
- A stream that is not understood is passed on unread from there on. Nothing is protected by this filter, it
  explains: a client that evades it gets the VM's empty folder, and no file that it may not have.

Answers are not read. So after a request to upgrade (attach, exec, /session, /grpc) the connection counts as
upgraded even if dockerd refused. And a client that waits for "100 Continue" before it sends a body that is
judged gives up waiting (curl after 1 s, for bodies of 1 MiB and more; docker's own clients do not ask).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any
from urllib.parse import unquote_to_bytes

from host_agent.http_requests import Chunked, Head, Sized, SurpriseError

MAX_HEAD = 64 * 1024
"""Bytes of a request line with its headers. Go allows 1 MiB; the docker CLI sends 200 bytes, or 10 KiB with
registry credentials."""

MAX_BODY = 4 * 1024 * 1024
"""Bytes of a body that is held (with its chunk sizes). ``docker run`` sends 2 KiB; with 100 KB of environment
and 1,000 mounts it is 300 KiB."""

MAX_BLANK = 4
"""CR and LF before a request that Go's server forgives after a POST."""

_END_OF_HEAD = re.compile(rb"\r?\n\r?\n")
_METHOD_SO_FAR = re.compile(rb"[A-Z]{0,16}\Z|[A-Z]{1,16} ")
_TARGET = re.compile(rb"(?:http://[^/?]*)?(?P<path>/[^?]*)(?:\?.*)?", re.DOTALL)
_VERSION = re.compile(rb"/v[0-9.]+(?=/)")


class Route(Enum):
    """What is to be done with a request."""

    PASS = auto()
    CREATE_CONTAINER = auto()
    CREATE_VOLUME = auto()
    START_EXEC = auto()  # an upgrade, unless its body says that it is detached
    UPGRADE = auto()  # bytes of another protocol follow, always


_ROUTES: tuple[tuple[re.Pattern[bytes], Route], ...] = (
    (re.compile(rb"/containers/create"), Route.CREATE_CONTAINER),
    (re.compile(rb"/volumes/create"), Route.CREATE_VOLUME),
    (re.compile(rb"/exec/[^/]+/start"), Route.START_EXEC),
    (re.compile(rb"/containers/[^/]+/attach|/session|/grpc"), Route.UPGRADE),
)


@dataclass(frozen=True, slots=True)
class Output:
    """``data`` is for dockerd, now. Unless ``sources`` is empty, ``decide`` must be called next: they are the
    absolute paths that a request wants to have bound, as it names them."""

    data: bytes
    sources: tuple[str, ...] = ()


def refusal(message: str) -> bytes:
    """The answer to a request that is not passed on, as dockerd words its errors; it ends the connection."""
    body = json.dumps({"message": message}).encode() + b"\n"
    return (
        b"HTTP/1.1 400 Bad Request\r\n"
        b"Content-Type: application/json\r\n"
        b"Content-Length: %d\r\n"
        b"Connection: close\r\n"
        b"\r\n" % len(body)
    ) + body


@dataclass(slots=True)
class _Request:
    """The request at hand; the last two are of one that is held: where its body starts, and how long it may get."""

    route: Route
    body: Sized | Chunked
    upgrade: bool
    body_start: int = 0
    limit: int = 0

    @classmethod
    def parse(cls, head: bytes) -> _Request:
        """Raises ``SurpriseError``."""
        parsed = Head.parse(head)
        route = _route(parsed.method, parsed.target)
        return cls(route, parsed.body, parsed.upgrade or route is Route.UPGRADE)

    @property
    def is_held(self) -> bool:
        if self.route in (Route.PASS, Route.UPGRADE):
            return False
        return isinstance(self.body, Chunked) or self.body.left <= MAX_BODY


_NO_REQUEST = _Request(Route.PASS, Sized(0), upgrade=False)


def _route(method: bytes, target: bytes) -> Route:
    found = _TARGET.fullmatch(target)
    if method != b"POST" or found is None:
        return Route.PASS
    path = unquote_to_bytes(found["path"])
    if version := _VERSION.match(path):
        path = path[version.end() :]
    return next((route for pattern, route in _ROUTES if pattern.fullmatch(path)), Route.PASS)


class RequestFilter:
    """The client's half of one connection. After ``Output.sources``: ``decide`` before anything else."""

    def __init__(self) -> None:
        self._take: Callable[[bytes, int], int] = self._take_head
        self._passed: list[bytes] = []
        self._held = bytearray()  # of the request at hand, from its first byte
        self._request = _NO_REQUEST
        self._sources: tuple[str, ...] = ()
        self._rest = b""  # what came after a request that awaits its decision

    def receive(self, data: bytes) -> Output:
        """Take in what the client sent; any split into pieces has the same result."""
        assert not self._sources, "decide first"
        at = 0
        while at < len(data) and not self._sources:
            try:
                at = self._take(data, at)
            except SurpriseError:
                self._give_up()
        self._rest = data[at:]
        return self._output()

    def decide(self, allowed: bool) -> Output:
        """Let the request go on, and read what came after it; or drop it, and all that follows."""
        assert self._sources, "nothing was asked"
        self._sources, rest = (), self._rest
        if allowed:
            self._finish(upgraded=self._request.upgrade)
        else:
            self._held.clear()
            self._take = self._take_nothing
        return self.receive(rest)

    def end(self) -> bytes:
        """The client has ended: what is held goes on, as it is; dockerd will know what to say to half a request."""
        self._release()
        return self._output().data

    def _output(self) -> Output:
        passed, self._passed = self._passed, []
        return Output(b"".join(passed), self._sources)

    # --- states: each takes bytes of ``data`` from ``at`` and returns how far it came ------------------

    def _take_head(self, data: bytes, at: int) -> int:
        held, before = self._held, len(self._held)
        held += data[at:]
        start = _blank(held)
        found = _END_OF_HEAD.search(held, max(start, before - 3))
        end = len(held) if found is None else found.end()
        # Judged by the head alone, so that it does not matter what else came with it.
        after = bytes(held[end:])
        del held[end:]
        if end > MAX_HEAD or start > MAX_BLANK or not _METHOD_SO_FAR.match(held, start):
            self._give_up()
        elif found is not None:
            try:
                self._begin(_Request.parse(bytes(held[start:])))
            except SurpriseError:
                self._give_up()
        return len(data) - len(after)

    def _take_body(self, data: bytes, at: int) -> int:
        end = self._request.body.skip(data, at)
        self._passed.append(data[at:end])
        if self._request.body.ended:
            self._take = self._take_head
        return end

    def _take_held_body(self, data: bytes, at: int) -> int:
        end = self._request.body.skip(data, at)
        self._held += data[at:end]
        if len(self._held) > self._request.limit:
            self._pass_body()
        elif self._request.body.ended:
            self._judge()
        return end

    def _take_raw(self, data: bytes, at: int) -> int:
        self._passed.append(data[at:])
        return len(data)

    def _take_nothing(self, data: bytes, at: int) -> int:
        return len(data)

    # --- transitions -----------------------------------------------------------------------------------

    def _begin(self, request: _Request) -> None:
        self._request = request
        if request.is_held:
            request.limit = len(self._held) + MAX_BODY
            request.body_start = len(self._held)
            self._take = self._take_held_body
            if request.body.ended:
                self._judge()
            return
        self._pass_body()

    def _pass_body(self) -> None:
        """What is held goes on, and so does the rest of the body as it comes."""
        if self._request.upgrade or self._request.body.ended:
            self._finish(upgraded=self._request.upgrade)
        else:
            self._release()
            self._take = self._take_body

    def _judge(self) -> None:
        """The whole request is there."""
        request = self._request
        content = request.body.content(bytes(self._held[request.body_start :]))
        document = _parse_json(content)
        if request.route is Route.START_EXEC:
            self._finish(upgraded=request.upgrade or not _is_detached(document))
            return
        named = _container_binds if request.route is Route.CREATE_CONTAINER else _volume_binds
        self._sources = tuple(dict.fromkeys(path for path in named(document) if path.startswith("/")))
        if not self._sources:
            self._finish(upgraded=request.upgrade)

    def _finish(self, *, upgraded: bool) -> None:
        self._release()
        self._take = self._take_raw if upgraded else self._take_head

    def _give_up(self) -> None:
        self._release()
        self._take = self._take_raw

    def _release(self) -> None:
        if self._held:
            self._passed.append(bytes(self._held))
            self._held.clear()


def _blank(data: bytearray) -> int:
    """How many of the first bytes are CR and LF, counted to one more than there may be."""
    start = data[: MAX_BLANK + 1]
    return len(start) - len(start.lstrip(b"\r\n"))


# --- the bodies of the Engine API --------------------------------------------------------------------


class _Object(tuple[tuple[str, Any], ...]):
    """A JSON object as its pairs. Go finds fields whatever their case, and takes repeated ones together."""

    __slots__ = ()

    def values(self, name: str) -> Iterator[Any]:
        folded = name.casefold()
        return (value for key, value in self if key.casefold() == folded)


_JSON = json.JSONDecoder(object_pairs_hook=_Object)


def _parse_json(content: bytes) -> Any:
    """The first value in ``content``, as Go's decoder reads it; None for what dockerd will complain about."""
    try:
        return _JSON.raw_decode(content.decode(errors="replace").lstrip(" \t\r\n"))[0]
    except (ValueError, RecursionError):
        return None


def _fields(document: Any, name: str) -> Iterator[Any]:
    return document.values(name) if isinstance(document, _Object) else iter(())


def _items(document: Any, name: str) -> Iterator[Any]:
    for value in _fields(document, name):
        if isinstance(value, list):
            yield from value


def _texts(document: Any, name: str) -> list[str]:
    return [value for value in _fields(document, name) if isinstance(value, str)]


def _container_binds(document: Any) -> Iterator[str]:
    """HostConfig.Binds ("source:target[:options]", or a volume's name for the source) and HostConfig.Mounts."""
    for host in _fields(document, "HostConfig"):
        for bind in _items(host, "Binds"):
            # One field is a target, four are an error that dockerd explains.
            if isinstance(bind, str) and bind.count(":") in (1, 2):
                yield bind.partition(":")[0]
        for mount in _items(host, "Mounts"):
            yield from _mount_binds(mount)


def _mount_binds(mount: Any) -> Iterator[str]:
    kinds = _texts(mount, "Type")
    if "bind" in kinds:
        yield from _texts(mount, "Source")
    if "volume" in kinds:
        for options in _fields(mount, "VolumeOptions"):
            for driver in _fields(options, "DriverConfig"):
                yield from _driver_binds(_texts(driver, "Name"), driver, "Options")


def _volume_binds(document: Any) -> Iterator[str]:
    return _driver_binds(_texts(document, "Driver"), document, "DriverOpts")


def _driver_binds(drivers: list[str], document: Any, name: str) -> Iterator[str]:
    """What a volume of the local driver binds: the options type=none,o=bind,device=PATH."""
    if any(driver not in ("", "local") for driver in drivers):
        return
    for options in _fields(document, name):
        flags = {flag for text in _texts(options, "o") for flag in text.split(",")}
        if flags & {"bind", "rbind"}:
            yield from _texts(options, "device")


def _is_detached(document: Any) -> bool:
    return any(value is True for value in _fields(document, "Detach"))
