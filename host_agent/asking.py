"""One question to a host agent, without trio: what a command that has to be quick says.

The same protocol as everybody's (``protocol.session``), on a socket that blocks. To import trio and all that drives a
link takes longer than the question.
"""

from __future__ import annotations

import socket
import time
from typing import TypeVar

from host_agent import state
from host_agent.agent_contact import RESTART_TIME, hello, lost, not_running
from host_agent.paths import InstancePaths
from protocol import codec, messages
from protocol.api import Request
from protocol.errors import DecodeError, ErrorCode, LinkError, RpcError
from protocol.session import Ended, Event, Role, Session, TimedOut

ReplyT = TypeVar("ReplyT")

#: How long the answer may take, seconds.
ANSWER_TIME = 30.0

#: Between two attempts to connect, seconds.
RETRY = 0.02

READ_SIZE = 128 * 1024


def ask(paths: InstancePaths, question: Request[ReplyT], patience: float = RESTART_TIME) -> ReplyT:
    """The host agent's answer. One that does not listen yet is waited for up to ``patience`` seconds.

    Raises ``UserError`` (``ConnectionLost``, NOT_RUNNING) and ``RpcError``, as a link does.
    """
    with _connected(paths, patience) as connection:
        try:
            return _asked(connection, question)
        except LinkError as error:
            raise lost(paths, error) from None
        except OSError as error:
            raise lost(paths, LinkError(f"the transport failed: {error}")) from None


def _connected(paths: InstancePaths, patience: float) -> socket.socket:
    deadline = time.monotonic() + patience
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(str(paths.agent_socket))
            return connection
        except OSError:
            connection.close()
            # Without a holder of the lock there is nobody who could start to answer.
            if time.monotonic() >= deadline or not state.is_locked(paths.lock):
                raise not_running(paths) from None
            time.sleep(RETRY)


def _asked(connection: socket.socket, question: Request[ReplyT]) -> ReplyT:
    session = Session(Role.CLIENT, hello("agentctl"), time.monotonic())
    while True:
        if output := b"".join(session.data_to_send().buffers):
            connection.sendall(output)
        for event in _next_events(session, connection):
            match event:
                case messages.Hello():
                    session.request(question.METHOD, codec.encode(question), ANSWER_TIME, time.monotonic())
                case messages.Reply(value=value):
                    return _decoded(question, value)
                case messages.Failure(code=code, message=message, hint=hint):
                    raise RpcError(ErrorCode.parse(code), message, hint)
                case TimedOut():
                    words = f"no answer to {question.METHOD} within {ANSWER_TIME:g} s"
                    raise RpcError(ErrorCode.TIMEOUT, words)
                case Ended(error=error):
                    raise error


def _next_events(session: Session, connection: socket.socket) -> list[Event]:
    connection.settimeout(max(0.001, session.next_timeout() - time.monotonic()))
    try:
        data = connection.recv(READ_SIZE)
    except TimeoutError:
        return session.handle_timeout(time.monotonic())
    if data:
        return session.receive_data(data, time.monotonic())
    return session.receive_eof()


def _decoded(question: Request[ReplyT], value: object) -> ReplyT:
    try:
        reply: ReplyT = codec.decode(question.REPLY, value)
    except DecodeError as error:
        raise RpcError(ErrorCode.PROTOCOL, f"the reply to {question.METHOD}: {error}") from error
    return reply
