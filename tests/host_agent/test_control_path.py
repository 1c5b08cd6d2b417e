"""Which transport when: told what happens and what the clock shows, asked what to do."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from host_agent.control_path import (
    FIRST_PAUSE,
    FIRST_PROBATION,
    LONGEST_PAUSE,
    LONGEST_PROBATION,
    LOST_AFTER,
    STEADY,
    ControlPath,
)
from protocol.api import Transport

PORT, SSH, NONE = Transport.VIRTIO_SERIAL, Transport.SSH, Transport.NONE


@pytest.fixture
def path() -> ControlPath:
    """A VM that has booted at 0, with a session over its port."""
    path = ControlPath()
    path.session(PORT, 0.0)
    path.watch(0.0)
    return path


def test_while_the_port_works_nothing_is_tried(path: ControlPath) -> None:
    assert (path.transport, path.try_at, path.port_from, path.reason) == (PORT, math.inf, -math.inf, "")


def test_a_port_is_lost_after_longer_than_an_agent_takes_to_return(path: ControlPath) -> None:
    path.session_over("the agent was killed", 100.0)
    assert (path.transport, path.changed_at) == (NONE, 100.0)
    assert path.try_at == 100.0 + LOST_AFTER
    assert not path.hopeless
    path.session(PORT, 101.0)
    assert (path.try_at, path.reason) == (math.inf, "")


def test_a_vm_that_is_found_without_a_session_has_as_long(path: ControlPath) -> None:
    found = ControlPath()
    found.watch(50.0)
    assert found.try_at == 50.0 + LOST_AFTER
    assert found.reason


def test_of_a_vm_that_boots_or_is_stopped_nothing_is_tried(path: ControlPath) -> None:
    booting = ControlPath()
    assert booting.try_at == math.inf
    path.rest()
    path.session_over("the guest shuts down", 10.0)
    assert path.try_at == math.inf


def test_over_ssh_the_reason_of_the_loss_stays_and_the_port_may_return(path: ControlPath) -> None:
    path.session_over("silence", 100.0)
    path.session(SSH, 115.0)
    assert (path.transport, path.changed_at, path.reason) == (SSH, 115.0, "silence")
    assert path.try_at == math.inf
    assert path.port_from <= 115.0


def test_attempts_become_rare_and_a_session_over_the_port_ends_that(path: ControlPath) -> None:
    path.session_over("silence", 0.0)
    now, pauses = path.try_at, []
    for _ in range(8):
        path.failed("refused", "a hint", now)
        pauses.append(path.try_at - now)
        now = path.try_at
    assert pauses[0] == FIRST_PAUSE
    assert pauses == sorted(pauses)
    assert pauses[-1] == LONGEST_PAUSE
    assert (path.attempts, path.problem, path.hint, path.hopeless) == (8, "refused", "a hint", True)
    path.session(PORT, now)
    assert (path.attempts, path.problem, path.hint, path.hopeless) == (0, "", "", False)
    path.session_over("silence", now + 5)
    assert path.try_at == now + 5 + LOST_AFTER
    path.failed("refused", "", path.try_at)
    assert path.try_at == now + 5 + LOST_AFTER + FIRST_PAUSE


def test_a_vm_that_stands_still_counts_as_no_attempt(path: ControlPath) -> None:
    path.session_over("silence", 0.0)
    path.put_off(LOST_AFTER)
    assert (path.try_at, path.attempts, path.problem) == (LOST_AFTER + FIRST_PAUSE, 0, "")


def test_sessions_over_ssh_that_end_soon_are_made_less_often(path: ControlPath) -> None:
    path.session_over("silence", 0.0)
    now, pauses = path.try_at, []
    for _ in range(3):
        path.session(SSH, now)
        path.session_over("lost", now + 1)
        pauses.append(path.try_at - (now + 1))
        now = path.try_at
    assert pauses == [FIRST_PAUSE, 2 * FIRST_PAUSE, 4 * FIRST_PAUSE]
    path.session(SSH, now)
    path.session_over("lost", now + STEADY)
    assert path.try_at == now + STEADY  # at once
    assert path.reason == "silence"


def lose_and_return(path: ControlPath, now: float, lasts: float) -> float:
    """The port is lost at ``now``, and returns; how long it had to wait beside SSH. It is there for ``lasts`` s then."""
    path.session_over("silence", now)
    path.session(SSH, now + LOST_AFTER)
    waited = max(path.port_from - (now + LOST_AFTER), 0.0)
    path.session_over("it was ended", now + LOST_AFTER + waited)
    path.session(PORT, now + LOST_AFTER + waited)
    return waited


def test_a_port_that_is_lost_again_and_again_waits_longer_each_time(path: ControlPath) -> None:
    waits = []
    now = 1000.0
    for _ in range(8):
        waits.append(lose_and_return(path, now, 1.0))
        now = path.changed_at + 1.0
    assert waits[:4] == [0.0, FIRST_PROBATION, 2 * FIRST_PROBATION, 4 * FIRST_PROBATION]
    assert waits[-1] == LONGEST_PROBATION
    # One that stays is trusted again.
    assert lose_and_return(path, path.changed_at + STEADY, 1.0) == 0.0


def test_while_ssh_is_away_as_well_the_port_need_not_wait(path: ControlPath) -> None:
    lose_and_return(path, 1000.0, 1.0)
    path.session_over("silence", path.changed_at + 1)
    path.session(SSH, 1100.0)
    assert path.port_from == 1100.0 + FIRST_PROBATION
    path.session_over("lost", 1101.0)
    assert path.port_from == -math.inf


@given(st.lists(st.tuples(st.sampled_from(["port", "ssh", "over", "failed", "off"]), st.floats(0.1, 300.0))))
def test_whatever_happens_there_is_something_left_to_hope_for(happened: list[tuple[str, float]]) -> None:
    """Without a session the port may always have the link, and SSH is tried in bounded time; with one, nothing is."""
    path, now = ControlPath(), 0.0
    path.watch(now)
    for what, later in happened:
        now += later
        if what in ("port", "ssh"):
            if path.transport is not NONE:
                path.session_over("it was ended", now)
            path.session(PORT if what == "port" else SSH, now)
        elif what == "over" and path.transport is not NONE:
            path.session_over("it was lost", now)
        elif path.transport is NONE and path.try_at <= now:
            path.failed("no", "", now) if what == "failed" else path.put_off(now)
        if path.transport is NONE:
            assert path.try_at <= now + max(LONGEST_PAUSE, LOST_AFTER)
            assert path.port_from == -math.inf
        else:
            assert path.try_at == math.inf
            assert path.port_from <= now + LONGEST_PROBATION
        assert (path.reason != "") or path.transport is PORT
