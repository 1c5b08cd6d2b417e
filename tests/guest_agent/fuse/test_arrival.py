"""Who waits for what was asked for already, and whose caller it is afterwards."""

from __future__ import annotations

from guest_agent.fuse.arrival import Arrival
from guest_agent.fuse.operation import spawn


class Callers:
    caller = 0


def waiting(arrival: Arrival, callers: Callers, unique: int, caller: int) -> list[int]:
    """Gets the caller as soon as the wait is over."""
    seen: list[int] = []

    async def wait() -> None:
        await arrival.until(unique)
        seen.append(callers.caller)

    callers.caller = caller
    spawn(wait())
    callers.caller = 0
    return seen


def test_all_go_on_as_who_they_are() -> None:
    callers = Callers()
    arrival = Arrival(callers)
    first, second = waiting(arrival, callers, 2, 41), waiting(arrival, callers, 4, 42)
    callers.caller = 7
    arrival.end()
    assert (first, second, callers.caller) == ([41], [42], 7)
    arrival.end()
    assert (first, second) == ([41], [42])


def test_who_has_had_a_signal_goes_on_alone() -> None:
    callers = Callers()
    arrival = Arrival(callers)
    first, second = waiting(arrival, callers, 2, 41), waiting(arrival, callers, 4, 42)
    arrival.leave(4)
    arrival.leave(6)
    assert (first, second) == ([], [42])
    arrival.end()
    assert (first, second) == ([41], [42])
