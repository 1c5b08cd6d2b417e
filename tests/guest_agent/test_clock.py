"""The clock of a guest that is a record; that of the machine is only moved where nobody may."""

from __future__ import annotations

import os
import time

import pytest

from guest_agent.clock import TOLERANCE_NS, Clock, WallClock
from protocol.api import AdjustClock
from protocol.errors import ErrorCode, RpcError

NOW = 1_800_000_000 * 10**9


class Recorded(WallClock):
    def __init__(self) -> None:
        self.now = NOW
        self.slewed: list[int] = []
        self.error: Exception | None = None

    def now_ns(self) -> int:
        return self.now

    def step(self, by_ns: int) -> None:
        if self.error:
            raise self.error
        self.now += by_ns

    def slew(self, by_ns: int) -> None:
        self.slewed.append(by_ns)


async def test_to_be_asked_moves_nothing() -> None:
    wall = Recorded()
    assert (await Clock(wall).adjust(AdjustClock())).now_ns == NOW
    assert (wall.now, wall.slewed) == (NOW, [])


@pytest.mark.parametrize("by", [TOLERANCE_NS + 1, -TOLERANCE_NS - 1, 3600 * 10**9])
async def test_what_is_far_off_is_set_at_once(by: int) -> None:
    wall = Recorded()
    assert (await Clock(wall).adjust(AdjustClock(by))).now_ns == NOW + by
    assert (wall.now, wall.slewed) == (NOW + by, [])


@pytest.mark.parametrize("by", [TOLERANCE_NS, -TOLERANCE_NS, 1])
async def test_the_rest_is_made_up_for(by: int) -> None:
    wall = Recorded()
    assert (await Clock(wall).adjust(AdjustClock(by))).now_ns == NOW
    assert (wall.now, wall.slewed) == (NOW, [by])


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (PermissionError(1, "Operation not permitted"), ErrorCode.DENIED),
        (OSError(22, "Invalid argument"), ErrorCode.INVALID),
        (OverflowError("too large"), ErrorCode.INVALID),
    ],
)
async def test_what_cannot_be_is_an_error(error: Exception, code: ErrorCode) -> None:
    wall = Recorded()
    wall.error = error
    with pytest.raises(RpcError) as caught:
        await Clock(wall).adjust(AdjustClock(10**18))
    assert caught.value.code is code


async def test_a_time_that_the_kernel_does_not_have_leaves_the_clock_as_it_is() -> None:
    before = time.time_ns()
    for by in (-(1 << 62), (1 << 63) - 1):
        with pytest.raises(RpcError):
            await Clock().adjust(AdjustClock(by))
    assert abs(time.time_ns() - before) < 60 * 10**9


@pytest.mark.skipif(os.geteuid() == 0, reason="root may")
async def test_who_is_not_root_may_not_move_the_clock() -> None:
    for by in (1000, 10**9):
        with pytest.raises(RpcError) as caught:
            await Clock().adjust(AdjustClock(by))
        assert caught.value.code is ErrorCode.DENIED
