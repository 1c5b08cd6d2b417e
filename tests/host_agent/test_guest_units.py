"""Asking the guest which units failed, over a stream that a test answers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing

from host_agent import guest_units
from protocol import execio
from protocol.api import Exec, Target
from protocol.errors import ErrorCode, OpenRefused

Dial = Callable[[Target], Awaitable[trio.StapledStream]]  # type: ignore[type-arg]


def guest(*answers: bytes | Exception) -> tuple[Dial, list[Target]]:
    """A guest in which each command in turn writes one of ``answers``; the last one again and again."""
    left = list(answers)
    dialled: list[Target] = []

    async def dial(target: Target) -> trio.StapledStream:  # type: ignore[type-arg]
        dialled.append(target)
        answer = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(answer, Exception):
            raise answer
        ours, theirs = trio.testing.memory_stream_pair()
        await theirs.send_all(execio.encode(execio.Stdout(answer)) + execio.encode(execio.Exit(0)))
        return ours

    return dial, dialled


FAILED = b"agentctl-data.service loaded failed failed agentctl data disk\n"


async def test_a_failed_data_disk_is_named_before_what_follows_from_it() -> None:
    dial, dialled = guest(b"docker.service loaded failed failed Docker\n" + FAILED)
    assert await guest_units.wait_for_failure(dial) == guest_units.NEEDED["agentctl-data.service"]
    (asked,) = dialled
    assert isinstance(asked, Exec)
    assert asked.user == "root"


async def test_it_waits_while_nothing_that_is_needed_fails(autojump_clock: trio.testing.MockClock) -> None:
    unreachable = OpenRefused(ErrorCode.GONE, "no guest")
    dial, dialled = guest(b"", b"cups.service loaded failed failed CUPS\n", unreachable, FAILED)
    started = trio.current_time()
    await guest_units.wait_for_failure(dial)
    assert len(dialled) == 4
    assert trio.current_time() - started == pytest.approx(3 * guest_units.CHECK_INTERVAL)


async def test_a_guest_that_never_stops_talking_is_not_remembered_whole() -> None:
    ours, theirs = trio.testing.memory_stream_pair()

    async def dial(_: Target) -> trio.StapledStream:  # type: ignore[type-arg]
        return ours

    flood = execio.encode(execio.Stdout(b"x" * 30_000))
    for _ in range(10):
        await theirs.send_all(flood)
    await theirs.send_all(execio.encode(execio.Exit(0)))
    assert len(await guest_units.run_in_guest(dial, ["yes"])) == guest_units.MAX_ANSWER
