"""Coroutines without tasks: each request is answered once, whatever its operation does."""

from __future__ import annotations

import errno
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from guest_agent.fuse.operation import Pause, Resume, Timers, Wait, start
from tests.guest_agent.fuse.script import ScriptedKernel, ScriptedTimers, failed, replied


class Gate:
    """A wait that the test ends, or that has ended already."""

    def __init__(self, value: object = None, *, open_: bool = False) -> None:
        self.value = value
        self.open = open_
        self.resume: Resume | None = None

    def __await__(self) -> Any:
        value = yield self
        return value

    def begin(self, resume: Resume) -> None:
        if self.open:
            resume(self.value)
        else:
            self.resume = resume


class Broken:
    def __await__(self) -> Any:
        yield self

    def begin(self, resume: Resume) -> None:
        raise RuntimeError("cannot begin")


async def after(*waits: Any) -> bytes:
    return b"".join([await wait for wait in waits])


def run(operation: Any) -> ScriptedKernel:
    kernel = ScriptedKernel()
    start(operation, kernel, 8)
    return kernel


def test_an_operation_that_waits_for_nothing() -> None:
    assert run(after()).log == replied(8)


def test_it_goes_on_with_what_it_waited_for() -> None:
    gate = Gate()
    kernel = run(after(Gate(b"a", open_=True), gate, Gate(b"c", open_=True)))
    assert kernel.log == []
    assert gate.resume is not None
    gate.resume(b"b")
    assert kernel.log == replied(8, b"abc")


@pytest.mark.parametrize(
    ("error", "name"),
    [(OSError(errno.ENOSPC, ""), "ENOSPC"), (OSError("no number"), "EIO"), (ValueError("a bug"), "EIO")],
)
def test_errors_become_errnos(error: Exception, name: str, caplog: pytest.LogCaptureFixture) -> None:
    async def fail() -> bytes:
        raise error

    assert run(fail()).log == failed(8, name)
    assert ("a bug" in caplog.text) == isinstance(error, ValueError)


def test_a_wait_that_cannot_begin_is_an_error_too() -> None:
    assert run(after(Broken())).log == failed(8, "EIO")


def test_a_pause_ends_once() -> None:
    timers = ScriptedTimers()
    outcomes: list[bool] = []
    pause = Pause(timers, 0.5)  # type: ignore[arg-type]
    wait: Wait = pause
    wait.begin(outcomes.append)
    assert timers.fire() == 0.5
    pause.interrupt()
    assert outcomes == [False]


def test_a_pause_that_is_interrupted_says_so() -> None:
    timers = ScriptedTimers()
    outcomes: list[bool] = []
    pause = Pause(timers, 0.5)  # type: ignore[arg-type]
    pause.begin(outcomes.append)
    pause.interrupt()
    timers.fire()
    assert outcomes == [True]


async def test_timers_fire_when_they_are_due(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    fired: list[str] = []
    timers = Timers(nursery)
    timers.after(2, lambda: fired.append("two"))
    timers.after(1, lambda: fired.append("one"))
    await trio.sleep(1.5)
    assert fired == ["one"]
    await trio.sleep(1)
    assert fired == ["one", "two"]
