from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import LocalProtocolError, RemoteProtocolError
from protocol.window import MAX_WINDOW, ReceiveWindow, SendWindow


def test_sending_spends_and_credit_grants() -> None:
    window = SendWindow(10)
    window.spend(7)
    assert window.available == 3
    with pytest.raises(LocalProtocolError):
        window.spend(4)
    window.grant(5)
    assert window.available == 8


@pytest.mark.parametrize("count", [0, -1, MAX_WINDOW, 2**63])
def test_a_senseless_credit_is_the_peers_error(count: int) -> None:
    window = SendWindow(1)
    with pytest.raises(RemoteProtocolError):
        window.grant(count)
    assert window.available == 1


def test_more_than_the_window_is_the_peers_error() -> None:
    window = ReceiveWindow(10)
    window.receive(10)
    with pytest.raises(RemoteProtocolError):
        window.receive(1)


def test_credit_is_returned_when_half_is_consumed() -> None:
    window = ReceiveWindow(10)
    window.receive(10)
    assert window.consume(4) == 0
    assert window.consume(1) == 5
    assert window.consume(4) == 0
    window.receive(5)
    assert window.consume(1) == 5


def test_consuming_what_never_came_is_our_error() -> None:
    with pytest.raises(LocalProtocolError):
        ReceiveWindow(10).consume(1)


@given(st.integers(1, 50), st.lists(st.tuples(st.booleans(), st.integers(1, 60))))
def test_both_ends_agree_and_nothing_stalls(size: int, steps: list[tuple[bool, int]]) -> None:
    sender, receiver, buffered = SendWindow(size), ReceiveWindow(size), 0
    for sending, count in steps:
        if sending:
            count = min(count, sender.available)
            sender.spend(count)
            receiver.receive(count)  # never more than the receiver allows
            buffered += count
        else:
            count = min(count, buffered)
            buffered -= count
            if credit := receiver.consume(count):
                sender.grant(credit)
        assert sender.available + buffered <= size
    if credit := receiver.consume(buffered):
        sender.grant(credit)
    assert sender.available > size // 2 - 1  # all consumed: at least half of it is free again
