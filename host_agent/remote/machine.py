"""Which machine, and what can be done on it: an address as users write it, and what its agent's ``check`` found.

The law: what a machine says of itself is a stranger's text. It is bounded, shown without control sequences,
and nothing in it is ever part of a command line.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Final, Self

from host_agent.errors import ExitCode, UserError
from host_agent.plain_text import PlainText
from protocol.capabilities import FORMAT, Capabilities, Docker, Mounts, Problem

#: A sentence on a terminal; a path (PATH_MAX).
MAX_SENTENCE: Final = 400
MAX_PATH: Final = 4096
#: More problems than anybody reads.
MAX_PROBLEMS: Final = 32

#: They become part of what a ProxyCommand of ~/.ssh/config says to a shell, so neither looks like an option nor
#: has anything of a shell in it (as ssh(1) has it since 9.6). A name in a directory may have a domain.
_USER: Final = re.compile(r"[\w.][\w.@+\\-]{0,99}(?<!\\)")
_HOST: Final = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,252})")
_IPV6: Final = re.compile(r"[0-9A-Fa-f:.]{2,45}(?:%[A-Za-z0-9_.-]{1,15})?")


@dataclass(frozen=True, slots=True)
class Address:
    """What the user wrote; what it leaves out (``None``) is for ~/.ssh/config and its defaults."""

    host: str
    user: str | None = None
    port: int | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Of ``[user@]host[:port]``, ``[user@][ipv6][:port]``, an alias, or ``ssh://`` and any of them.

        Raises ``UserError`` (USAGE).
        """
        rest = text.removeprefix("ssh://").removesuffix("/") if text.startswith("ssh://") else text
        user, at, rest = rest.rpartition("@")
        bracketed = re.fullmatch(r"\[([^\[\]]*)\](?::(.*))?", rest)
        if bracketed:
            host, port = bracketed[1], bracketed[2]
            known = _IPV6.fullmatch(host) is not None
        elif rest.count(":") > 1:
            host, port, known = rest, None, _IPV6.fullmatch(rest) is not None
        else:
            host, colon, after = rest.partition(":")
            port = after if colon else None
            known = _HOST.fullmatch(host) is not None
        if not known or (at and not _USER.fullmatch(user)):
            raise UserError(
                f"{shown(text)!r} is not a machine's address",
                "user@host, user@host:port, or a Host of ~/.ssh/config",
                ExitCode.USAGE,
            )
        return cls(host, user if at else None, None if port is None else _port(port))

    def __str__(self) -> str:
        """As ``parse`` understands it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        user = f"{self.user}@" if self.user is not None else ""
        return f"{user}{host}" if self.port is None else f"{user}{host}:{self.port}"


def _port(text: str) -> int:
    if re.fullmatch("[0-9]{1,5}", text) and 0 < int(text) < 65536:
        return int(text)
    raise UserError(f"{shown(text)!r} is not a port", "a number from 1 to 65535", ExitCode.USAGE)


def parse_check(line: bytes | str) -> Capabilities:
    """Of the JSON that ``check`` wrote. Raises ``ValueError`` if that is not what it is."""
    try:
        found = json.loads(line)
    except RecursionError:
        raise ValueError("JSON that is too deep") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError("not the result of a check that this version understands")
    mounts, docker, problems = _table(found, "mounts"), _table(found, "docker"), found.get("problems")
    return Capabilities(
        python=shown(found.get("python")),
        uid=_uid(found),
        user=shown(found.get("user")),
        home=_path(found, "home"),
        root=found.get("root") is True,
        kernel=shown(found.get("kernel")),
        mounts=Mounts(
            ok=mounts.get("ok") is True,
            how=shown(mounts.get("how")),
            allow_other=mounts.get("allow_other") is True,
            problem=shown(mounts.get("problem")),
            fix=shown(mounts.get("fix")),
        ),
        ports=shown(found.get("ports")),
        docker=Docker(_path(docker, "socket"), shown(docker.get("problem")), shown(docker.get("fix"))),
        problems=tuple(
            Problem(shown(row.get("what")), shown(row.get("fix")))
            for row in (problems[:MAX_PROBLEMS] if isinstance(problems, list) else [])
            if isinstance(row, dict) and shown(row.get("what"))
        ),
        ssh_port=_port_number(found.get("ssh_port")),
    )


def _table(of: dict[str, Any], name: str) -> dict[str, Any]:
    found = of.get(name)
    return found if isinstance(found, dict) else {}


def _uid(of: dict[str, Any]) -> int:
    uid = of.get("uid")
    if type(uid) is not int or not 0 <= uid < 2**32:
        raise ValueError("a check without a user id")
    return uid


def _port_number(value: object) -> int:
    return value if type(value) is int and 0 < value < 65536 else 0


def _path(of: dict[str, Any], name: str) -> str:
    """An absolute path as the other side's kernel knows it, or nothing."""
    found = of.get(name)
    usable = isinstance(found, str) and found.startswith("/") and "\0" not in found and len(found) <= MAX_PATH
    return str(found) if usable else ""


def shown(text: object) -> str:
    """A stranger's text as one line of printable characters; nothing, if it is no text."""
    if not isinstance(text, str):
        return ""
    plain = PlainText().receive_data(text[: 4 * MAX_SENTENCE].encode(errors="backslashreplace"))
    return " ".join(plain.split())[:MAX_SENTENCE]
