"""Programs that speak SSH (editors above all) in the VM: ``agentctl ssh-config``, and what it leads to.

The VM's sshd has no port on the host. ssh is told to run ``agentctl ssh-proxy``, whose stdin and stdout are a
connection to it over the link. So who may connect is who may use the instance's folder, and there is no stranger whose
host key would have to be doubted. The law: an instance has one key, made once, which its host agent tells each guest;
without ssh-keygen there is none, and nothing else misses it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pwd
import re
import secrets
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Final

import trio

from host_agent import docker_context
from host_agent.errors import ExitCode, UserError
from host_agent.paths import Home, InstancePaths
from protocol.api import DialTcp
from protocol.errors import OpenRefused
from protocol.link import Link
from protocol.splice import splice

logger = logging.getLogger(__name__)

#: Where sshd listens in the guest (ssh.socket).
SSHD: Final = DialTcp("127.0.0.1", 22)
#: A user of the host is one of the guest by the same name, if useradd(8) takes it.
_GUEST_USER: Final = re.compile(r"[a-z_][a-z0-9_-]{0,30}")
_OTHER_USER: Final = "agentctl"
#: ssh-keygen takes milliseconds; one that waits for something is not waited for, seconds.
_KEYGEN_TIME: Final = 20.0


def guest_user() -> str:
    """What the default user of the guest is called."""
    name = pwd.getpwuid(os.geteuid()).pw_name
    return name if _GUEST_USER.fullmatch(name) else _OTHER_USER


def public_key(paths: InstancePaths) -> str:
    """Of the instance's key, which is made if there is none yet. Raises ``UserError`` if that cannot be done."""
    if not paths.ssh_key.exists():
        _make(paths)
    # Asked for rather than kept beside it: two files can be of two keys.
    return _ssh_keygen("-y", "-f", str(paths.ssh_key)).strip()


def _make(paths: InstancePaths) -> None:
    key = paths.directory / f".ssh_key-{secrets.token_hex(4)}"
    try:
        _ssh_keygen("-q", "-t", "ed25519", "-N", "", "-C", f"agentctl {paths.name}", "-f", str(key))
        with contextlib.suppress(FileExistsError):  # another was first
            os.link(key, paths.ssh_key)
    finally:
        for made in (key, key.with_name(f"{key.name}.pub")):
            made.unlink(missing_ok=True)


def _ssh_keygen(*words: str) -> str:
    try:
        done = subprocess.run(
            ["ssh-keygen", *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_KEYGEN_TIME,
            check=False,
        )
    except FileNotFoundError:
        raise UserError(
            "ssh-keygen is not installed",
            "install it, on Debian and Ubuntu with: sudo apt-get install openssh-client",
            ExitCode.DEPENDENCY,
        ) from None
    except (subprocess.TimeoutExpired, OSError) as error:
        raise UserError(f"ssh-keygen cannot be run: {error}", exit_code=ExitCode.DEPENDENCY) from None
    if done.returncode:
        raise UserError(f"ssh-keygen failed: {done.stderr.strip()}", exit_code=ExitCode.DEPENDENCY)
    return done.stdout


def authorized_keys(paths: InstancePaths) -> list[str]:
    """For the guest: the key, or nothing if there can be none."""
    try:
        return [public_key(paths)]
    except (UserError, OSError) as error:
        logger.warning("there is no key for ssh: %s", error)
        return []


def config(home: Home, paths: InstancePaths) -> str:
    """A section of ssh_config(5). Raises ``UserError`` if there can be no key."""
    public_key(paths)
    name = docker_context.context_name(paths.name)
    lines = [
        f"Host {name}",
        f"  HostName {name}",
        f"  User {guest_user()}",
        f"  IdentityFile {_quoted(paths.ssh_key)}",
        "  IdentitiesOnly yes",
        f"  ProxyCommand {_proxy_command(home, paths)}",
        # What is at the other end of our own socket is the VM; its host key would be news with each data disk.
        "  StrictHostKeyChecking no",
        "  UserKnownHostsFile /dev/null",
        "  LogLevel ERROR",
    ]
    return "\n".join(lines) + "\n"


def _quoted(path: Path) -> str:
    """A word of ssh_config(5), which expands ``%``."""
    return '"' + str(path).replace("%", "%%") + '"'


def _proxy_command(home: Home, paths: InstancePaths) -> str:
    """This program, from wherever ssh is called, and with its home, which ssh's environment may not tell."""
    installed = Path(sys.argv[0]).absolute()
    variables = {}
    if home != Home.usual():
        variables["AGENTCTL_HOME"] = str(home.root)
    if installed.name == "agentctl" and os.access(installed, os.X_OK):
        program = [str(installed)]
    else:
        variables["PYTHONPATH"] = str(Path(__file__).parent.parent)
        program = [sys.executable, "-m", "host_agent"]
    environment = ["env", *(f"{name}={value}" for name, value in variables.items())] if variables else []
    words = [*environment, *program, "--instance", paths.name, "ssh-proxy"]
    return shlex.join(words).replace("%", "%%")


async def relay(link: Link) -> None:
    """Our stdin and stdout are a connection to the guest's sshd, until both sides have ended."""
    try:
        stream = await link.open(SSHD)
    except OpenRefused as error:
        message = f"the VM's SSH server does not answer: {error.message}"
        raise UserError(message, "see: agentctl logs --component system", ExitCode.GUEST) from None
    ours = trio.StapledStream(
        trio.lowlevel.FdStream(os.dup(sys.stdout.fileno())),
        trio.lowlevel.FdStream(os.dup(sys.stdin.fileno())),
    )
    await splice(ours, stream)
