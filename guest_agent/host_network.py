"""What the guest's programs find of the host's network: its resolver, its proxies, the authorities that it trusts.

The law: what the host says replaces what it said before, and to say the same again costs next to nothing: no process
is started, no file written. What cannot be done is told to the host, and the rest is done all the same.
"""

from __future__ import annotations

import logging
import re
import socket
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import trio

from guest_agent import trust
from guest_agent.accounts import write_atomically
from guest_agent.blocks import with_block
from protocol.api import HostNetworkUsed, UseHostNetwork
from protocol.errors import ErrorCode, RpcError
from protocol.link import Service

log = logging.getLogger(__name__)

ENVIRONMENT = "etc/environment"
"""Read by pam_env(8), which means every login but ours, by Docker's unit, and by ``spawn``."""

CHAIN = "AGENTCTL-DNS"
CHAIN_STATE = "run/agentctl/dns"
"""Where the chain leads, if it is there. Of one boot, as the chain is."""

RESTORE_TIME = 20.0
"""Seconds. The first rule loads the kernel's modules, which Docker would load else."""

MAX_PROBLEM = 200
"""Characters of a reason."""

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_PLAIN = re.compile(r"[!-~]*")
"""What needs no quotes, if there is none of ``_SPECIAL`` in it."""
_SPECIAL = re.compile(r"[\s\"'\\#$`;]")

MAX_VALUE = 8192
"""Characters of a variable."""


Step = tuple[str, Callable[[], None]]
"""What it means if it fails, and what is done."""


def restore_rules(rules: str) -> None:
    """Add ``rules`` (iptables-save's format) to the kernel's. Raises ``OSError``, ``subprocess.SubprocessError``."""
    # All in one process and one transaction; backed by nftables, as Docker's.
    subprocess.run(
        ["iptables-restore", "--noflush"],
        input=rules.encode(),
        check=True,
        capture_output=True,
        timeout=RESTORE_TIME,
    )


class HostNetwork:
    """Answers ``UseHostNetwork``. ``on_readable`` is called each time what Docker reads as it starts has been written.

    The way to the host's resolver is there 2 s later when all is started at once under emulation, and long before the
    first container; Docker need not wait for it.
    """

    def __init__(
        self,
        on_readable: Callable[[], None],
        root: Path = Path("/"),
        *,
        restore_rules: Callable[[str], None] = restore_rules,
        rehash: Callable[[Path], None] = trust.rehash,
    ) -> None:
        self._on_readable = on_readable
        self._root = root
        self._restore_rules = restore_rules
        self._rehash = rehash
        self._trusted: Sequence[bytes] | None = None
        self._lock = trio.Lock()

    def register(self, service: Service) -> None:
        service.on_request(UseHostNetwork, self.use)

    async def use(self, request: UseHostNetwork) -> HostNetworkUsed:
        """Use it. ``RpcError`` INVALID for what makes no sense, with nothing done."""
        try:
            _check(request)
        except ValueError as error:
            raise RpcError(ErrorCode.INVALID, str(error)) from error
        async with self._lock:
            problems = await trio.to_thread.run_sync(_each, self._docker_reads(request))
            self._on_readable()
            problems += await trio.to_thread.run_sync(_each, self._docker_needs(request))
        for problem in problems:
            log.warning("host_network.problem %s", problem)
        return HostNetworkUsed(problems)

    def _docker_reads(self, request: UseHostNetwork) -> list[Step]:
        return [
            ("the VM does not use this machine's proxies", partial(self._set_environment, request)),
            ("the VM does not trust what this machine trusts", partial(self._trust, request)),
        ]

    def _docker_needs(self, request: UseHostNetwork) -> list[Step]:
        return [("the VM does not ask this machine for names", partial(self._ask_host_for_names, request))]

    def _ask_host_for_names(self, request: UseHostNetwork) -> None:
        """Lead what is asked of the name server to the host's port, or nowhere else with port 0."""
        state = self._root / CHAIN_STATE
        before = state.read_text() if state.exists() else ""
        wanted = f"{request.name_server} {request.host}:{request.dns_port}" if request.dns_port else ""
        if before == wanted:
            return
        self._restore_rules(
            dns_rules(request.name_server, request.host, request.dns_port, hook=not state.exists())
        )
        write_atomically(state, wanted)

    def _set_environment(self, request: UseHostNetwork) -> None:
        path = self._root / ENVIRONMENT
        before = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        after = with_block(
            before, (f"{name}={quoted(value)}" for name, value in sorted(request.environment.items()))
        )
        if after != before:
            write_atomically(path, after)

    def _trust(self, request: UseHostNetwork) -> None:
        if self._trusted == request.certificates:
            return
        self._trusted = None
        trust.trust(self._root, request.certificates, self._rehash)
        self._trusted = request.certificates


def _each(steps: Iterable[Step]) -> list[str]:
    """Do each step; what went wrong, in sentences."""
    problems = []
    for problem, step in steps:
        try:
            step()
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            problems.append(f"{problem}: {_reason(error)[:MAX_PROBLEM]}")
    return problems


def dns_rules(name_server: str, host: str, port: int, *, hook: bool) -> str:
    """What leads DNS of the guest and its containers to ``port`` of ``host``, for iptables-restore(8).

    To name a chain empties it, or makes it. ``hook``: it is not used yet.
    """
    chain = (
        f"-A {CHAIN} -d {name_server}/32 -p {{0}} -m {{0}} --dport 53 -j DNAT --to-destination {host}:{port}"
    )
    lines = [f":{CHAIN} - [0:0]"]
    if port:
        lines += [chain.format("udp"), chain.format("tcp")]
    if hook:
        lines += [f"-A {origin} -j {CHAIN}" for origin in ("PREROUTING", "OUTPUT")]
    return "\n".join(["*nat", *lines, "COMMIT", ""])


def quoted(value: str) -> str:
    """``value`` as systemd reads it in an ``EnvironmentFile=`` (systemd.exec(5)), and ``login_environment`` here.

    pam_env(8) knows no escapes and takes what follows a ``#`` for a comment, so a login by SSH sees such values
    otherwise.
    """
    if _PLAIN.fullmatch(value) and not _SPECIAL.search(value):
        return value
    return '"' + re.sub(r'(["\\`$])', r"\\\1", value) + '"'


def _unquoted(value: str) -> str:
    if len(value) >= 2 and value[0] == value[-1] == '"':
        return re.sub(r'\\(["\\`$])', r"\1", value[1:-1])
    return value.strip("'")


def login_environment(root: Path = Path("/")) -> Mapping[str, str]:
    """The variables of /etc/environment, as systemd reads them."""
    try:
        text = (root / ENVIRONMENT).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    rows = (line.strip().removeprefix("export ").partition("=") for line in text.splitlines())
    return {name: _unquoted(value) for name, equals, value in rows if equals and _NAME.fullmatch(name)}


def _check(request: UseHostNetwork) -> None:
    for address in (request.name_server, request.host):
        try:
            socket.inet_pton(socket.AF_INET, address)
        except OSError:
            raise ValueError(f"{address[:64]!r} is not an IPv4 address") from None
    if not 0 <= request.dns_port <= 65535:
        raise ValueError(f"{request.dns_port} is not a port")
    for name, value in request.environment.items():
        if not _NAME.fullmatch(name) or len(value) > MAX_VALUE or not value.isprintable():
            raise ValueError(f"{name[:64]!r} cannot be a variable of /etc/environment, or its value cannot")


def _reason(error: Exception) -> str:
    match error:
        case subprocess.CalledProcessError():
            return str(error.stderr.decode(errors="replace").strip() or error)
        case OSError():
            return error.strerror or str(error)
    return str(error)
