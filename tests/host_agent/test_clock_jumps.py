"""Nobody sets the clock of the machine that the tests run on; so its jumps come from a descriptor of the test's."""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import trio
import trio.testing

from host_agent import clock_jumps
from host_agent.clock_jumps import DRIFT_NS, INTERVAL


class Jumps:
    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> None:
        self.count += 1


@pytest.fixture
def jumps() -> Jumps:
    return Jumps()


def _timers() -> set[str]:
    found = set()
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the one that the list was read by
            if os.readlink(f"/proc/self/fd/{descriptor}") == "anon_inode:[timerfd]":
                found.add(descriptor)
    return found


def _described(descriptor: str) -> dict[str, str]:
    lines = Path(f"/proc/self/fdinfo/{descriptor}").read_text().splitlines()
    return dict(line.split(":", 1) for line in lines if ":" in line)


@pytest.mark.skipif(sys.platform != "linux", reason="timerfd is Linux's")
async def test_the_kernel_is_listened_to_and_says_nothing_without_a_jump(
    jumps: Jumps, nursery: trio.Nursery
) -> None:
    before = _timers()
    nursery.start_soon(clock_jumps.watch, jumps)
    await trio.testing.wait_all_tasks_blocked()
    [descriptor] = _timers() - before
    fields = _described(descriptor)
    # proc(5): clockid 0 is CLOCK_REALTIME; settime flags 3: absolute, and cancelled when the clock is set.
    assert fields["clockid"].strip() == "0"
    assert int(fields["settime flags"], 8) == 3
    await trio.sleep(0.1)
    assert jumps.count == 0
    nursery.cancel_scope.cancel()
    with trio.CancelScope(shield=True):
        await trio.testing.wait_all_tasks_blocked()
    assert _timers() == before


async def test_each_jump_is_told(
    jumps: Jumps, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = os.pipe()
    os.set_blocking(reader, False)

    class Timer:
        def set(self) -> None:
            os.read(reader, 100)

        async def wait(self) -> None:
            await trio.lowlevel.wait_readable(reader)

        def close(self) -> None:
            os.close(reader)

    monkeypatch.setattr(clock_jumps, "_Timer", Timer)
    nursery.start_soon(clock_jumps.watch, jumps)
    for expected in (1, 2):
        os.write(writer, b"x")
        with trio.fail_after(10):
            while jumps.count < expected:
                await trio.sleep(0.001)
        await trio.sleep(0.01)
        assert jumps.count == expected
    nursery.cancel_scope.cancel()
    os.close(writer)


async def test_without_such_a_timer_the_clocks_are_compared(
    jumps: Jumps,
    nursery: trio.Nursery,
    monkeypatch: pytest.MonkeyPatch,
    autojump_clock: trio.testing.MockClock,
) -> None:
    class Timer:
        def __init__(self) -> None:
            raise OSError("not here")

    apart = 0
    monkeypatch.setattr(clock_jumps, "_Timer", Timer)
    monkeypatch.setattr(time, "time_ns", lambda: 10**18 + apart)
    monkeypatch.setattr(time, "monotonic_ns", lambda: 10**9)
    nursery.start_soon(clock_jumps.watch, jumps)
    await trio.sleep(10 * INTERVAL)
    apart = DRIFT_NS
    await trio.sleep(2 * INTERVAL)
    assert jumps.count == 0
    for number, jump in enumerate((DRIFT_NS + 1, -10 * DRIFT_NS), start=1):
        apart += jump
        await trio.sleep(10 * INTERVAL)
        assert jumps.count == number
