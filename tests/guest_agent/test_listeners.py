from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from guest_agent.listeners import MAX_LISTENERS, MAX_PER_NOTICE, Snapshot, bounded, notices
from protocol import codec, messages
from protocol.api import Listener, Listeners, Proto
from protocol.frames import MAX_HEADER

LISTENERS = st.builds(
    Listener,
    proto=st.just(Proto.TCP),
    address=st.sampled_from(["0.0.0.0", "127.0.0.1", "::", "::1"]),
    port=st.integers(1, 6),
    unit=st.sampled_from(["", "docker.service"]),
)
SNAPSHOTS = st.frozensets(LISTENERS)


def listener(port: int, address: str = "127.0.0.1", unit: str = "") -> Listener:
    return Listener(Proto.TCP, address, port, unit)


def apply(known: Snapshot, notice: Listeners) -> Snapshot:
    """What a peer does."""
    return (frozenset() if notice.full else known - set(notice.removed)) | frozenset(notice.added)


@given(SNAPSHOTS, SNAPSHOTS)
def test_notices_lead_from_one_picture_to_the_other(before: Snapshot, after: Snapshot) -> None:
    known = before
    for notice in notices(before, after):
        assert not notice.full
        known = apply(known, notice)
    assert known == after


@given(SNAPSHOTS)
def test_a_peer_that_knows_nothing_is_told_everything_and_full_exactly_once(after: Snapshot) -> None:
    told = list(notices(None, after))
    assert [notice.full for notice in told] == [True, *([False] * (len(told) - 1))]
    known: Snapshot = frozenset([listener(9)])  # left over from a session before
    for notice in told:
        known = apply(known, notice)
    assert known == after


def test_no_change_says_nothing() -> None:
    picture = frozenset([listener(80)])
    assert list(notices(picture, picture)) == []


def test_a_long_list_is_cut_and_only_its_first_part_is_full() -> None:
    picture = frozenset(listener(port) for port in range(1, 2 * MAX_PER_NOTICE + 2))
    told = list(notices(None, picture))
    assert [len(notice.added) for notice in told] == [MAX_PER_NOTICE, MAX_PER_NOTICE, 1]
    assert [notice.full for notice in told] == [True, False, False]


def test_the_longest_notice_fits_into_a_header() -> None:
    longest = [listener(65535, "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", "u" * 255)] * MAX_PER_NOTICE
    notice = Listeners(full=True, added=longest)
    frame = messages.encode(messages.Notify(notice.TOPIC, codec.encode(notice)))
    assert sum(len(part) for part in frame) < 0.75 * MAX_HEADER


def test_a_server_that_moves_goes_and_comes_in_one_notice() -> None:
    """So that its port on the host is never closed."""
    before = frozenset([listener(80), listener(81)])
    after = frozenset([listener(80, unit="a.service"), listener(81, "0.0.0.0")])
    [moved] = notices(before, after)
    assert moved.removed == [listener(80), listener(81)]
    assert moved.added == [listener(80, unit="a.service"), listener(81, "0.0.0.0")]


def test_many_that_move_do_so_in_one_notice_each() -> None:
    ports = range(1, 2 * MAX_PER_NOTICE)
    told = list(
        notices(
            frozenset(listener(port) for port in ports),
            frozenset(listener(port, "::") for port in ports if port % 3),
        )
    )
    for notice in told:
        assert 0 < len(notice.added) + len(notice.removed) <= MAX_PER_NOTICE
        gone = {each.port for each in notice.removed}
        assert {each.port for each in notice.added} == {port for port in gone if port % 3}


def test_one_port_with_more_than_a_notice_holds_is_told_in_several() -> None:
    picture = frozenset(listener(80, unit=f"{number}.service") for number in range(MAX_PER_NOTICE + 1))
    moved = frozenset([listener(80)])
    assert [len(notice.removed) for notice in notices(picture, moved)] == [MAX_PER_NOTICE, 1]
    assert [notice.added for notice in notices(picture, moved)] == [[], [listener(80)]]


def test_beyond_the_limit_the_lowest_ports_are_kept() -> None:
    picture = frozenset(listener(port) for port in range(1, MAX_LISTENERS + 10))
    assert max(item.port for item in bounded(picture)) == MAX_LISTENERS
    assert bounded(frozenset([listener(7)])) == {listener(7)}
