"""The host's proxies, as the VM's programs are to find them in their environment.

The law: a proxy that listens on the host's loopback is one at the host's address there; what only the VM reaches, and
the host itself, is asked for without one. A value that could not be written to /etc/environment as it is (pam_env(8),
EnvironmentFile= of systemd.exec(5)) is left out and said.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

NO_PROXY = "no_proxy"

#: By their lower-case names. curl(1) knows http_proxy in no other case, Go and others take either.
VARIABLES = ("http_proxy", "https_proxy", "ftp_proxy", "all_proxy", NO_PROXY)

MAX_LENGTH = 4096

#: Printable, and nothing that quotes, escapes or begins a comment in /etc/environment.
_VALUE = re.compile(r"[!-~]*")
_SPECIAL = re.compile(r"[\"'\\#`$]")

_PROXY = re.compile(
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)?(?P<user>[^@/]*@)?(?P<host>\[[^\]]*\]|[^:/\[\]]+)(?P<rest>(:[0-9]{1,5})?(/.*)?)"
)


@dataclass(frozen=True, slots=True)
class Proxies:
    """Variables in both cases, and in sentences what had to be left out."""

    environment: dict[str, str]
    problems: tuple[str, ...] = ()


def of(variables: Mapping[str, str], host: str, direct: Iterable[str]) -> Proxies:
    """The guest's variables where the host has ``variables`` (a process's environment, or names in lower case).

    ``host`` is the host's numeric address in the guest; ``direct`` are names and addresses that need no proxy there.
    Where both cases are set the lower one counts, as with curl.
    """
    environment: dict[str, str] = {}
    problems = []
    for name in VARIABLES:
        value = (variables.get(name) or variables.get(name.upper()) or "").strip()
        if not value:
            continue
        if name == NO_PROXY:
            value = ",".join(_without_doubles(re.split(r"[,\s]+", value)))
        if reason := check_proxy(name, value):
            problems.append(f"{name} was not passed on to the VM: it {reason}")
            continue
        environment[name] = value if name == NO_PROXY else reachable(value, host)
    if not environment.keys() - {NO_PROXY}:
        return Proxies({}, tuple(problems))
    excepted = environment.get(NO_PROXY, "")
    if excepted != "*":
        environment[NO_PROXY] = ",".join(_without_doubles([*excepted.split(","), *direct]))
    both = environment | {name.upper(): value for name, value in environment.items()}
    return Proxies(both, tuple(problems))


def check_proxy(name: str, value: str) -> str:
    """In a clause what is wrong with the value of the variable ``name``, or ""."""
    # The value itself is not repeated: there may be a password in it.
    if len(value) > MAX_LENGTH:
        return f"is longer than {MAX_LENGTH} characters"
    if not _VALUE.fullmatch(value):
        return "has characters that are not printable ASCII; in a URL they are percent-encoded"
    if special := _SPECIAL.search(value):
        return f"has {special[0]} in it, which is percent-encoded in a URL"
    if name != NO_PROXY and not _PROXY.fullmatch(value):
        return "is not the URL of a proxy, like http://proxy.example:3128"
    return ""


def reachable(proxy: str, host: str) -> str:
    """``proxy`` as the guest reaches it: at ``host`` if it is on the host's loopback."""
    match = _PROXY.fullmatch(proxy)
    if match is None or not _is_loopback(match["host"]):
        return proxy
    return f"{match['scheme'] or ''}{match['user'] or ''}{host}{match['rest']}"


def _is_loopback(host: str) -> bool:
    name = host.lower().strip("[]").removesuffix(".")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def _without_doubles(words: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(word for word in words if word))
