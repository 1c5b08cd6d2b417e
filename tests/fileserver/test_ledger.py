"""What a journal's entries add up to, and that every prefix of one is safe."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from fileserver.ledger import MAX_OUTCOMES, Answer, Intent, Kind, Ledger, LockRecord, Recent

SHARE = 7


def ledger_of(*entries: list[Any]) -> Ledger:
    ledger = Ledger()
    for entry in entries:
        ledger.apply(entry)
    return ledger


def node(number: int, parent: int, name: bytes) -> list[Any]:
    return [Kind.NODE, SHARE, number, parent, name, 1, 1000 + number, 5]


def again(ledger: Ledger) -> Ledger:
    return ledger_of(*ledger.entries())


def state(ledger: Ledger) -> object:
    nodes = {
        number: (record.device, record.inode, record.birth_ns, record.lookups, set(record.links))
        for number, record in ledger.nodes.get(SHARE, {}).items()
    }
    locks = {share: record for share, record in ledger.locks.items() if record != LockRecord()}
    return nodes, locks, dict(ledger.intents), dict(ledger.outcomes), ledger.last_node, ledger.boot_id


def test_a_node_is_there_until_it_is_forgotten() -> None:
    ledger = ledger_of(node(2, 1, b"a"), [Kind.COUNTED, SHARE, 2, 1])
    assert ledger.nodes[SHARE][2].links == {(1, b"a"): None}
    ledger.apply([Kind.COUNTED, SHARE, 2, 0])
    ledger.prune()
    assert ledger.nodes[SHARE] == {}
    assert ledger.last_node == 2, "a number is never given out twice"


def test_a_forgotten_directory_stays_for_what_is_in_it() -> None:
    entries = [
        node(2, 1, b"d"),
        [Kind.COUNTED, SHARE, 2, 1],
        node(3, 2, b"e"),
        node(4, 3, b"f"),
        [Kind.COUNTED, SHARE, 4, 1],
        [Kind.COUNTED, SHARE, 2, 0],
    ]
    ledger = ledger_of(*entries)
    ledger.prune()
    assert set(ledger.nodes[SHARE]) == {2, 3, 4}
    ledger.apply([Kind.COUNTED, SHARE, 4, 0])
    ledger.prune()
    assert ledger.nodes[SHARE] == {}


def test_names_come_and_go() -> None:
    ledger = ledger_of(
        node(2, 1, b"a"), [Kind.COUNTED, SHARE, 2, 1], node(2, 1, b"b"), [Kind.UNLINKED, SHARE, 2, 1, b"a"]
    )
    assert ledger.nodes[SHARE][2].links == {(1, b"b"): None}
    ledger.apply([Kind.UNLINKED, SHARE, 2, 1, b"b"])
    ledger.apply([Kind.UNLINKED, SHARE, 9, 1, b"never was"])
    assert state(again(ledger)) == state(ledger), "a file without a name is still a file"
    assert ledger.nodes[SHARE][2].links == {}


def test_an_outcome_ends_an_intent() -> None:
    ledger = ledger_of([Kind.INTENT, SHARE, 10, 99, b"before"])
    assert ledger.intents == {(SHARE, 10): Intent(99, b"before")}
    assert state(again(ledger)) == state(ledger)
    ledger.apply([Kind.OUTCOME, SHARE, 10, 99, 17, None])
    assert not ledger.intents
    assert ledger.outcomes == {(SHARE, 10): Answer(99, 17, None)}


def test_the_oldest_outcomes_are_forgotten() -> None:
    ledger = ledger_of(*([Kind.OUTCOME, SHARE, unique, 0, 0, []] for unique in range(MAX_OUTCOMES + 5)))
    assert len(ledger.outcomes) == MAX_OUTCOMES
    assert next(iter(ledger.outcomes)) == (SHARE, 5)


def test_recent_counts_a_renewed_entry_as_young() -> None:
    recent: Recent[str, int] = Recent(2)
    for key in "abac":
        recent.remember(key, 0)
    assert list(recent) == ["a", "c"]


def test_what_was_locked_through_which_handle() -> None:
    taken = [
        [Kind.RANGES, SHARE, 2, 5, [[0, 9, 1]]],
        [Kind.THROUGH, SHARE, 2, 5, 3],
        [Kind.THROUGH, SHARE, 2, 5, 4],
    ]
    ledger = ledger_of(*taken)
    assert ledger.locks[SHARE].through == {(2, 5): {3, 4}}
    assert state(again(ledger)) == state(ledger)
    ledger.apply([Kind.RANGES, SHARE, 2, 5, [[5, 9, 1]]])
    assert ledger.locks[SHARE].through == {(2, 5): {3, 4}}
    ledger.apply([Kind.RANGES, SHARE, 2, 5, []])
    ledger.apply([Kind.THROUGH, SHARE, 2, 5, 3])
    assert ledger.locks[SHARE] == LockRecord()


def test_a_dropped_share_leaves_nothing_but_its_numbers() -> None:
    ledger = ledger_of(
        node(5, 1, b"a"),
        [Kind.HANDLE, SHARE, 3, 5],
        [Kind.INTENT, SHARE, 1, 0, b""],
        [Kind.OUTCOME, SHARE, 2, 0, 0, []],
        [Kind.OUTCOME, 8, 2, 0, 0, []],
        [Kind.DROPPED, SHARE],
    )
    assert (ledger.nodes, ledger.locks, dict(ledger.intents)) == ({}, {}, {})
    assert list(ledger.outcomes) == [(8, 2)]
    assert (again(ledger).last_node, again(ledger).last_handle) == (5, 3)


def test_kinds_of_a_later_version_are_passed_over() -> None:
    assert state(ledger_of([99, "whatever"])) == state(Ledger())


small = st.integers(1, 4)
name = st.sampled_from([b"a", b"b"])
entry = st.one_of(
    st.builds(node, small.map(lambda number: number + 1), small, name),
    st.builds(lambda n, c: [Kind.COUNTED, SHARE, n + 1, c], small, st.integers(0, 3)),
    st.builds(lambda n, p, a: [Kind.UNLINKED, SHARE, n + 1, p, a], small, small, name),
    st.builds(lambda u: [Kind.INTENT, SHARE, u, u, b"p"], small),
    st.builds(lambda u: [Kind.OUTCOME, SHARE, u, u, 0, [u]], small),
    st.builds(lambda h, n: [Kind.HANDLE, SHARE, h, n], small, small),
    st.builds(lambda h: [Kind.RELEASED, SHARE, h], small),
    st.builds(lambda h, k: [Kind.WHOLE, SHARE, h, k], small, st.integers(0, 2)),
    st.builds(
        lambda n, o, r: [Kind.RANGES, SHARE, n, o, r], small, small, st.sampled_from([[], [[0, 9, 1]]])
    ),
    st.builds(lambda n, o, h: [Kind.THROUGH, SHARE, n, o, h], small, small, small),
)


@given(st.lists(entry, max_size=40))
def test_a_rewritten_journal_says_the_same(entries: list[list[Any]]) -> None:
    ledger = ledger_of([Kind.BEGIN, 1, "boot"], *entries)
    ledger.prune()
    rewritten = again(ledger)
    rewritten.prune()
    assert state(rewritten) == state(ledger)
