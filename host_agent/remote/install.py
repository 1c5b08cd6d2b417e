"""The guest agent comes to the machine: found or sent, and asked what can be done there.

The law: a command line is the same words in every login shell (sh, bash, zsh, fish, csh): one pair of single
quotes, and between them no quote, backslash, newline or exclamation mark; all that is longer goes in by
standard input. An answer is found by a mark that only this call knows, since startup files may write before
it and after it. Nothing that the machine says is believed beyond its form.

Over a long line each question costs: a machine that has this build is asked once, another one twice.
"""

from __future__ import annotations

import errno
import json
import re
import secrets
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from host_agent.errors import ExitCode, UserError
from host_agent.remote import receiver
from host_agent.remote.machine import parse_check, shown
from host_agent.remote.payload import Payload
from host_agent.remote.way import Finished
from protocol.capabilities import Capabilities

_NAMES: Final = tuple(f"python3.{minor}" for minor in range(14, 10, -1))
#: Where a Python that is new enough may be, in the order of preference. The last ones are a user's own (uv, pip), which
#: are in the PATH of a terminal, but not of a command.
PYTHONS: Final = ("python3", *_NAMES, "/usr/bin/python3", *(f"~/.local/bin/{name}" for name in _NAMES))

#: For a machine under load whose Python is on a cold disk.
LOOK_TIMEOUT: Final = 60.0
#: Bytes a second, of a line that is only just of use.
SLOWEST: Final = 20_000
#: A transfer that arrived damaged is repeated: a startup file may have taken a piece of the first one.
SENDINGS: Final = 2
#: Of what the machine wrote this much is looked through, bytes; an answer is a few kB, and the rest is noise.
MAX_NOISE: Final = 4 * 1024 * 1024
MAX_ANSWER: Final = 64 * 1024

#: Old ones are left out, and those without ctypes or ssl (Debian's python3-minimal): trio imports both.
_ENOUGH: Final = "import sys, ctypes, json, ssl; sys.exit(sys.version_info < (3, 11))"
_RECEIVE: Final = "import sys; exec(sys.stdin.buffer.read(int(sys.stdin.buffer.readline())))"


class Machine(Protocol):
    """What can run commands on the machine: ``ssh_thread.SshThread``."""

    async def run(self, command: str, input: bytes = b"", timeout: float = LOOK_TIMEOUT) -> Finished: ...


@dataclass(frozen=True, slots=True)
class Installed:
    """The agent on the machine: ``program`` and the agent's own words are a command (``command``)."""

    capabilities: Capabilities
    program: tuple[str, ...]

    def command(self, *words: str) -> str:
        return shlex.join([*self.program, *words])


@dataclass(frozen=True, slots=True)
class _Answer:
    """What the receiver said, by mark."""

    said: dict[str, str]
    noise: str

    def get(self, mark: str) -> dict[str, Any] | None:
        """The object that follows ``mark``; ``None`` if there is none, or it is not an object."""
        try:
            found = json.loads(self.said.get(mark, ""))
        except (ValueError, RecursionError):
            return None
        return found if isinstance(found, dict) else None


async def install(machine: Machine, payload: Payload, progress: Callable[[str], None]) -> Installed:
    """Make sure that ``payload`` is on the machine, and check what can be done there.

    Raises ``UserError``, and what ``machine.run`` raises.
    """
    progress("looking for the agent on the machine")
    answer = await _ask(machine, payload, b"", LOOK_TIMEOUT)
    for _ in range(SENDINGS):
        if "missing" not in answer.said and "damaged" not in answer.said:
            break
        progress(f"sending the agent to the machine ({len(payload.data) / 1e6:.1f} MB)")
        answer = await _ask(machine, payload, payload.data, LOOK_TIMEOUT + len(payload.data) / SLOWEST)
    return _installed(answer)


async def _ask(machine: Machine, payload: Payload, data: bytes, timeout: float) -> _Answer:
    nonce = secrets.token_hex(8)
    program = _receiver()
    command = look_command(nonce, payload.digest, len(data))
    done = await machine.run(command, b"%d\n" % len(program) + program + data, timeout=timeout)
    mark = rb"agentctl-([a-z]+) %b ?([^\r\n]{0,%d})" % (nonce.encode(), MAX_ANSWER)
    marked = re.finditer(mark, done.out[:MAX_NOISE])
    noise = done.err[-MAX_ANSWER:].strip() or done.out[:MAX_ANSWER].strip()
    return _Answer({found[1].decode(): _text(found[2]) for found in marked}, _text(noise))


def _text(said: bytes) -> str:
    return said.decode(errors="replace")


def _receiver() -> bytes:
    return Path(receiver.__file__).read_bytes()


def look_command(nonce: str, digest: str, length: int) -> str:
    """Finds a Python and has it read a program from standard input, which is followed by ``length`` bytes for it."""
    script = (
        f'for p in {" ".join(PYTHONS)}; do command -v "$p" >/dev/null 2>&1 && '
        f'"$p" -ISc "{_ENOUGH}" </dev/null >/dev/null 2>&1 && '
        f'exec "$p" -ISc "{_RECEIVE}" "$p" {nonce} {digest} {length}; done; echo; '
        f"echo agentctl-nopython {nonce} $(command -v python3 >/dev/null 2>&1 && python3 -V 2>&1)"
    )
    return f"sh -c '{script}'"


def _installed(answer: _Answer) -> Installed:
    said = answer.said
    if "nopython" in said:
        raise _no_python(said["nopython"])
    if (found := answer.get("system")) is not None:
        raise UserError(f"the machine runs {shown(found.get('system'))}, not Linux", "attach a Linux machine")
    if (found := answer.get("failed")) is not None:
        raise _failed(found)
    if "damaged" in said:
        raise UserError(
            "the agent does not arrive at the machine as it was sent",
            "see whether the startup files of its login shell (~/.bashrc) read from standard input",
            ExitCode.GUEST,
        )
    here = answer.get("here")
    if here is None:
        raise _said(answer, "the machine did not run a command as it should")
    try:
        capabilities = parse_check(said.get("check", ""))
    except ValueError:
        raise _said(answer, "the agent does not run on the machine") from None
    return Installed(capabilities, (_word(here.get("python")), "-IS", _word(here.get("archive"))))


def _word(text: object) -> str:
    """An absolute path that ``shlex.quote`` quotes alike for every shell. Raises ``UserError`` if it is none."""
    if not isinstance(text, str) or not re.fullmatch(r"/[^'\\!]{1,1000}", text) or not text.isprintable():
        raise UserError(
            f"a path on the machine cannot be part of a command there: {shown(text)}",
            "it takes a home whose path has no quotes, backslashes or exclamation marks in it",
            ExitCode.GUEST,
        )
    return text


def _no_python(said: str) -> UserError:
    version = shown(said)
    if not version:
        problem, package = "the machine has no Python 3.11 or newer", "python3"
    elif (known := re.match(r"Python 3\.(\d+)", version)) and int(known[1]) >= 11:
        problem, package = (
            f"{version} on the machine lacks a part of its library (ctypes, json or ssl)",
            "python3",
        )
    else:
        problem, package = f"the machine has no Python 3.11 or newer: its python3 is {version}", "python3.11"
    hint = f"install one there, on Debian and Ubuntu with: sudo apt-get install {package}"
    return UserError(problem, hint, ExitCode.DEPENDENCY)


def _failed(found: dict[str, Any]) -> UserError:
    path, number = shown(found.get("path")), found.get("errno")
    problem = shown(found.get("problem"))
    match number:
        case errno.ENOSPC | errno.EDQUOT:
            return UserError(
                f"there is no room for the agent on the machine: {problem} ({path})",
                "make room for about 12 MB there",
                ExitCode.RESOURCES,
            )
        case errno.EACCES | errno.EPERM | errno.EROFS | errno.ENOENT | errno.ENOTDIR:
            return UserError(
                f"the agent cannot be put on the machine: {problem} ({path})",
                "it takes a home there, with a folder ~/.cache that its user can write to",
                ExitCode.GUEST,
            )
        case _:
            return UserError(
                f"the agent cannot be put on the machine: {problem}", path and f"see {path} there"
            )


def _said(answer: _Answer, problem: str) -> UserError:
    lines = [line for line in answer.noise.splitlines() if line.strip() and "agentctl-" not in line]
    # Of a traceback the last line says what it is.
    if lines:
        problem = f"{problem}; it said: {shown(lines[-1])}"
    return UserError(problem, "see whether ssh to it runs this: python3 --version", ExitCode.GUEST)
