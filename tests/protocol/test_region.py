"""Which bytes are whose: the slots and marks of a region cover its file once, and the two sides agree."""

from __future__ import annotations

import ctypes
import mmap
import struct
import sys
from collections.abc import Iterator

import pytest

from protocol.bulk import SLOT
from protocol.region import CONTROL, FILE_SIZE, FILES, MARK_PAGE, SLOTS, Plane, Region
from protocol.session import Role


@pytest.fixture
def memory() -> Iterator[mmap.mmap]:
    with mmap.mmap(-1, FILE_SIZE) as mapped:
        yield mapped


@pytest.fixture
def region(memory: mmap.mmap) -> Iterator[Region]:
    opened = Region(memory)
    yield opened
    opened.close()


def test_the_file_is_its_slots_and_a_page_for_each_plane() -> None:
    assert (SLOTS, FILE_SIZE) == (384, (48 << 20) + 2 * MARK_PAGE)


def test_what_one_side_writes_the_other_reads(region: Region) -> None:
    for plane in (CONTROL, FILES):
        own, peers = region.halves(plane, Role.HOST)
        assert region.halves(plane, Role.GUEST) == (peers, own)
        own[0:4], peers[0:4] = b"host", b"gues"
        assert [bytes(half[:4]) for half in region.halves(plane, Role.GUEST)] == [b"gues", b"host"]


@pytest.mark.skipif(sys.platform != "linux", reason="page tables are looked at in /proc")
def test_what_is_populated_is_in_the_page_tables(region: Region, memory: mmap.mmap) -> None:
    page = mmap.PAGESIZE

    def present(plane: Plane) -> int:
        start = (address_of(memory) + plane.first * SLOT) // page
        with open("/proc/self/pagemap", "rb") as table:
            table.seek(8 * start)
            entries = table.read(8 * (2 * plane.slots * SLOT // page))
        return sum(entry >> 63 for (entry,) in struct.iter_unpack("=Q", entries))

    assert present(FILES) == present(CONTROL) == 0
    region.populate(FILES)
    assert present(FILES) == 2 * FILES.slots * SLOT // page
    assert present(CONTROL) == 0


def address_of(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def test_everything_belongs_to_exactly_one(region: Region, memory: mmap.mmap) -> None:
    parts = [
        part for plane in (CONTROL, FILES) for part in (*region.halves(plane, Role.HOST), region.mark(plane))
    ]
    assert [len(part) // SLOT for part in parts] == [64, 64, 0, 128, 128, 0]
    for number, part in enumerate(parts, start=1):
        assert not any(part[:: SLOT // 2]), "nobody else's"
        part[:] = bytes([number]) * len(part)
    content = memory[:]
    assert [content.count(number) for number in range(7)] == [0, *(len(part) for part in parts)]


def test_slots_are_counted_over_the_file(region: Region, memory: mmap.mmap) -> None:
    region.view(SLOTS - 1)[-1] = 7
    assert memory[SLOTS * SLOT - 1] == 7
    assert len(region.view(0)) == SLOT
    _, from_guest = region.halves(CONTROL, Role.HOST)
    from_guest[0] = 9
    assert region.view(64)[0] == 9


@pytest.mark.parametrize("slot", [-1, SLOTS])
def test_there_are_no_others(region: Region, slot: int) -> None:
    with pytest.raises(ValueError, match=f"there is no slot {slot}"):
        region.view(slot)


def test_a_file_of_another_size_is_no_region() -> None:
    with mmap.mmap(-1, FILE_SIZE - MARK_PAGE) as small, pytest.raises(ValueError, match="instead of"):
        Region(small)


def test_who_still_reads_keeps_the_memory() -> None:
    memory = mmap.mmap(-1, FILE_SIZE)
    region = Region(memory)
    slot = region.view(3)
    slot[:3] = b"abc"
    region.close()
    assert bytes(slot[:3]) == b"abc"
    with pytest.raises(ValueError, match="released"):
        region.view(4)
    slot.release()
    memory.close()


def test_without_readers_it_is_unmapped_at_once() -> None:
    memory = mmap.mmap(-1, FILE_SIZE)
    Region(memory).close()
    assert memory.closed
