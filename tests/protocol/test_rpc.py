from __future__ import annotations

import math

import pytest

from protocol.errors import ErrorCode, LocalProtocolError, RemoteProtocolError, RpcError
from protocol.rpc import MAX_ID, MAX_REQUESTS, IdSpace, IncomingRequests, OutgoingRequests


def test_ids_are_of_one_parity_and_never_reused() -> None:
    ids = IdSpace(2)
    assert [ids.take() for _ in range(3)] == [2, 4, 6]
    assert ids.used(4)
    assert not any(ids.used(number) for number in (0, 1, 3, 8, -2))


@pytest.mark.parametrize("number", [0, -1, 2, 3, MAX_ID + 2])
def test_an_id_that_is_not_new_is_the_peers_error(number: int) -> None:
    ids = IdSpace(1)
    ids.claim(3)
    with pytest.raises(RemoteProtocolError):
        ids.claim(number)
    ids.claim(9)


def test_ids_run_out_some_day() -> None:
    ids = IdSpace(1)
    ids.last = MAX_ID - 1
    with pytest.raises(LocalProtocolError):
        ids.take()


def test_an_answer_settles_a_request_once() -> None:
    asked = OutgoingRequests(1)
    first = asked.begin(None, 0.0)
    assert asked.settle(first)
    with pytest.raises(RemoteProtocolError):
        asked.settle(first)
    with pytest.raises(RemoteProtocolError):
        asked.settle(99)


def test_an_abandoned_request_still_gets_its_one_answer() -> None:
    asked = OutgoingRequests(1)
    first = asked.begin(None, 0.0)
    assert asked.abandon(first)
    assert not asked.abandon(first)
    assert not asked.settle(first)
    with pytest.raises(RemoteProtocolError):
        asked.settle(first)


def test_deadlines_expire_once() -> None:
    asked = OutgoingRequests(1)
    late, later, never = asked.begin(1.0, 10.0), asked.begin(2.0, 10.0), asked.begin(None, 10.0)
    assert asked.next_deadline() == 11.0
    assert asked.expire(10.9) == []
    assert asked.expire(11.0) == [late]
    assert asked.next_deadline() == 12.0
    assert asked.expire(50.0) == [later]
    assert asked.next_deadline() == math.inf
    assert asked.settle(never)
    assert not asked.settle(late)


def test_pending_requests_are_limited_and_abandoned_ones_count() -> None:
    asked = OutgoingRequests(1)
    numbers = [asked.begin(None, 0.0) for _ in range(MAX_REQUESTS)]
    asked.abandon(numbers[0])
    with pytest.raises(RpcError) as caught:
        asked.begin(None, 0.0)
    assert caught.value.code is ErrorCode.LIMIT
    asked.settle(numbers[0])
    asked.begin(None, 0.0)


@pytest.mark.parametrize("timeout", [-1.0, math.inf, math.nan])
def test_a_timeout_must_be_a_duration(timeout: float) -> None:
    with pytest.raises(LocalProtocolError):
        OutgoingRequests(1).begin(timeout, 0.0)
    with pytest.raises(RemoteProtocolError):
        IncomingRequests(1).begin(1, timeout, 0.0)


def test_the_peers_requests_are_answered_exactly_once() -> None:
    serving = IncomingRequests(1)
    assert serving.begin(1, None, 0.0)
    serving.answer(1)
    with pytest.raises(LocalProtocolError):
        serving.answer(1)


def test_cancelling_is_for_what_was_asked() -> None:
    serving = IncomingRequests(1)
    serving.begin(1, None, 0.0)
    assert serving.cancel(1)
    serving.answer(1)
    assert not serving.cancel(1)  # it crossed the answer
    with pytest.raises(RemoteProtocolError):
        serving.cancel(3)


def test_the_peers_requests_are_limited() -> None:
    serving = IncomingRequests(1)
    assert all(serving.begin(1 + 2 * index, None, 0.0) for index in range(MAX_REQUESTS))
    extra = 1 + 2 * MAX_REQUESTS
    assert not serving.begin(extra, None, 0.0)
    assert not serving.cancel(extra)
    serving.answer(1)
    assert serving.begin(extra + 2, None, 0.0)


def test_a_late_request_is_told_once_and_stays_pending() -> None:
    serving = IncomingRequests(1)
    serving.begin(1, 5.0, 100.0)
    assert serving.next_deadline() == 105.0
    assert serving.expire(105.0) == [1]
    assert serving.expire(106.0) == []
    serving.answer(1)
