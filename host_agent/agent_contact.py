"""What whoever talks to a host agent needs, in whatever way they do: how to introduce oneself, what goes wrong."""

from __future__ import annotations

import os

from host_agent.errors import ExitCode, UserError
from host_agent.paths import InstancePaths
from protocol import PROTOCOL_MAJOR, PROTOCOL_MINOR, build
from protocol.errors import ErrorCode, LinkError
from protocol.messages import Hello

#: A host agent that was killed is back within this time, seconds.
RESTART_TIME = 5.0


class ConnectionLost(UserError):
    """The host agent went away while it was being talked to."""


def hello(name: str) -> Hello:
    """How a process of this host introduces itself."""
    return Hello(
        major=PROTOCOL_MAJOR,
        minor=PROTOCOL_MINOR,
        digest=build.digest(),
        boot_id="",
        capabilities=[],
        name=f"{name}[{os.getpid()}]",
    )


def not_running(paths: InstancePaths) -> UserError:
    return UserError(f"instance {paths.name} is not running", "start it: agentctl up", ExitCode.NOT_RUNNING)


def lost(paths: InstancePaths, error: LinkError) -> UserError:
    """What the end of a connection means to its user."""
    if error.code is ErrorCode.VERSION:
        return UserError(
            f"the running instance is of another version of agentctl: {error}",
            "restart it: agentctl stop --force, then agentctl up",
        )
    return ConnectionLost(
        f"the connection to instance {paths.name} was lost: {error}", "see: agentctl status"
    )
