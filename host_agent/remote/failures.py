"""Why there is no connection to a machine, in sentences.

The law: every failure is a ``UserError``: ``Refused`` does not get better by trying again, ``Unreachable`` may. What
the machine says of it is a stranger's text, bounded and plain.
"""

from __future__ import annotations

import shlex
import socket

import asyncssh

from host_agent.errors import ExitCode, UserError
from host_agent.remote.machine import Address, shown


class Refused(UserError):
    """Does not get better by trying again."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint, ExitCode.GUEST)


class Unreachable(UserError):
    """May get better by itself."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint, ExitCode.GUEST)


def try_it(target: Address) -> str:
    """A hint: what shows the same failure with more words."""
    words = ["ssh", *(["-p", str(target.port)] if target.port else [])]
    return f"Try it with: {shlex.join([*words, (f'{target.user}@' if target.user else '') + target.host])}"


def unanswered(question: str, target: Address, given: asyncssh.SSHClientConnectionOptions) -> Refused:
    """The machine wants something for this login alone, and has not had it."""
    return Refused(
        f"{given.host}:{given.port} wants an answer at each login: {question.splitlines()[-1]}",
        "Attach it again, at a terminal, and give one that was not used. To be spared that, let a key suffice there.",
    )


def explained(
    error: Exception, target: Address, given: asyncssh.SSHClientConnectionOptions
) -> Refused | Unreachable:
    """Why there is no connection, in a sentence."""
    where = f"{given.host}:{given.port}"
    if isinstance(error, Refused | Unreachable):
        return error
    if isinstance(error, asyncssh.PermissionDenied):
        return Refused(
            f"{where} lets {given.username} in with none of the keys there are.",
            f"It must be possible to log in with a key, from your ssh-agent or ~/.ssh. {try_it(target)}",
        )
    if isinstance(error, asyncssh.DisconnectError) and "authentication failures" in error.reason:
        return Refused(
            f"{where} had seen enough keys before one that lets {given.username} in.",
            f"Name the right one in ~/.ssh/config, with IdentityFile and IdentitiesOnly yes. {try_it(target)}",
        )
    if isinstance(error, asyncssh.KeyExchangeFailed | asyncssh.ProtocolNotSupported):
        return Refused(
            f"{where} and this machine have no way to speak to each other: {shown(str(error))}.",
            try_it(target),
        )
    if isinstance(error, socket.gaierror):
        return Unreachable(f"There is no address for {given.host}: {error.strerror}.", try_it(target))
    if isinstance(error, ConnectionRefusedError):
        return Unreachable(f"{where} refuses connections: is sshd running there?", try_it(target))
    if isinstance(error, asyncssh.Error):
        return Unreachable(f"The connection to {where} failed: {said(error)}.", try_it(target))
    if isinstance(error, OSError):
        return Unreachable(f"{where} cannot be reached: {said(error)}.", try_it(target))
    if isinstance(error, ValueError):  # a key, or a word of the configuration
        return Refused(f"{where} cannot be connected to: {shown(str(error))}.", try_it(target))
    return Unreachable(f"The connection to {where} failed: {shown(repr(error))}.", try_it(target))


def said(error: Exception | None) -> str:
    """Why, as a clause."""
    if isinstance(error, asyncssh.ConnectionLost) or error is None:
        return "the machine or the network between has closed it"
    if isinstance(error, asyncssh.Error):
        return shown(error.reason) or type(error).__name__
    return (error.strerror if isinstance(error, OSError) else None) or shown(str(error))
