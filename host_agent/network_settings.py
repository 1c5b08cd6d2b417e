"""What of the host's network the VM is to find, as the configuration has it: its key ``network``.

The law: whatever is not understood is refused with its place, the key and the reason; nothing is skipped or guessed.
What is written again (``as_json``) is understood as the same settings. Without the key, the VM has what the host has.
"""

from __future__ import annotations

import difflib
import ipaddress
import json
import re
from dataclasses import dataclass, field
from typing import Any

from host_agent.proxies import VARIABLES, check_proxy

KEYS = ("dns", "hosts", "proxies", "ca_certificates")

#: In the place of a list of certificates' files: those that the host trusts beyond its distribution's.
HOST_CERTIFICATES = "host"

ENVIRONMENT, NONE = "environment", "none"

DNS_PORT = 53

#: More than resolv.conf(5) takes (MAXNS is 3); each may cost a query its time.
MAX_NAMESERVERS = 8

MAX_HOSTS = 4096

#: RFC 1035, 2.3.4, and what is found in practice: underscores, too.
_NAME = re.compile(
    r"(?=.{1,253}\Z)[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?)*"
)

_ADDRESS_AND_PORT = re.compile(r"\[([0-9a-fA-F:.]+)\](?::([0-9]{1,5}))?|([0-9.]+)(?::([0-9]{1,5}))?")


#: JSON Schema of the key, for editors; what it cannot say is refused here.
SCHEMA: dict[str, Any] = {
    "type": ["object", "null"],
    "properties": {
        "dns": {
            "description": "Servers instead of the host's resolver: 192.0.2.53, 127.0.0.1:5353, [2001:db8::53]:53.",
            "type": "array",
            "items": {"type": "string"},
            "maxItems": MAX_NAMESERVERS,
        },
        "hosts": {
            "description": "Names of the VM's own, before all others, and the address or name that each stands for.",
            "type": "object",
            "additionalProperties": {"type": "string"},
            "maxProperties": MAX_HOSTS,
        },
        "proxies": {
            "description": "Those of the environment of `agentctl up`, none, or these.",
            "anyOf": [
                {"enum": [ENVIRONMENT, NONE]},
                {
                    "type": "object",
                    "properties": {name: {"type": "string"} for name in VARIABLES},
                    "additionalProperties": False,
                },
            ],
        },
        "ca_certificates": {
            "description": 'Files and folders of certificates; "host" is what this machine trusts.',
            "type": "array",
            "items": {"type": "string"},
        },
    },
    "additionalProperties": False,
}


class InvalidSetting(ValueError):
    """``key`` of the settings, and in a clause what is wrong with it."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"{key} {reason}")
        self.key = key


@dataclass(frozen=True, slots=True)
class Nameserver:
    """A DNS server, by its numeric address."""

    address: str
    port: int = DNS_PORT

    def __str__(self) -> str:
        address = f"[{self.address}]" if ":" in self.address else self.address
        return self.address if self.port == DNS_PORT else f"{address}:{self.port}"


@dataclass(frozen=True, slots=True)
class NetworkSettings:
    """``nameservers`` are asked instead of the host's resolver, if there are any; ``hosts`` come before both: a
    name (in lower case) and the numeric address or the other name that it stands for. ``proxies``: those of the
    environment of ``agentctl up``, none, or these, by the lower-case name of the variable. ``certificates`` are
    files, or ``HOST_CERTIFICATES``.
    """

    nameservers: tuple[Nameserver, ...] = ()
    hosts: tuple[tuple[str, str], ...] = ()
    proxies: str | tuple[tuple[str, str], ...] = ENVIRONMENT
    certificates: tuple[str, ...] = field(default=(HOST_CERTIFICATES,))


def from_json(values: object) -> NetworkSettings:
    """The settings that the mapping in the configuration describes. Raises ``InvalidSetting``."""
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise InvalidSetting("network", "is a mapping")
    for key in values:
        if key not in KEYS:
            near = difflib.get_close_matches(str(key).lower(), KEYS, 1, 0.5)
            meant = f"did you mean {near[0]}?" if near else f"its keys are {', '.join(KEYS)}"
            raise InvalidSetting(str(key), f"is no key of network; {meant}")
    plain = NetworkSettings()
    return NetworkSettings(
        nameservers=_nameservers(values.get("dns", [])),
        hosts=_hosts(values.get("hosts", {})),
        proxies=_proxies(values.get("proxies", plain.proxies)),
        certificates=_certificates(values.get("ca_certificates", list(plain.certificates))),
    )


def as_json(settings: NetworkSettings) -> dict[str, Any]:
    """``settings`` as the configuration has them; what is as it is by default is left out."""
    plain = NetworkSettings()
    values: dict[str, Any] = {}
    if settings.nameservers:
        values["dns"] = [str(server) for server in settings.nameservers]
    if settings.hosts:
        values["hosts"] = dict(settings.hosts)
    if settings.proxies != plain.proxies:
        values["proxies"] = settings.proxies if isinstance(settings.proxies, str) else dict(settings.proxies)
    if settings.certificates != plain.certificates:
        values["ca_certificates"] = list(settings.certificates)
    return values


def in_full(settings: NetworkSettings) -> dict[str, Any]:
    """``settings`` with every key, for people to see what there is."""
    plain = NetworkSettings()
    return {
        "dns": [],
        "hosts": {},
        "proxies": plain.proxies,
        "ca_certificates": list(plain.certificates),
        **as_json(settings),
    }


def _nameservers(values: object) -> tuple[Nameserver, ...]:
    if not isinstance(values, list) or len(values) > MAX_NAMESERVERS:
        raise InvalidSetting("dns", f"is a list of up to {MAX_NAMESERVERS} addresses of DNS servers")
    return tuple(dict.fromkeys(_nameserver(value) for value in values))


def _nameserver(value: object) -> Nameserver:
    wrong = InvalidSetting(
        "dns",
        f"has {json.dumps(value)}; it is an address like 192.0.2.53, 127.0.0.1:5353 or [2001:db8::53]:53",
    )
    if not isinstance(value, str):
        raise wrong
    if (plain := numeric(value)) is not None:
        return Nameserver(plain)
    if (match := _ADDRESS_AND_PORT.fullmatch(value)) is None:
        raise wrong
    address, port = numeric(match[1] or match[3]), int(match[2] or match[4] or DNS_PORT)
    if address is None or not 1 <= port <= 65535:
        raise wrong
    return Nameserver(address, port)


def numeric(value: str) -> str | None:
    """The address in its usual form, an IPv6 one with its zone; None for what is none."""
    try:
        return str(ipaddress.ip_address(value))
    except ValueError:
        return None


def _hosts(values: object) -> tuple[tuple[str, str], ...]:
    if not isinstance(values, dict) or len(values) > MAX_HOSTS:
        raise InvalidSetting("hosts", f"is a mapping of up to {MAX_HOSTS} names with their addresses")
    hosts = {}
    for name, target in values.items():
        plain = name.lower().removesuffix(".")
        if not _NAME.fullmatch(plain) or numeric(plain) is not None:
            raise InvalidSetting(name, "cannot be the name of a host")
        if not isinstance(target, str):
            raise InvalidSetting(name, f"is {json.dumps(target)}; it is an address or a name in quotes")
        other = target.lower().removesuffix(".")
        address = numeric(target)
        if address is None and (not _NAME.fullmatch(other) or other.rpartition(".")[2].isdigit()):
            raise InvalidSetting(name, f"is {target!r}, which is neither an address nor the name of a host")
        if other == plain:
            raise InvalidSetting(name, "stands for itself")
        hosts[plain] = address or other
    return tuple(hosts.items())


def _proxies(values: object) -> str | tuple[tuple[str, str], ...]:
    if values in (ENVIRONMENT, NONE):
        return str(values)
    if not isinstance(values, dict):
        raise InvalidSetting(
            "proxies", f'is "{ENVIRONMENT}", "{NONE}", or a mapping with {", ".join(VARIABLES)}'
        )
    for name, value in values.items():
        if name not in VARIABLES:
            near = difflib.get_close_matches(str(name).lower(), VARIABLES, 1, 0.4)
            meant = f"did you mean {near[0]}?" if near else f"its keys are {', '.join(VARIABLES)}"
            raise InvalidSetting(name, f"is no key of proxies; {meant}")
        if not isinstance(value, str):
            raise InvalidSetting(name, f"is {json.dumps(value)}; it is a text in quotes")
        if reason := check_proxy(name, value):
            raise InvalidSetting(name, reason)
    return tuple(values.items())


def _certificates(values: object) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(value, str) and value for value in values):
        raise InvalidSetting(
            "ca_certificates", f'is a list of paths; "{HOST_CERTIFICATES}" in it is what this machine trusts'
        )
    for value in values:
        if value != HOST_CERTIFICATES and not value.startswith(("/", "~/")):
            raise InvalidSetting("ca_certificates", f"has {value!r}; a path begins with / or ~/")
        if "\0" in value:
            raise InvalidSetting("ca_certificates", "has a path with a NUL in it")
    return tuple(dict.fromkeys(values))
