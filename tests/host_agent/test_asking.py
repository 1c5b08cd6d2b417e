"""One question on a socket that blocks: an answer, or the same sentence that a link would have led to."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import trio

from host_agent import asking, state
from host_agent.agent_contact import ConnectionLost, hello
from host_agent.asking import ask
from host_agent.errors import ExitCode, UserError
from host_agent.paths import InstancePaths
from protocol import messages
from protocol.api import GetForwards, GetStatus, GetUsage, InstanceStatus
from protocol.errors import ErrorCode, RpcError
from tests.host_agent.stand_in import STATUS, Agent, running


async def asked(paths: InstancePaths) -> InstanceStatus:
    return await trio.to_thread.run_sync(ask, paths, GetStatus())


async def test_the_answer(instance: InstancePaths) -> None:
    with trio.fail_after(20):
        async with running(instance, Agent()):
            assert await asked(instance) == STATUS
            # Any number at once, and one after the other.
            async with trio.open_nursery() as nursery:
                for _ in range(5):
                    nursery.start_soon(asked, instance)


async def test_an_answer_that_is_no(instance: InstancePaths) -> None:
    with trio.fail_after(20):
        async with running(instance, Agent()):
            with pytest.raises(RpcError, match="the table has 0 rows, so none at 7") as caught:
                await trio.to_thread.run_sync(ask, instance, GetForwards(7))
    assert caught.value.code is ErrorCode.INVALID


async def test_it_is_waited_for_as_long_as_somebody_holds_the_lock(instance: InstancePaths) -> None:
    with pytest.raises(UserError, match="instance default is not running") as caught:
        await asked(instance)
    assert caught.value.exit_code is ExitCode.NOT_RUNNING
    lock = state.try_lock(instance.lock)
    assert lock is not None
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(asked, instance)
            await trio.sleep(0.1)
            async with running(instance, Agent()):
                while nursery.child_tasks:
                    await trio.sleep(0.01)
    with pytest.raises(UserError, match="is not running"):
        ask(instance, GetStatus(), patience=0.05)
    os.close(lock)


async def test_one_of_another_version(instance: InstancePaths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "hello", lambda name: replace(hello(name), major=99))
    with trio.fail_after(20):
        async with running(instance, Agent()):
            with pytest.raises(UserError, match="of another version of agentctl") as caught:
                await asked(instance)
    assert "restart it" in caught.value.hint


@contextmanager
def puppet(paths: InstancePaths, talk: Callable[[socket.socket], None]) -> Iterator[None]:
    """A host agent that says what the test lets it say."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(paths.agent_socket))
        listener.listen()

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                talk(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        yield
        thread.join()


def wire(*frames: messages.AnyFrame) -> bytes:
    return b"".join(b"".join(messages.encode(frame)) for frame in frames)


GREETING = hello("agentctl-host")


@pytest.mark.parametrize(
    "said",
    [b"", b"\x00", b"GET / HTTP/1.0\r\n\r\n", wire(GREETING), wire(GREETING)[:-1]],
    ids=["nothing", "a byte", "nonsense", "a greeting", "half of one"],
)
def test_one_that_ends_before_it_answers(instance: InstancePaths, said: bytes) -> None:
    with puppet(instance, lambda connection: connection.sendall(said)):
        with pytest.raises(ConnectionLost, match="the connection to instance default was lost"):
            ask(instance, GetStatus())


def test_an_answer_of_another_shape(instance: InstancePaths) -> None:
    with puppet(instance, lambda connection: connection.sendall(wire(GREETING, messages.Reply(1, [7])))):
        with pytest.raises((RpcError, ConnectionLost)):
            ask(instance, GetUsage())


def test_one_that_never_answers(instance: InstancePaths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "ANSWER_TIME", 0.2)

    def talk(connection: socket.socket) -> None:
        connection.sendall(wire(GREETING))
        while connection.recv(65536):
            pass

    started = time.monotonic()
    with puppet(instance, talk):
        with pytest.raises(RpcError, match=r"no answer to status within 0\.2 s") as caught:
            ask(instance, GetStatus())
    assert caught.value.code is ErrorCode.TIMEOUT
    assert time.monotonic() - started < 10
