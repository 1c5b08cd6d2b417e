"""Directory streams: slices of pieces, cut between records, resumable from any offset."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guest_agent.fuse import listing
from guest_agent.fuse.abi import Opcode
from protocol.files import DIRENT, List, Listing
from tests.guest_agent.fuse.script import Asked, Script, failed, pack

Record = tuple[int, bytes]


def dirent(off: int, name: bytes) -> bytes:
    record = DIRENT.pack(off ^ 0xABC, off, len(name), 8) + name
    return record + bytes(-len(record) % 8)


def records(blob: bytes) -> list[Record]:
    """Offsets and names of whole records."""
    found, position = [], 0
    while position < len(blob):
        _, off, length, _ = DIRENT.unpack_from(blob, position)
        found.append((off, blob[position + 24 : position + 24 + length]))
        position += 24 + length + 7 & ~7
    assert position == len(blob)
    return found


DOTS = [(1, b"."), (2, b"..")]


class Directory:
    """The host's side: answers each ``List`` with a piece of at most ``piece`` names."""

    def __init__(self, names: list[Record], piece: int) -> None:
        self.names = sorted(names)
        self.piece = piece
        self.asked: list[List] = []

    def answer(self, asked: Asked) -> None:
        assert isinstance(asked.call, List)
        self.asked.append(asked.call)
        after = asked.call.after
        rest = [name for name in self.names if name[0] > after]
        blob = b"".join(dirent(*name) for name in rest[: self.piece])
        asked.answer(Listing(len(blob), len(rest) <= self.piece), blob)


class Reader:
    """One open directory of the guest's kernel."""

    def __init__(self, script: Script, directory: Directory, handle: int | None = None) -> None:
        self.script = script
        self.directory = directory
        if handle is None:
            script.request(Opcode.OPENDIR, pack("II", 0, 0))
            handle = int.from_bytes(script.answers[0][2][:8], "little")
        self.handle = handle

    def read(self, off: int, size: int = 4096) -> list[Record]:
        self.script.request(Opcode.READDIR, pack("QQIIQII", self.handle, off, size, 0, 0, 0, 0))
        while self.script.link.asked:
            self.directory.answer(self.script.take())
        ((kind, _, reply),) = self.script.answers
        assert kind == "reply"
        assert len(reply) <= size
        return records(reply)

    def read_all(self, off: int = 0, size: int = 4096) -> list[Record]:
        found: list[Record] = []
        while page := self.read(off, size):
            found += page
            off = page[-1][0]
        return found

    def close(self) -> None:
        self.script.request(Opcode.RELEASEDIR, pack("QIIQ", self.handle, 0, 0, 0))


NAMES = [(number * 1000 + 17, b"name-%d" % number) for number in range(500)]


@pytest.mark.parametrize("piece", [1, 7, 100, 500, 1000])
def test_all_names_come_once_and_in_order(piece: int) -> None:
    directory = Directory(NAMES, piece)
    assert Reader(Script(), directory).read_all() == DOTS + NAMES
    # Each name crossed the link once: no piece was asked for again.
    assert len(directory.asked) == -(-len(NAMES) // piece)


def test_an_empty_directory_has_its_two_names() -> None:
    directory = Directory([], 10)
    assert Reader(Script(), directory).read_all() == DOTS
    assert len(directory.asked) == 1


@given(
    names=st.dictionaries(st.integers(3, 2**62), st.binary(min_size=1, max_size=255), max_size=60),
    piece=st.integers(1, 20),
    size=st.integers(360, 5000),
)
def test_pages_of_any_size_from_pieces_of_any_size(names: dict[int, bytes], piece: int, size: int) -> None:
    directory = Directory(list(names.items()), piece)
    assert Reader(Script(), directory).read_all(size=size) == DOTS + sorted(names.items())


def test_a_stream_that_is_rewound_is_listed_afresh() -> None:
    directory = Directory(list(NAMES), 100)
    reader = Reader(Script(), directory)
    reader.read_all()
    directory.names.insert(0, (5, b"new"))
    assert reader.read(0)[:3] == [*DOTS, (5, b"new")]


@pytest.mark.parametrize("position", [0, 1, 250, 498])
def test_it_goes_on_after_any_offset(position: int) -> None:
    reader = Reader(Script(), Directory(NAMES, 100))
    reader.read(0)
    assert reader.read_all(NAMES[position][0]) == NAMES[position + 1 :]


def test_the_two_names_can_be_gone_on_after_too() -> None:
    reader = Reader(Script(), Directory(NAMES, 100))
    reader.read(0)
    assert reader.read(1)[:2] == [DOTS[1], NAMES[0]]
    assert reader.read(2)[:1] == [NAMES[0]]


def test_a_stream_from_before_a_restart_goes_on() -> None:
    directory = Directory(NAMES, 100)
    old = Reader(Script(), directory)
    page = old.read(0)
    new = Reader(Script(), directory, handle=old.handle)
    assert page + new.read_all(page[-1][0]) == DOTS + NAMES
    assert {call.handle for call in directory.asked} == {old.handle}


def test_handles_are_not_those_of_a_predecessor() -> None:
    handles = {Reader(Script(), Directory([], 1)).handle for _ in range(3)}
    assert len(handles) == 3
    assert all(handle < 1 << 63 for handle in handles)


def test_a_name_that_has_gone_is_a_position_all_the_same() -> None:
    directory = Directory(list(NAMES), 100)
    reader = Reader(Script(), directory)
    page = reader.read(0)
    directory.names.remove(page[-1])
    assert reader.read(page[-1][0])[0] == NAMES[len(page) - 2]
    assert reader.read_all(NAMES[300][0] - 1)[0] == NAMES[300]


def test_what_is_held_is_bounded_and_can_be_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "MAX_HELD", 40_000)
    script = Script()
    directory = Directory(NAMES, 500)
    readers = [Reader(script, directory) for _ in range(10)]
    pages = [reader.read(0) for reader in readers]
    assert 0 < script.volume.listings.held <= 40_000
    for reader, page in zip(readers, pages, strict=True):
        assert page + reader.read_all(page[-1][0]) == DOTS + NAMES


def test_nothing_is_held_of_what_was_read_or_closed() -> None:
    script = Script()
    read, closed = Reader(script, Directory(NAMES, 100)), Reader(script, Directory(NAMES, 100))
    read.read_all()
    closed.read(0, 1000)
    assert script.volume.listings.held > 0
    closed.close()
    assert script.volume.listings.held == 0


def test_a_stream_closed_while_it_is_read_leaves_nothing() -> None:
    script = Script()
    reader = Reader(script, Directory(NAMES, 100))
    script.request(Opcode.READDIR, pack("QQIIQII", reader.handle, 0, 4096, 0, 0, 0, 0))
    reader.close()
    reader.directory.answer(script.take())
    assert script.volume.listings.held == 0


@pytest.mark.parametrize("blob", [dirent(5, b"name")[:-8], dirent(5, b"name")[:20], dirent(5, b"n" * 5000)])
def test_records_that_are_none_are_an_error_and_no_loop(blob: bytes) -> None:
    script = Script()
    reader = Reader(script, Directory([], 1))
    unique = script.request(Opcode.READDIR, pack("QQIIQII", reader.handle, 0, 4096, 0, 0, 0, 0))
    script.take().answer(Listing(len(blob), True), blob)
    assert script.answers == failed(unique, "EIO")


def test_an_error_of_the_host_is_the_readers() -> None:
    script = Script()
    reader = Reader(script, Directory([], 1))
    unique = script.request(Opcode.READDIR, pack("QQIIQII", reader.handle, 0, 4096, 0, 0, 0, 0))
    asked: Any = script.take()
    assert (asked.call.handle, asked.call.after, asked.call.attributes) == (reader.handle, 0, False)
    asked.fail(13)
    assert script.answers == failed(unique, "EACCES")
