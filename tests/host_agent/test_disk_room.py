from __future__ import annotations

import os
from pathlib import Path

import pytest

from host_agent.disk_room import ENOUGH_MORE, LITTLE_ROOM, DiskRoom, DiskState, allocated, little_left

GIB = 1 << 30
LARGE = 60 * GIB


@pytest.mark.parametrize(
    ("before", "free", "after"),
    [
        (DiskState.ROOMY, LITTLE_ROOM, DiskState.ROOMY),
        (DiskState.ROOMY, LITTLE_ROOM - 1, DiskState.LOW),
        (DiskState.LOW, LITTLE_ROOM + ENOUGH_MORE - 1, DiskState.LOW),
        (DiskState.LOW, LITTLE_ROOM + ENOUGH_MORE, DiskState.ROOMY),
        (DiskState.FULL, LITTLE_ROOM + ENOUGH_MORE, DiskState.ROOMY),
        (DiskState.FULL, 0, DiskState.LOW),
    ],
)
def test_the_state_follows_what_is_free(before: DiskState, free: int, after: DiskState) -> None:
    assert DiskRoom(LARGE, 0, free).judged(before, stopped=False) is after
    assert DiskRoom(LARGE, 0, free).judged(before, stopped=True) is DiskState.FULL


def test_a_disk_that_can_take_no_more_needs_no_room() -> None:
    full = DiskRoom(LARGE, LARGE + 4096, 0)  # with what the host's filesystem keeps of it itself
    for before in DiskState:
        assert full.judged(before, stopped=False) is DiskState.ROOMY


def test_a_small_disk_needs_what_it_may_still_take() -> None:
    assert DiskRoom(2 * GIB, GIB, GIB).judged(DiskState.ROOMY, stopped=False) is DiskState.ROOMY
    assert DiskRoom(2 * GIB, GIB, GIB - 1).judged(DiskState.ROOMY, stopped=False) is DiskState.LOW


def test_a_sparse_file_takes_what_was_written(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    assert allocated(disk) == 0
    with disk.open("wb") as file:
        file.truncate(GIB)
        file.write(os.urandom(1 << 20))
    room = DiskRoom.of(disk, GIB)
    assert 1 << 20 <= room.allocated < 2 << 20
    assert (room.size, room.free > 0) == (GIB, True)


def test_how_much_is_left_is_said() -> None:
    assert little_left(3 * GIB).startswith("3 GiB are left")
