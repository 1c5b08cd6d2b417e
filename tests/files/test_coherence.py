"""The judge of the coherence stress finds what is stale, and nothing else."""

from __future__ import annotations

from typing import Any

from tests.files.coherence import (
    LAW_ORDER,
    LAW_SENTINEL,
    LAW_TIME,
    LAW_TRUTH,
    Account,
    Changed,
    Judge,
    Looked,
    State,
)

GRACES = {LAW_TIME: 100, LAW_ORDER: 10, LAW_SENTINEL: 5}


def file(size: int, version: int, **fields: Any) -> State:
    return {"what": "file", "size": size, "version": [version], "inner": "none", **fields}


CHANGES = [
    Changed("0/1", 0, 0, file(10, 1)),
    Changed("0/1", 1000, 1010, file(20, 2)),
    Changed("0/1", 2000, 2010, {"what": "ENOENT", "inner": "none"}),
    Changed("0/1", 3000, 3010, file(10, 3)),
    Changed("0/sentinel", 0, 0, file(16, 7)),
    Changed("0/sentinel", 2050, 2060, file(16, 8)),
    Changed("0", 0, 0, {"what": "directory", "mtime": 5}),
    Changed("0", 2000, 2010, {"what": "directory", "mtime": 6}),
]


def laws(*looks: Looked) -> list[str]:
    return [stale.law for stale in Judge(CHANGES, GRACES).judge(looks)]


def look(begin: int, slot: str = "0/1", **fields: Any) -> Looked:
    return Looked(slot, begin, begin + 1, fields)


def test_what_is_fresh_is_right() -> None:
    assert (
        laws(
            look(500, what="file", size=10), look(1500, version=[2]), look(2500, what="ENOENT", listed=False)
        )
        == []
    )
    assert laws(look(4000, size=10, length=10, version=[3], listed=True, inner="none")) == []


def test_a_change_may_stay_unseen_for_a_while_only() -> None:
    assert laws(look(1109, size=10, version=[1])) == []
    assert laws(look(1110, size=10, version=[1])) == [LAW_TIME, LAW_TIME]
    assert laws(look(2111, what="file")) == [LAW_TIME]
    assert laws(look(3111, what="ENOENT")) == [LAW_TIME]


def test_an_equal_value_of_a_later_state_is_no_older_one() -> None:
    assert laws(look(3500, size=10)) == []
    assert laws(look(3500, version=[1])) == [LAW_TIME]


def test_what_was_seen_is_not_unseen() -> None:
    assert laws(look(1020, size=20), look(1025, size=10)) == []
    assert laws(look(1020, size=20), look(1031, size=10)) == [LAW_ORDER]
    assert laws(look(1020, version=[1, 2]), look(1031, version=[1])) == [LAW_ORDER]
    assert laws(look(1020, size=10), look(1031, size=10)) == []


def test_what_was_before_the_sentinel_is_seen_with_it() -> None:
    before = look(2020, "0/sentinel", version=[7])
    after = look(2062, "0/sentinel", version=[8])
    assert laws(before, look(2070, what="file")) == []
    assert laws(after, look(2066, what="file")) == []
    assert laws(after, look(2070, what="file")) == [LAW_SENTINEL]
    assert laws(after, look(2070, what="ENOENT")) == []


def test_what_never_was_is_wrong() -> None:
    assert laws(look(1500, size=15)) == [LAW_TRUTH]
    assert laws(look(1500, what="EIO")) == [LAW_TRUTH]
    assert laws(look(500, version=[2])) == [LAW_TRUTH]


def test_while_it_changes_it_may_be_seen_as_it_never_was() -> None:
    assert laws(look(1005, size=15)) == []
    assert laws(look(1109, what="ESTALE")) == []
    assert laws(look(1110, what="ESTALE")) == [LAW_TRUTH]


def test_time_stamps_of_a_directory_never_go_back() -> None:
    assert laws(look(2050, "0", mtime=5)) == []
    assert laws(look(2200, "0", mtime=5)) == [LAW_TIME]
    assert laws(look(2020, "0", mtime=6), look(2040, "0", mtime=5)) == [LAW_ORDER]
    assert laws(look(2200, "0", mtime=9)) == []


def test_a_listing_tells_of_each_name() -> None:
    account = Account()
    account.add(
        [
            ["looked", "0", 5, 6, {"names": ["1", "draft7"]}],
            ["changed", "0/1", 1, 2, {"what": "ENOENT"}],
            ["wrong", "0/1", "so"],
        ],
        ["0/1", "0/2", "1/1"],
    )
    assert account.looks == [Looked("0/1", 5, 6, {"listed": True}), Looked("0/2", 5, 6, {"listed": False})]
    assert account.changes == [Changed("0/1", 1, 2, {"what": "ENOENT"})]
    assert account.wrong == ["0/1: so"]
