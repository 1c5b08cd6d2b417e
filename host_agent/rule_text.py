"""A forwarding rule as people write it: in the instance's configuration, and as the words of ``agentctl forward``.

The law: whatever is not understood is refused with its place, the key and the reason; nothing is skipped or guessed.
What is written again (``as_json``, ``words``) is understood as the same rule.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterable
from typing import Any, TypeVar

from host_agent.errors import ExitCode, UserError
from host_agent.rules import EVERYWHERE, LAST_PORT, LOCALHOST, InvalidRule, check
from protocol.api import PortRule, Proto

T = TypeVar("T")

#: The keys of a rule in the configuration. Ports are a number or a range: 8080, "8000-8010" or [8000, 8010].
KEYS = (
    "proto",
    "guest_ip",
    "guest_ip_must_be_zero",
    "guest_port",
    "host_ip",
    "host_port",
    "host_socket",
    "ignore",
    "static",
)

_PORTS = {
    "description": "A port or a range: 8080, 8000-8010.",
    "oneOf": [
        {"type": "integer", "minimum": 1, "maximum": LAST_PORT},
        {"type": "string", "pattern": "^[0-9]{1,5}(-[0-9]{1,5})?$"},
        {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2},
    ],
}

#: JSON Schema of a rule, for editors; what it cannot say is refused here.
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "proto": {"enum": ["tcp", "udp", "any"]},
        "guest_ip": {
            "type": "string",
            "description": "127.0.0.1 if it is not said; 0.0.0.0 is every address.",
        },
        "guest_ip_must_be_zero": {"type": "boolean"},
        "guest_port": _PORTS,
        "host_ip": {
            "type": "string",
            "description": "localhost if it is not said; 0.0.0.0 is every address.",
        },
        "host_port": _PORTS,
        "host_socket": {
            "type": "string",
            "pattern": "^[/~]",
            "description": "A unix socket in place of a port.",
        },
        "ignore": {"type": "boolean", "description": "It stays in the VM."},
        "static": {"type": "boolean", "description": "There also while nothing listens in the VM."},
    },
    "additionalProperties": False,
}

_PROTOS = {"tcp": Proto.TCP, "udp": Proto.UDP, "any": None}
_RANGE = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?")
_SYNTAX = (
    "write it as [[HOST_IP:]HOST_PORT:]GUEST_PORT[/tcp|/udp], a port may be a range like 8000-8010;"
    " or as /HOST/SOCKET:GUEST_PORT"
)


# --- the configuration -------------------------------------------------------------------------------


def from_json(values: object) -> PortRule:
    """The rule that a mapping of the configuration describes. Raises ``InvalidRule``."""
    if not isinstance(values, dict):
        raise InvalidRule("a rule", "is a mapping")
    for key in values:
        if key not in KEYS:
            near = difflib.get_close_matches(_snake(key), KEYS, 1, 0.5)
            meant = f"did you mean {near[0]}?" if near else f"its keys are {', '.join(KEYS)}"
            raise InvalidRule(str(key), f"is no key of a rule; {meant}")
    rule = _rule(values)
    check(rule)
    return rule


def _rule(values: dict[str, Any]) -> PortRule:
    proto = _value(values, "proto", str, "any")
    if proto not in _PROTOS:
        raise InvalidRule("proto", f"is {proto!r}; it is one of {', '.join(_PROTOS)}")
    must_be_zero = _value(values, "guest_ip_must_be_zero", bool, None)
    guest_ip = _value(values, "guest_ip", str, EVERYWHERE if must_be_zero else "127.0.0.1")
    ignore = _value(values, "ignore", bool, False)
    first, ports = _ports("guest_port", values.get("guest_port", [1, LAST_PORT]))
    host_first, host_ports = (
        _ports("host_port", values["host_port"]) if "host_port" in values else (first, ports)
    )
    if host_ports != ports:
        raise InvalidRule(
            "host_port", f"has {host_ports} ports and guest_port {ports}; the ranges are equally long"
        )
    for key in ("host_ip", "host_port"):
        for other in ("ignore", "host_socket"):
            if key in values and values.get(other):
                raise InvalidRule(key, f"is of no use beside {other}")
    return PortRule(
        proto=_PROTOS[proto],
        guest_ip=guest_ip,
        # As in Lima: a rule for all addresses is about those that listen on all, unless it says otherwise.
        guest_ip_must_be_zero=guest_ip in (EVERYWHERE, "::") if must_be_zero is None else must_be_zero,
        guest_port=first,
        ports=ports,
        host_ip=_value(values, "host_ip", str, LOCALHOST),
        host_port=host_first,
        host_socket=_expanded(_value(values, "host_socket", str, "")),
        ignore=ignore,
        static=_value(values, "static", bool, False),
    )


def _expanded(path: str) -> str:
    return os.path.expanduser(path) if path.startswith("~/") else path


def _value(values: dict[str, Any], key: str, kind: type[T], default: Any) -> Any:
    value = values.get(key, default)
    if key in values and not isinstance(value, kind):
        expected = "true or false" if kind is bool else "a text in quotes"
        raise InvalidRule(key, f"is {json.dumps(value)}; it is {expected}")
    return value


def _ports(key: str, value: object) -> tuple[int, int]:
    """The first port and how many there are."""
    if isinstance(value, str) and (match := _RANGE.fullmatch(value)):
        bounds = [int(match[1]), int(match[2] or match[1])]
    elif isinstance(value, int) and not isinstance(value, bool):
        bounds = [value, value]
    elif isinstance(value, list) and len(value) == 2 and all(type(bound) is int for bound in value):
        bounds = value
    else:
        raise InvalidRule(key, f'is {json.dumps(value)}; it is a port or a range, like 8080 or "8000-8010"')
    first, last = bounds
    if first > last:
        raise InvalidRule(key, f"is a range that ends ({last}) before it begins ({first})")
    return first, last - first + 1


def as_json(rule: PortRule) -> dict[str, Any]:
    """``rule`` as the configuration has it; what is as it is by default is left out."""
    plain = PortRule(guest_port=rule.guest_port, ports=rule.ports, host_port=rule.guest_port)
    values: dict[str, Any] = {"proto": rule.proto.value if rule.proto else "any"}
    if rule.guest_ip != plain.guest_ip:
        values["guest_ip"] = rule.guest_ip
        values["guest_ip_must_be_zero"] = rule.guest_ip_must_be_zero
    values["guest_port"] = _port_value(rule.guest_port, rule.ports)
    if rule.host_socket:
        values["host_socket"] = rule.host_socket
    elif not rule.ignore:
        values["host_ip"] = rule.host_ip
        values["host_port"] = _port_value(rule.host_port, rule.ports)
    for flag in ("ignore", "static"):
        if getattr(rule, flag):
            values[flag] = True
    return values


def _port_value(first: int, ports: int) -> int | str:
    return first if ports == 1 else f"{first}-{first + ports - 1}"


def _snake(key: object) -> str:
    """``guestIPMustBeZero`` as ``guest_ip_must_be_zero``: what Lima's users may write."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|-", "_", str(key)).lower()


# --- the command line ------------------------------------------------------------------------------


def from_words(
    text: str, *, guest_ip: str | None = None, ignore: bool = False, static: bool = False
) -> PortRule:
    """``[[HOST_IP:]HOST_PORT:]GUEST_PORT[/PROTO]``, as ``docker run -p`` has it, or ``/HOST/SOCKET:GUEST_PORT``.

    Without ``guest_ip`` the rule is about every address that a program of the guest may listen on. Raises
    ``UserError`` (USAGE).
    """
    socket, ends = "", text
    if text.startswith("/"):
        socket, _, ends = text.rpartition(":")
        if not socket:
            raise _refused(text, "there is no port of the VM behind the path")
    host, guest, proto = _split(text, ends)
    values: dict[str, Any] = {"proto": proto, "guest_port": guest}
    values["guest_ip"] = EVERYWHERE if guest_ip is None else guest_ip
    values["guest_ip_must_be_zero"] = False
    if host is not None:
        address, values["host_port"] = host
        if address:
            values["host_ip"] = address
    if socket:
        values["host_socket"] = socket
    try:
        return from_json({**values, "ignore": ignore, "static": static})
    except InvalidRule as error:
        raise _refused(text, str(error)) from None


def _split(text: str, ends: str) -> tuple[tuple[str, str] | None, str, str]:
    """The host's address ("" for none) and port, or None; the guest's port; the protocol."""
    ends, slash, proto = ends.partition("/")
    address, guest = "", ends
    port: str | None = None
    if ":" in ends:
        rest, _, guest = ends.rpartition(":")
        before, colon, port = rest.rpartition(":")
        address = before.removeprefix("[").removesuffix("]") if colon else ""
        if colon and not address:
            raise _refused(text, "there is no address before the first colon")
    for part in (guest, port):
        if part is not None and not _RANGE.fullmatch(part):
            raise _refused(text, f"{part!r} is not a port")
    return None if port is None else (address, port), guest, proto if slash else "any"


def _refused(text: str, reason: str) -> UserError:
    return UserError(f"{text!r} is no forward: {reason}", _SYNTAX, ExitCode.USAGE)


def words(rule: PortRule) -> str:
    """``rule`` in the words of ``agentctl forward add``."""
    guest = str(_port_value(rule.guest_port, rule.ports))
    proto = f"/{rule.proto}" if rule.proto else ""
    if rule.host_socket:
        return f"{rule.host_socket}:{guest}{proto}"
    if rule.ignore:
        return guest + proto
    host = str(_port_value(rule.host_port, rule.ports))
    if rule.host_ip == LOCALHOST:
        return f"{host}:{guest}{proto}" if host != guest else guest + proto
    address = f"[{rule.host_ip}]" if ":" in rule.host_ip else rule.host_ip
    return f"{address}:{host}:{guest}{proto}"


def find(rules: Iterable[PortRule], text: str) -> list[PortRule]:
    """Those of the rules that have these words, whatever their options. Raises ``UserError`` if there is none."""
    wanted = words(from_words(text))
    if found := [rule for rule in rules if words(rule) == wanted]:
        return found
    raise UserError(f"there is no rule {text}", "see: agentctl forward list", ExitCode.USAGE)
