"""The end of asyncio's thread, which waits for nothing that does not end."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable
from typing import TypeVar

import pytest
import trio

from host_agent.remote import asyncio_thread
from host_agent.remote.asyncio_thread import AsyncioThread

T = TypeVar("T")


class Thread(AsyncioThread):
    """One that can be asked for anything."""

    async def call(self, ask: Callable[[], Awaitable[T]]) -> T:
        async def asked() -> T:
            return await ask()

        return await self._call(asked)


@pytest.fixture
async def thread(monkeypatch: pytest.MonkeyPatch) -> Thread:
    monkeypatch.setattr(asyncio_thread, "END_TIME", 0.3)
    made = Thread("tested")
    made.start()
    return made


async def test_answers_errors_and_cancellations_cross(thread: Thread) -> None:
    ended = threading.Event()

    async def sleep() -> None:
        try:
            await asyncio.sleep(1000)
        finally:
            ended.set()

    async def fail() -> None:
        raise KeyError("no")

    with trio.fail_after(20):
        assert await thread.call(lambda: asyncio.sleep(0, "answer")) == "answer"
        with pytest.raises(KeyError):
            await thread.call(fail)
        with trio.move_on_after(0.05):
            await thread.call(sleep)
        assert ended.is_set()
        await thread.aclose()


async def test_a_task_that_takes_no_cancellation_is_left_behind(
    thread: Thread, caplog: pytest.LogCaptureFixture
) -> None:
    async def stay() -> None:
        while True:
            try:
                await asyncio.sleep(1000)
            except asyncio.CancelledError:
                continue

    with trio.fail_after(20):
        with trio.move_on_after(0.05):
            await thread.call(stay)
        await thread.aclose()
    assert "does not end" in caplog.text


async def test_a_loop_that_stands_still_is_left_behind(
    thread: Thread, caplog: pytest.LogCaptureFixture
) -> None:
    released, stands = threading.Event(), threading.Event()

    async def stand_still() -> None:
        stands.set()
        released.wait()

    try:
        with trio.fail_after(20):
            with trio.move_on_after(0.05):
                await thread.call(stand_still)
            assert stands.is_set()
            await thread.aclose()
        assert "the thread tested does not end" in caplog.text
    finally:
        released.set()


UNRESOLVED = """
import socket, threading, trio
from host_agent.remote import ssh_thread
from host_agent.remote.machine import Address
asked = threading.Event()
def getaddrinfo(*_, **__):
    asked.set()
    threading.Event().wait()
socket.getaddrinfo = getaddrinfo
async def main():
    async with ssh_thread.opened(Address("a-name")):
        await trio.to_thread.run_sync(asked.wait)
trio.run(main)
print("over", flush=True)
"""


def test_a_name_that_is_still_being_looked_up_is_waited_for_by_nobody() -> None:
    """As it is for half a minute when the network has gone: neither the line's end nor the process's waits."""
    done = subprocess.run(
        [sys.executable, "-c", UNRESOLVED], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "over\n"), done.stderr
