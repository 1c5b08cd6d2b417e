"""What ~/.ssh/config and the system's say of a machine: who is let in there, with which keys, and who it is.

asyncssh reads them, but fails over an IdentityFile that is missing and over "none", takes a switched off
``UserKnownHostsFile`` as leave to believe everyone, and does not know the system's files: that is done here.
"""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path
from typing import Any, Final

import asyncssh

from host_agent.remote.failures import Refused, try_it
from host_agent.remote.machine import Address

logger = logging.getLogger(__name__)

#: In ~/.ssh, as ssh tries them.
USUAL_KEYS: Final = ("id_ed25519", "id_ecdsa", "id_rsa", "id_ed25519_sk", "id_ecdsa_sk")

SYSTEM: Final = Path("/etc/ssh")


async def read(target: Address) -> asyncssh.SSHClientConnectionOptions:
    """What the configuration says of a machine. No key is loaded yet."""
    files = [file for file in (Path.home() / ".ssh/config", SYSTEM / "ssh_config") if _readable(file)]
    try:
        try:
            return await _read(target, files)
        except asyncssh.ConfigParseError as error:
            # The system's file is written for ssh alone, and not the user's to mend.
            if not files or files[-1].parent != SYSTEM:
                raise
            logger.info("%s is left out: %s", files[-1], error)
            return await _read(target, files[:-1])
    except (asyncssh.ConfigParseError, ValueError, OSError) as error:
        raise Refused(f"~/.ssh/config cannot be used: {error}.", try_it(target)) from None


async def _read(target: Address, files: list[Path]) -> asyncssh.SSHClientConnectionOptions:
    words: dict[str, Any] = {"host": target.host, "config": files, "client_keys": None}
    if target.user is not None:
        words["username"] = target.user
    if target.port is not None:
        words["port"] = target.port
    # A `Match exec` runs a program, and files may be on a network.
    return await asyncio.to_thread(lambda: asyncssh.SSHClientConnectionOptions(**words))


def known_hosts_files(given: asyncssh.SSHClientConnectionOptions) -> list[Path]:
    """The user's, into the first of which what they say yes to is written, and the system's."""
    system = given.config.get("GlobalKnownHostsFile")
    return [
        *_own_known_hosts(given),
        *([SYSTEM / "ssh_known_hosts", SYSTEM / "ssh_known_hosts2"] if system is None else _paths(system)),
    ]


def _own_known_hosts(given: asyncssh.SSHClientConnectionOptions) -> list[Path]:
    """Those that the configuration names, or the usual ones; also where it names none, or /dev/null, so that everybody
    is believed: what somebody has said yes to is to be found again."""
    named = _paths(given.config.get("UserKnownHostsFile"))
    usual = [Path.home() / ".ssh" / name for name in ("known_hosts", "known_hosts2")]
    return [path for path in named if path != Path(os.devnull)] or usual


def keys(given: asyncssh.SSHClientConnectionOptions) -> dict[str, Any]:
    """Which keys there are: those that the configuration names, or the usual ones.

    ssh passes over what is not there, and what is only a public key is the agent's to use. (Without a list asyncssh
    takes the usual ones, too, and cannot ask for their passphrases.)
    """
    config = given.config
    named = _paths(config.get("IdentityFile", ()))
    usual = [Path.home() / ".ssh" / name for name in USUAL_KEYS]
    private = [str(path) for path in named or usual if _has_private_key(path)]
    words: dict[str, Any] = {"ignore_encrypted": True, "client_keys": private}
    if config.get("IdentitiesOnly") and named:
        public = [path if path.suffix == ".pub" else path.with_name(path.name + ".pub") for path in named]
        found = [str(path) for path in public if _readable(path)]
        # No identity at all is no restriction to asyncssh: the machine would be shown all keys of the agent's.
        words |= {"agent_identities": found} if found else {"agent_path": None}
    agent = config.get("IdentityAgent")
    if agent is not None and is_none(agent):
        words["agent_path"] = None
    return words


def _paths(value: object) -> list[Path]:
    """Of an option that may name several files, or none."""
    names = [value] if isinstance(value, str) else list(value) if isinstance(value, list | tuple) else []
    return [Path(name).expanduser() for name in names if not is_none(name)]


def is_none(value: object) -> bool:
    """How an option is switched off; a command is a list of words."""
    words = value if isinstance(value, list | tuple) else [value]
    return len(words) == 1 and str(words[0]).lower() == "none"


def _has_private_key(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return b"PRIVATE KEY" in file.read(4096)
    except OSError:
        return False


def _readable(path: Path) -> bool:
    return path.is_file() and os.access(path, os.R_OK)


def short(file: str) -> str:
    """With ~ for the home folder."""
    path = Path(file)
    return f"~/{path.relative_to(Path.home())}" if path.is_relative_to(Path.home()) else file
