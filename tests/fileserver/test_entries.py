"""Whole directories in one answer, and the lookups that it counts."""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from fileserver import entries, snapshots
from fileserver.entries import Records
from fileserver.names import NameOperations
from fileserver.nodes import Node
from fileserver.promises import Promise
from protocol.files import (
    ATTR,
    ATTRIBUTES,
    DIRENT,
    ENTRY,
    FOREVER,
    NAME,
    ROOT,
    Create,
    Forget,
    GetAttributes,
    ListEntries,
    Listing,
    Lookup,
    MakeLink,
    Read,
    Rename,
    Unlink,
    position,
)
from tests.fileserver.peers import SHARE, until
from tests.fileserver.scene import Gate, connected, waiting
from tests.fileserver.served import Served, attr, serving
from tests.fileserver.test_promises import elsewhere, node
from tests.fileserver.watched import Watched, answer

HEAD = ENTRY.size + ATTR.size


class Record(NamedTuple):
    name: bytes
    off: int
    kind: int
    node: int
    attr: bytes
    valid: tuple[int, int]


def parse(listing: Listing, content: bytes | bytearray | memoryview) -> list[Record]:
    """What the kernel sees, compared with what the arrays say."""
    found, starts, at = [], [], 0
    while at < listing.dirents:
        starts.append(at)
        number, generation, *valid, ns, attr_ns = ENTRY.unpack_from(content, at)
        assert generation == ns == attr_ns == 0
        ino, off, length, kind = DIRENT.unpack_from(content, at + HEAD)
        name = bytes(content[at + HEAD + DIRENT.size :][:length])
        raw = bytes(content[at + ENTRY.size :][: ATTR.size])
        assert not number or ATTR.unpack(raw)[0] == ino
        found.append(Record(name, off, kind, number, raw, (valid[0], valid[1])))
        at += HEAD + DIRENT.size + length + -length % 8
    assert at == listing.dirents
    count = listing.count
    arrays = struct.unpack_from(f"<{count}I{count}Q{count}Q{count}B", content, at)
    assert len(content) == listing.dirents + 21 * count
    assert list(arrays[:count]) == starts
    assert list(arrays[count : 2 * count]) == [record.off for record in found]
    assert list(arrays[2 * count : 3 * count]) == [record.node for record in found]
    assert list(arrays[3 * count :]) == [record.kind for record in found]
    return found


@pytest.fixture
def watched() -> Watched:
    return Watched()


@pytest.fixture
def share(tmp_path: Path, watched: Watched) -> Iterator[Served]:
    (tmp_path / "file").write_text("content")
    (tmp_path / "d").mkdir()
    (tmp_path / "link").symlink_to("file")
    os.mkfifo(tmp_path / "fifo")
    with serving(tmp_path, watches=watched) as served:
        yield served


def listed(share: Served, number: int = ROOT, *, settle: bool = True) -> dict[bytes, Record]:
    """All pieces of a directory, as they would be sent."""
    found: list[Record] = []
    while True:
        outcome = answer(share, ListEntries, number, found[-1].off if found else 0)
        listing: Any = outcome.value
        if isinstance(outcome.promise, Records) and settle:
            assert isinstance(outcome.payload, bytearray)
            bits = share.tree.promised(listing, outcome.promise)
            kept = lambda promise: share.tree.promised(listing, promise)  # noqa: B023, E731
            outcome.promise.settle(outcome.payload, kept if bits else None)
        assert not isinstance(outcome.payload, memoryview)
        found += parse(listing, outcome.payload)  # type: ignore[arg-type]
        if listing.end:
            assert [record.off for record in found] == sorted({record.off for record in found})
            return {record.name: record for record in found}


# --- what is in it -----------------------------------------------------------------------------------


def test_a_directory(share: Served) -> None:
    found = listed(share)
    assert set(found) == {b"file", b"d", b"link", b"fifo"}
    for name, record in found.items():
        entry = share.ask(Lookup, ROOT, name)
        assert record.node == entry.node
        assert record.attr == entry.attr
        assert record.valid == (FOREVER, FOREVER)
        assert record.off == position(name)
        assert record.kind == stat.S_IFMT(attr(entry).mode) >> 12
        assert share.journal.records[record.node].lookups == 2
        share.forget(record.node, 2)
    assert share.journal.records.keys() == {ROOT}


def test_only_names_but_for_directories(share: Served) -> None:
    outcome = answer(share, ListEntries, ROOT, 0, bare=True)
    assert isinstance(outcome.promise, Records)
    found = parse(outcome.value, outcome.payload)  # type: ignore[arg-type]
    assert {record.name for record in found if record.node} == {b"d"}
    assert {record.name: record.kind for record in found} == {
        record.name: record.kind for record in listed(share).values()
    }
    assert share.tree.promised(outcome.value, outcome.promise) & NAME


def test_an_empty_directory(share: Served) -> None:
    outcome = answer(share, ListEntries, share.node("d"), 0)
    assert outcome.value == Listing(0, end=True)
    assert outcome.payload == b""


def test_what_it_refuses(share: Served) -> None:
    assert share.refused(ListEntries, ROOT, -1) == "EINVAL"
    assert share.refused(ListEntries, 12345, 0) == "ESTALE"
    assert share.refused(ListEntries, share.node("file"), 0) == "ENOTDIR"


def test_in_pieces(share: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entries, "PIECE", 1000)
    names = {b"%d" % number + b"x" * (number % 200) for number in range(300)}
    for name in names:
        (share.path / "d" / os.fsdecode(name)).touch()
    found = listed(share, share.node("d"))
    assert set(found) == names
    assert all(record.node for record in found.values())


def test_the_longest_names_fit_into_an_answer(share: Served) -> None:
    for number in range(2000):
        (share.path / "d" / f"{number:0255}").touch()
    assert len(listed(share, share.node("d"))) == 2000
    outcome = answer(share, ListEntries, share.node("d"), 0)
    assert len(outcome.payload) <= entries.MAX_ANSWER  # type: ignore[arg-type]
    for number in range(2000):
        (share.path / f"{number}").touch()
    assert len(answer(share, ListEntries, ROOT, 0).payload) <= entries.MAX_ANSWER  # type: ignore[arg-type]


# --- what is not -------------------------------------------------------------------------------------


def without_node(records: dict[bytes, Record]) -> set[bytes]:
    for record in records.values():
        assert bool(record.node) == any(record.attr) == any(record.valid)
    return {record.name for record in records.values() if not record.node}


def test_without_marks_it_is_a_list(share: Served, watched: Watched) -> None:
    watched.full = True
    assert without_node(listed(share)) == {b"file", b"d", b"link", b"fifo"}
    assert share.journal.records.keys() == {ROOT}, "and nothing was looked up"


def test_a_file_that_gets_no_mark(share: Served, watched: Watched) -> None:
    share.node("file")
    share.ask(GetAttributes, ROOT)
    watched.sample(0, node(share, ROOT))
    known = share.ask(Lookup, ROOT, b"d").node
    listed(share)
    watched.marked.discard(known)
    watched.full = True
    assert without_node(listed(share)) == {b"d"}
    assert share.journal.records[known].lookups == 2


def test_where_no_mark_is_left_only_directories_are_looked_for(
    share: Served, watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may have more of them; and what has its own is given as ever."""
    looked_for, find = [], NameOperations.find

    def noted(self: NameOperations, directory: Node, name: bytes, promise: Promise) -> object:
        looked_for.append(name)
        return find(self, directory, name, promise)

    share.ask(Lookup, ROOT, b"link")
    watched.sample(0, node(share, ROOT))
    monkeypatch.setattr(NameOperations, "find", noted)
    watched.full = True
    assert without_node(listed(share)) == {b"file", b"d", b"fifo"}
    assert set(looked_for) == {b"d", b"link"}
    watched.full = False
    assert without_node(listed(share)) == set()


def test_what_may_be_stale_must_be_asked(share: Served) -> None:
    file = share.node("file")
    share.bytes(Read, file, 0, 10)
    (share.path / "file").write_text("other!!")
    assert without_node(listed(share)) == {b"file"}
    assert share.ask(Lookup, ROOT, b"file").stale
    assert without_node(listed(share)) == set()


def test_a_sealed_directory(tmp_path: Path) -> None:
    (tmp_path / "sealed/inside").mkdir(parents=True)
    with serving(tmp_path, watches=Watched(), hidden=[tmp_path / "sealed"]) as share:
        assert without_node(listed(share)) == {b"sealed"}
        assert listed(share, share.node("sealed")) == {}


@pytest.mark.parametrize("name", [b"file", b"d"])
def test_what_changes_before_the_answer_is_taken_out(share: Served, watched: Watched, name: bytes) -> None:
    outcome = answer(share, ListEntries, ROOT, 0)
    listing, records, content = outcome.value, outcome.promise, outcome.payload
    assert isinstance(records, Records)
    assert isinstance(content, bytearray)
    assert isinstance(listing, Listing)
    changed = next(record for record in parse(listing, content) if record.name == name)
    watched.moved(node(share, changed.node), None)
    records.settle(content, lambda promise: share.tree.promised(listing, promise))
    found = parse(listing, content)
    assert [record.name for record in found if not record.node] == [name]
    assert records.taken_out == [changed.node]
    assert set(records.sent) == {record.node for record in found} - {0}


def test_if_the_names_change_before_the_answer_nothing_is_left(share: Served) -> None:
    outcome = answer(share, ListEntries, ROOT, 0)
    answer(share, Create, ROOT, b"new", 0o644, os.O_EXCL)
    listing: Any = outcome.value
    assert outcome.promise is not None
    assert share.tree.promised(listing, outcome.promise) == 0


# --- to a guest --------------------------------------------------------------------------------------


async def test_what_is_sent(place: Path) -> None:
    async with connected(place) as guest:
        elsewhere(guest.root, "mkdir d; echo f > f; ln -s f l")
        call = ListEntries(SHARE, guest.kernel.unique(), ROOT, 0)
        result = await guest.kernel.finish(guest.kernel.begin(call))
        listing = Listing(*result.value)  # type: ignore[misc]
        assert listing.promise == NAME
        found = {record.name: record for record in parse(listing, result.payload)}
        assert found.keys() == {b"d", b"f", b"l"}
        for name, record in found.items():
            entry = await guest.kernel.lookup(name)
            assert (entry.node, entry.attr) == (record.node, record.attr)
            assert entry.promise == NAME | ATTRIBUTES
            await guest.kernel.ask(Forget(SHARE, guest.kernel.unique(), 0, [entry.node], [2]))
        assert (await guest.state()).nodes == 1


async def test_what_others_do_meanwhile_is_taken_out_and_forgotten(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with connected(place) as guest:
        elsewhere(guest.root, "mkdir d; echo f > f; echo g > g")
        gate = Gate(monkeypatch, ListEntries, done=True)
        pending = guest.kernel.begin(ListEntries(SHARE, guest.kernel.unique(), ROOT, 0))
        await until(lambda: gate.begun)
        elsewhere(guest.root, "echo more >> f")
        await until(lambda: any(told.nodes for told in guest.kernel.changes()))
        gate.open()
        result = await guest.kernel.finish(pending)
        listing = Listing(*result.value)  # type: ignore[misc]
        assert listing.promise == NAME
        assert {record.name for record in parse(listing, result.payload) if record.node} == {b"d", b"g"}

        pending = guest.kernel.begin(ListEntries(SHARE, guest.kernel.unique(), ROOT, 0))
        result = await guest.kernel.finish(pending)
        nodes = [record.node for record in parse(Listing(*result.value), result.payload)]  # type: ignore[misc]
        assert all(nodes)
        await guest.kernel.ask(Forget(SHARE, guest.kernel.unique(), 0, nodes, [2, 2, 2]))
        assert (await guest.state()).nodes == 1, "f was counted once, and not twice"


@pytest.mark.parametrize("answered", [True, False])
async def test_asked_again_in_another_session_it_counts_once(
    place: Path, monkeypatch: pytest.MonkeyPatch, answered: bool
) -> None:
    async with waiting(place) as guest:
        elsewhere(guest.root, "echo f > f; echo g > g")
        kernel = guest.kernel
        call = ListEntries(SHARE, kernel.unique(), ROOT, 0)
        gate = Gate(monkeypatch, ListEntries, done=True)
        async with guest.session():
            pending = kernel.begin(call)
            await until(lambda: gate.begun)
            if answered:
                gate.open()
                await kernel.finish(pending)
        gate.open()
        async with guest.session():
            if answered:
                pending = kernel.begin(call)
            result = await kernel.finish(pending)
            found = parse(Listing(*result.value), result.payload)  # type: ignore[misc]
            nodes = [record.node for record in found if record.node]
            await until(lambda: kernel.link is not None)
            await kernel.ask(Forget(SHARE, kernel.unique(), 0, nodes, [1] * len(nodes)))

            async def nothing_is_left() -> bool:
                return (await guest.state()).nodes == 1

            for _ in range(100):
                if await nothing_is_left():
                    break
                await kernel.ask(GetAttributes(SHARE, kernel.unique(), ROOT))
            assert await nothing_is_left()


def test_a_directory_that_is_left_in_the_middle_is_not_kept_for_ever(
    share: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(entries, "PIECE", 1000)
    monkeypatch.setattr(snapshots, "MAX_SNAPSHOTS", 2)
    directories = [share.ask(Lookup, ROOT, b"d").node]
    for name in ("e", "g"):
        (share.path / name).mkdir()
        directories.append(share.node(name))
    for number in directories:
        for name in range(20):
            answer(share, Create, number, b"%d" % name, 0o644, os.O_EXCL)
        assert answer(share, ListEntries, number, 0).value.end is False  # type: ignore[union-attr]
    assert len(share.tree._core.snapshots._kept) == 2
    assert len(listed(share, directories[0])) == 20


def test_a_name_that_goes_meanwhile(share: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the reading of the directory and the look at the file."""
    real = share.tree._core.promises.look

    def look(directory: Any, name: bytes) -> Any:
        if name == b"file" and (share.path / "file").exists():
            os.unlink(share.path / "file")
        return real(directory, name)

    monkeypatch.setattr(share.tree._core.promises, "look", look)
    assert without_node(listed(share)) == {b"file"}
    answer(share, Unlink, ROOT, b"fifo")
    assert b"fifo" not in listed(share)


@pytest.mark.parametrize("call", [(Unlink, ROOT, b"file"), (Rename, ROOT, b"link", ROOT, b"file")])
def test_a_file_that_loses_one_of_its_names_is_told(tmp_path: Path, call: tuple[Any, ...]) -> None:
    """The agent has a list of another directory with it, and its kernel does not know that they are the same."""
    (tmp_path / "d").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    os.link(tmp_path / "file", tmp_path / "d" / "file")
    told: list[Any] = []
    with serving(tmp_path, watches=Watched(), retract=told.append) as share:
        [listed_too] = listed(share, share.node("d")).values()
        assert share.node("file") == listed_too.node
        share.ask(*call)
        assert [number for retraction in told for number in retraction.attributes] == [listed_too.node]
        alone = share.ask(Create, ROOT, b"alone", 0o644, os.O_EXCL).node
        share.ask(MakeLink, alone, ROOT, b"another")
        share.ask(Unlink, ROOT, b"another")
        assert len(told) == 1, "it was in no list"
