"""What is left of a journal says what the journal said, whatever had happened; and takes little memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fileserver import compaction
from fileserver.compaction import survivors
from fileserver.ledger import FORMAT, Answer, Entry, Kind, Ledger

SHARE = 7
BEGIN: Entry = [Kind.BEGIN, FORMAT, "boot"]


def node(number: int, parent: int = 1, name: bytes = b"name", share: int = SHARE) -> Entry:
    return [Kind.NODE, share, number, parent, name, 1, number, 5]


def counted(number: int, lookups: int = 1, share: int = SHARE) -> Entry:
    return [Kind.COUNTED, share, number, lookups]


def unlinked(number: int, parent: int = 1, name: bytes = b"name") -> Entry:
    return [Kind.UNLINKED, SHARE, number, parent, name]


def left(*entries: Entry) -> list[Entry]:
    return list(survivors(lambda: iter([BEGIN, *entries]), 100, 50))


def replayed(entries: list[Entry]) -> Ledger:
    ledger = Ledger()
    for entry in entries:
        ledger.apply(entry)
    ledger.prune()
    return ledger


def meaning(ledger: Ledger) -> tuple[object, ...]:
    """All that a successor goes by. A share without a node says nothing."""
    nodes = {share: nodes for share, nodes in ledger.nodes.items() if nodes}
    return ledger.boot_id, nodes, ledger.locks, dict(ledger.intents), dict(ledger.outcomes)


@pytest.fixture(autouse=True)
def nothing_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compaction, "NOT_YET_COUNTED", 0)


def test_nothing() -> None:
    assert left() == [BEGIN, [Kind.NUMBERS, 100, 50]]


def test_a_node_is_a_name_and_a_count() -> None:
    assert left(node(2), counted(2), counted(2, 2), counted(2, 3))[2:] == [node(2), counted(2, 3)]


def test_what_the_guest_has_forgotten_is_gone() -> None:
    assert left(node(2), counted(2), counted(2, 0))[2:] == []
    assert left(node(2))[2:] == []


def test_a_directory_of_what_lives_stays_and_those_above_it() -> None:
    entries = [
        node(2),
        counted(2),
        node(3, 2),
        counted(3),
        node(4, 3),
        counted(4),
        counted(3, 0),
        counted(2, 0),
    ]
    assert left(*entries)[2:] == [node(2), node(3, 2), node(4, 3), counted(4)]
    assert left(*entries, counted(4, 0))[2:] == []


def test_names_that_came_and_went_are_not_repeated() -> None:
    entries = [node(2), counted(2)]
    for number in range(1000):
        entries += [node(2, 1, b"%d" % number), unlinked(2, 1, b"%d" % (number - 1))]
    assert sorted(left(*entries)[2:]) == sorted([node(2), node(2, 1, b"999"), counted(2)])


def test_a_node_that_has_lost_its_last_name_stays() -> None:
    assert left(node(2), counted(2), unlinked(2))[2:] == [node(2, 0, b""), counted(2)]


def test_a_share_that_was_dropped_begins_anew() -> None:
    dropped: Entry = [Kind.DROPPED, SHARE]
    other = [node(3, share=8), counted(3, share=8)]
    assert left(node(2), counted(2), *other, dropped)[2:] == other
    assert left(node(2), counted(2), dropped, node(4), counted(4))[2:] == [node(4), counted(4)]


def test_all_else_is_kept_as_a_ledger_has_it() -> None:
    entries: list[Entry] = [
        [Kind.INTENT, SHARE, 9, 1, b"was"],
        [Kind.OUTCOME, SHARE, 10, 2, 0, [1]],
        [Kind.HANDLE, SHARE, 3, 2],
        [Kind.WHOLE, SHARE, 3, 1],
        [Kind.RANGES, SHARE, 2, 77, [[0, 10, 1]]],
        [Kind.THROUGH, SHARE, 2, 77, 3],
    ]
    ledger = replayed(left(*entries))
    assert meaning(ledger) == meaning(replayed([BEGIN, *entries]))
    assert ledger.outcomes[SHARE, 10] == Answer(2, 0, [1])
    assert (ledger.last_node, ledger.last_handle) == (100, 50)


def test_a_name_at_the_end_may_wait_for_its_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compaction, "NOT_YET_COUNTED", 2)
    entries = [node(2), node(3), counted(3), counted(3, 0), node(4)]
    assert left(*entries)[2:] == [node(4)]
    assert replayed([*left(*entries), counted(4)]).nodes[SHARE][4].lookups == 1


@pytest.mark.parametrize("damage", [[Kind.NODE, SHARE, 4], [], [Kind.COUNTED, SHARE, 2], [[], 1]])
def test_what_is_behind_damage_is_not_believed(damage: Entry) -> None:
    entries = [node(2), counted(2), damage, counted(2, 0), node(3), counted(3)]
    assert left(*entries)[2:] == [node(2), counted(2)]


NAMES = st.sampled_from([b"a", b"b"])
NUMBERS = st.integers(2, 6)


@st.composite
def named(draw: st.DrawFn) -> Entry:
    """In the root, or in a directory that came before or after it, but in no circle."""
    number = draw(NUMBERS)
    rank = [2, 5, 4, 3, 6]
    parents = [1, *rank[: rank.index(number)]]
    return node(number, draw(st.sampled_from(parents)), draw(NAMES), draw(st.sampled_from([7, 7, 8])))


ENTRIES = st.lists(
    st.one_of(
        named(),
        named(),
        st.builds(counted, NUMBERS, st.integers(0, 2)),
        st.builds(unlinked, NUMBERS, st.integers(1, 6), NAMES),
        st.builds(lambda share: [Kind.DROPPED, share], st.sampled_from([7, 8])),
        st.builds(lambda share, unique: [Kind.INTENT, share, unique, 1, b""], st.just(7), st.integers(1, 3)),
    ),
    max_size=40,
)


@example(entries=[node(3), counted(3, 0), counted(3, 1)])
@example(
    entries=[node(2), node(3, 2), counted(3), unlinked(3, 2), counted(2, 0), counted(3, 0), counted(3, 1)]
)
@settings(max_examples=200, deadline=None)
@given(entries=ENTRIES)
def test_every_journal_means_the_same_afterwards(entries: list[Entry]) -> None:
    """But for nodes that were never looked up and what only those, or names that are gone, lead to."""
    once = left(*entries)
    before, after = replayed([BEGIN, *entries]), replayed(once)
    assert meaning(after) == meaning(before)
    again = list(survivors(lambda: iter(once), 100, 50))
    assert meaning(replayed(again)) == meaning(after)
    assert len(again) <= len(once)


def test_it_takes_little_memory() -> None:
    def journal() -> Iterator[Entry]:
        yield BEGIN
        for number in range(2, 10_002):
            yield [
                Kind.NODE,
                SHARE,
                number,
                1,
                b"file number %d" % number,
                1 << 40,
                number << 20,
                number << 30,
            ]
            yield counted(number, 1)

    tracemalloc.start()
    try:
        count = sum(1 for _ in survivors(journal, 10_002, 1))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == 2 + 2 * 10_000
    assert peak < 200 * 10_000
