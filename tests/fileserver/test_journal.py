"""The journal's file: torn, cut, full, rewritten under way, and of another guest."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fileserver import journal as module
from fileserver.compaction import survivors
from fileserver.journal import Journal
from fileserver.journal import read as reread
from fileserver.ledger import Answer, Entry, Intent, Kind

SHARE = 7
KEY = (SHARE, 100)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "files.journal"


def begun(path: Path, boot_id: str = "boot") -> Journal:
    journal = Journal(path)
    journal.begin(boot_id)
    return journal


def test_a_new_journal_is_empty(path: Path) -> None:
    journal = Journal(path)
    assert journal.restored.boot_id == ""
    assert journal.next_node() == 2, "1 is the root"
    assert journal.next_handle() == 1
    assert path.stat().st_mode & 0o777 == 0o600
    journal.close()


def test_a_successor_goes_on(path: Path) -> None:
    journal = begun(path)
    number = journal.next_node()
    journal.add(Kind.NODE, SHARE, number, 1, b"a\xff", 1, 2**63 + 1, 5)
    journal.add(Kind.COUNTED, SHARE, number, 1)
    journal.outcome(KEY, Answer(1, 0, [number, b"attr", False]))
    assert reread(path).nodes == {}, "nothing is written before it must be"
    journal.flush()
    ledger = reread(path)
    assert ledger.boot_id == "boot"
    assert ledger.nodes[SHARE][number].inode == 2**63 + 1
    assert ledger.outcomes[KEY] == Answer(1, 0, [number, b"attr", False])
    journal.close()
    successor = Journal(path)
    assert successor.next_node() == number + 1
    successor.close()


def test_an_intent_is_written_at_once_with_all_that_came_before(path: Path) -> None:
    journal = begun(path)
    journal.outcome((SHARE, 1), Answer(1, 0, []))
    journal.intent(KEY, 5, b"size was 3")
    assert reread(path).intents == {KEY: Intent(5, b"size was 3")}
    assert (SHARE, 1) in reread(path).outcomes
    journal.close()


def test_a_torn_end_costs_only_itself(path: Path) -> None:
    """Cut at every byte: what is read is always some prefix of what was written."""
    journal = begun(path)
    for unique in range(5):
        journal.outcome((SHARE, unique), Answer(1, 0, [b"x" * unique]))
    journal.close()
    whole = path.read_bytes()
    counts = []
    for end in range(len(whole) + 1):
        path.write_bytes(whole[:end])
        successor = Journal(path)
        counts.append(len(successor.restored.outcomes))
        successor.outcome((SHARE, 99), Answer(1, 0, []))
        successor.close()
        assert (SHARE, 99) in reread(path).outcomes, "and it can be gone on with"
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (0, 5)


@pytest.mark.parametrize(
    "content",
    [
        b"\xc1",
        b"\x93\x00\x63\xa4boot",
        b"\x91\x00",
        b"\xa5hello",
        b"\x90",
        b"\x93\x01\x02\x03",
        pytest.param(os.urandom(64), id="noise"),
    ],
)
def test_what_is_no_journal_is_not_used(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    journal = Journal(path)
    assert (journal.restored.boot_id, journal.restored.nodes) == ("", {})
    journal.begin("boot")
    journal.close()
    assert reread(path).boot_id == "boot"


def test_damage_in_the_middle_ends_the_reading_there(path: Path) -> None:
    journal = begun(path)
    journal.outcome((SHARE, 1), Answer(1, 0, []))
    journal.add(Kind.OUTCOME, "too", "few")
    journal.outcome((SHARE, 2), Answer(1, 0, []))
    journal.close()
    assert list(reread(path).outcomes) == [(SHARE, 1)]


def test_another_guest_begins_anew(path: Path) -> None:
    journal = begun(path)
    journal.add(Kind.NODE, SHARE, journal.next_node(), 1, b"a", 1, 2, 3)
    journal.flush()
    journal.outcome(KEY, Answer(1, 0, []))  # of the old guest, and not written yet
    journal.begin("next boot")
    journal.next_node()
    journal.close()
    ledger = reread(path)
    assert (ledger.boot_id, ledger.nodes, dict(ledger.outcomes)) == ("next boot", {}, {})


def test_numbers_of_a_journal_that_was_lost_are_not_given_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = begun(path)
    given = [journal.next_node() for _ in range(100)], [journal.next_handle() for _ in range(100)]
    journal.close()
    with monkeypatch.context() as full:
        full.setattr(module, "_write_new", raiser(OSError(errno.ENOSPC, "full")))
        Journal(path).close()
    journal = Journal(path)
    assert journal.restored.boot_id == "", "it was given up, so this may be the same guest"
    journal.begin("boot")
    again = [journal.next_node() for _ in range(100)], [journal.next_handle() for _ in range(100)]
    journal.close()
    for old, new in zip(given, again, strict=True):
        assert not set(old) & set(new)
        assert max(new) < 1 << 63


def raiser(error: Exception) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise error

    return fail


def test_a_rewrite_keeps_what_is_alive_and_what_was_added_meanwhile(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "COMPACT_ABOVE", 10_000)
    journal = begun(path)
    kept = journal.next_node()
    journal.add(Kind.NODE, SHARE, kept, 1, b"kept", 1, 2, 3)
    journal.add(Kind.COUNTED, SHARE, kept, 1)
    unique = 0
    while not journal.wants_compaction:
        unique += 1
        journal.outcome((SHARE, 1), Answer(unique, 0, [b"x" * 100]))
        journal.flush()
    before = path.stat().st_size

    def while_others_write(*arguments: Any) -> Iterator[Entry]:
        yield from survivors(*arguments)
        journal.intent(KEY, 5, b"meanwhile")

    monkeypatch.setattr(module, "survivors", while_others_write)
    journal.compact()
    monkeypatch.undo()
    assert path.stat().st_size < before / 10
    assert not journal.wants_compaction
    journal.outcome((SHARE, 2), Answer(1, 0, []))
    journal.close()
    ledger = reread(path)
    assert ledger.nodes[SHARE][kept].lookups == 1
    assert ledger.intents == {KEY: Intent(5, b"meanwhile")}
    assert ledger.outcomes[SHARE, 1].digest == unique
    assert (SHARE, 2) in ledger.outcomes
    assert sorted(file.name for file in path.parent.iterdir()) == ["files.journal"]


def test_a_rewrite_gives_way_to_another_guest(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = begun(path)

    def interrupted(*arguments: Any) -> Iterator[Entry]:
        yield from survivors(*arguments)
        journal.begin("next boot")

    monkeypatch.setattr(module, "survivors", interrupted)
    journal.compact()
    monkeypatch.undo()
    journal.close()
    assert reread(path).boot_id == "next boot"
    assert sorted(file.name for file in path.parent.iterdir()) == ["files.journal"]


def test_threads_add_and_flush_and_rewrite_at_once(path: Path) -> None:
    journal = begun(path)

    def work(share: int) -> None:
        for unique in range(300):
            journal.outcome((share, unique), Answer(unique, 0, []))
            journal.flush()

    threads = [threading.Thread(target=work, args=(share,)) for share in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(5):
        journal.compact()
    for thread in threads:
        thread.join()
    journal.close()
    assert set(reread(path).outcomes) == {(share, unique) for share in range(4) for unique in range(300)}


class FullDisk:
    """os.write that takes ``room`` bytes more, of the journal's file only."""

    def __init__(self, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.room = room
        self._write = os.write
        monkeypatch.setattr(os, "write", self)

    def __call__(self, fd: int, data: bytes | memoryview) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "full")
        taken = self._write(fd, memoryview(data)[: self.room])
        self.room -= taken
        return taken


def test_a_full_disk_stops_nobody_and_nothing_is_lost(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    journal = begun(path)
    disk = FullDisk(3, monkeypatch)
    for unique in range(4):
        journal.outcome((SHARE, unique), Answer(1, 0, []))
        journal.flush()
    assert reread(path).outcomes == {}, "no entry is half there"
    assert len(caplog.records) == 1, "it is said once"
    disk.room = 1 << 20
    journal.flush()
    monkeypatch.undo()
    journal.close()
    assert len(reread(path).outcomes) == 4


def test_a_journal_with_a_hole_is_not_believed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_UNWRITTEN", 1000)
    journal = begun(path)
    disk = FullDisk(0, monkeypatch)
    for unique in range(100):
        journal.outcome((SHARE, unique), Answer(1, 0, [b"x" * 50]))
        journal.flush()
    disk.room = 1 << 20
    journal.outcome(KEY, Answer(1, 0, []))
    journal.flush()
    assert path.read_bytes() == b""
    assert not journal.wants_compaction
    journal.begin("next boot")
    journal.outcome(KEY, Answer(1, 0, []))
    journal.close()
    monkeypatch.undo()
    assert list(reread(path).outcomes) == [KEY]


def test_a_disk_that_is_full_from_the_start(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = begun(path)
    journal.outcome(KEY, Answer(1, 0, []))
    journal.close()
    FullDisk(0, monkeypatch)
    journal = Journal(path)
    assert KEY in journal.restored.outcomes, "it can still be read"
    journal.outcome((SHARE, 1), Answer(1, 0, []))
    journal.close()
    monkeypatch.undo()
    assert path.read_bytes() == b"", "but it is not what a successor would have to know"
