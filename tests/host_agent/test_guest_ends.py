"""Who answers, of all that map to one end of the host."""

from __future__ import annotations

import time

import pytest

from host_agent.guest_ends import MAX_LOOKED_AT, GuestEnds
from host_agent.rules import LOCALHOST, MAX_RULES, HostAddress, HostSocket, Static
from protocol.api import Listener, Proto

HOST = HostAddress(Proto.TCP, LOCALHOST, 8080)
BY_ITSELF = MAX_RULES + 1


def on(port: int, address: str = "0.0.0.0", unit: str = "") -> Listener:
    return Listener(Proto.TCP, address, port, unit)


def test_the_place_of_the_rule_decides_then_the_number_then_the_address() -> None:
    ends = GuestEnds(HOST)
    ends.join(on(7070), BY_ITSELF)
    assert (ends.port, ends.rank) == (7070, BY_ITSELF)
    ends.join(on(8080, "::"), BY_ITSELF)
    assert ends.port == 8080
    ends.join(on(9090), 2)
    ends.join(on(9090, "10.0.0.1"), 2)
    assert (ends.port, ends.rank) == (9090, 2)
    assert ends.targets() == (("127.0.0.1", 9090), ("10.0.0.1", 9090))
    ends.leave(on(9090), 2)
    ends.leave(on(9090, "10.0.0.1"), 2)
    assert ends.targets() == (("::1", 8080),)


def test_who_shares_the_port_stands_in_and_who_only_shares_the_end_does_not() -> None:
    """A connection, and what was said first, is for one program; another one is not its substitute."""
    ends = GuestEnds(HOST)
    ends.join(on(9090), 1)
    ends.join(on(8080), BY_ITSELF)
    ends.add(Static(HOST, Proto.TCP, "fd00::1", 9090, 1))
    assert ends.targets() == (("127.0.0.1", 9090), ("fd00::1", 9090))


def test_a_static_rule_answers_where_nobody_listens() -> None:
    ends = GuestEnds(HostSocket("/run/web.sock"))
    assert not ends
    ends.add(Static(HOST, Proto.TCP, "0.0.0.0", 81, 2))
    ends.add(Static(HOST, Proto.TCP, "0.0.0.0", 80, 1))
    assert ends
    assert not ends.listened
    assert (ends.rank, ends.targets()) == (1, (("127.0.0.1", 80),))
    ends.join(on(9090), BY_ITSELF)
    assert ends.listened
    assert (ends.rank, ends.targets()) == (1, (("127.0.0.1", 9090),))
    ends.forget_statics()
    ends.leave(on(9090), BY_ITSELF)
    assert not ends


@pytest.mark.parametrize("port", [8080, 9090])
def test_a_guest_that_makes_up_listeners_makes_no_question_expensive(port: int) -> None:
    """Neither a row of ``agentctl ports`` nor a connection looks at all of them."""
    ends = GuestEnds(HOST)
    for number in range(20_000):
        ends.join(on(port, unit=f"{number}.service"), BY_ITSELF)
    began = time.process_time()
    for _ in range(20_000):
        assert ends.port == port
    for _ in range(100):
        assert ends.targets() == (("127.0.0.1", port),)
    assert time.process_time() - began < 2
    for number in range(20_000):
        ends.leave(on(port, unit=f"{number}.service"), BY_ITSELF)
    assert not ends


def test_of_addresses_that_are_made_up_a_few_are_dialled() -> None:
    ends = GuestEnds(HOST)
    for number in range(1000):
        ends.join(on(8080, f"10.0.{number // 250}.{number % 250}"), BY_ITSELF)
    assert len(ends.targets()) == MAX_LOOKED_AT
