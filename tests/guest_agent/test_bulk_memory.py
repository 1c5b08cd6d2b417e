"""What the kernel says of a file's bytes, and when they are not where the host would look."""

from __future__ import annotations

import errno
import logging
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from guest_agent import bulk_memory
from guest_agent.bulk_memory import MAX_EXTENTS, NotMappable, open_region, parse_extents
from protocol.region import FILE_SIZE

SIZE = 1 << 20
LAST, UNKNOWN, DELALLOC, ENCODED, INLINE, UNWRITTEN, MERGED, SHARED = (
    0x1,
    0x2,
    0x4,
    0x8,
    0x200,
    0x800,
    0x1000,
    0x2000,
)


def answer(*extents: tuple[int, int, int, int], count: int | None = None) -> bytes:
    """``struct fiemap`` as a kernel leaves it: (logical, physical, length, flags), and room behind."""
    head = struct.pack("=QQIIII", 0, SIZE, 1, len(extents) if count is None else count, MAX_EXTENTS, 0)
    rows = (
        struct.pack("=QQQQQIIII", logical, physical, length, 0, 0, flags, 0, 0, 0)
        for logical, physical, length, flags in extents
    )
    return (head + b"".join(rows)).ljust(32 + MAX_EXTENTS * 56, b"\0")


def test_extents_in_the_order_of_the_file() -> None:
    assert parse_extents(answer((0, 8192, SIZE, LAST)), SIZE) == [8192, SIZE]
    two = answer((0, SIZE, 4096, MERGED), (4096, 0, SIZE - 4096, LAST | MERGED))
    assert parse_extents(two, SIZE) == [SIZE, 4096, 0, SIZE - 4096]


@pytest.mark.parametrize(
    ("extents", "clause"),
    [
        ([], f"its extents have 0 bytes of {SIZE}"),
        ([(0, 0, SIZE - 4096, LAST)], f"its extents have {SIZE - 4096} bytes"),
        ([(0, 0, SIZE + 4096, LAST)], f"its extents have {SIZE + 4096} bytes"),
        ([(4096, 0, SIZE - 4096, LAST)], "a hole at 0"),
        ([(0, 0, 4096, 0), (8192, 4096, SIZE - 8192, LAST)], "a hole at 4096"),
        ([(0, 0, SIZE, LAST | UNWRITTEN)], "the flags 0x801"),
        ([(0, 0, SIZE, LAST | DELALLOC | UNKNOWN)], "the flags 0x7"),
        ([(0, 0, SIZE, LAST | INLINE)], "the flags 0x201"),
        ([(0, 0, SIZE, LAST | ENCODED)], "the flags 0x9"),
        ([(0, 0, SIZE, LAST | SHARED)], "the flags 0x2001"),
    ],
)
def test_bytes_that_are_elsewhere_or_nowhere(extents: list[tuple[int, int, int, int]], clause: str) -> None:
    with pytest.raises(NotMappable, match=clause):
        parse_extents(answer(*extents), SIZE)


@pytest.fixture
def on_disk(tmp_path: Path) -> Iterator[int]:
    """A file of a real filesystem that knows where its bytes are."""
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        os.pwrite(descriptor, os.urandom(SIZE), 0)
        try:
            bulk_memory.extents_of(descriptor, SIZE)
        except OSError as error:
            pytest.skip(f"no FIEMAP here: {error}")
        except NotMappable as not_plain:
            pytest.skip(f"a filesystem that does not keep files plainly: {not_plain}")
        yield descriptor
    finally:
        os.close(descriptor)


def test_the_kernel_is_understood(on_disk: int) -> None:
    extents = bulk_memory.extents_of(on_disk, SIZE)
    assert sum(extents[1::2]) == SIZE
    assert all(offset > 0 and length > 0 for offset, length in zip(extents[::2], extents[1::2], strict=True))


def test_a_real_hole_and_what_was_only_reserved(on_disk: int) -> None:
    os.ftruncate(on_disk, 2 * SIZE)
    with pytest.raises(NotMappable, match=f"its extents have {SIZE} bytes of {2 * SIZE}"):
        bulk_memory.extents_of(on_disk, 2 * SIZE)
    os.pwrite(on_disk, b"x" * 4096, 2 * SIZE - 4096)
    with pytest.raises(NotMappable, match=f"a hole at {SIZE}"):
        bulk_memory.extents_of(on_disk, 2 * SIZE)
    os.posix_fallocate(on_disk, SIZE, SIZE)
    with pytest.raises(NotMappable, match="the flags 0x8"):
        bulk_memory.extents_of(on_disk, 2 * SIZE)


def test_without_the_memory_there_is_nothing_to_offer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert open_region(tmp_path / "slots") is None
    assert "bulk.none" in caplog.text


@pytest.mark.parametrize("kind", ["short", "symlink", "sparse"])
def test_a_file_that_cannot_be_it_is_not_offered(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    path = tmp_path / "slots"
    target = tmp_path / "target" if kind == "symlink" else path
    with target.open("wb") as file:
        file.truncate(FILE_SIZE - 1 if kind == "short" else FILE_SIZE)
    if kind == "symlink":
        path.symlink_to(target)
    assert open_region(path) is None
    assert "bulk.unusable" in caplog.text


def test_a_filesystem_without_a_device_is_not_offered(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: object) -> list[int]:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(bulk_memory, "extents_of", unsupported)
    path = tmp_path / "slots"
    with path.open("wb") as file:
        file.truncate(FILE_SIZE)
    assert open_region(path) is None
    assert "not supported" in caplog.text


def test_what_can_be_used_is_mapped_and_described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk_memory, "extents_of", lambda descriptor, size: [2 << 20, size])
    path = tmp_path / "slots"
    with path.open("wb") as file:
        file.truncate(FILE_SIZE)
    opened = open_region(path)
    assert opened is not None
    region, extents = opened
    assert extents == [2 << 20, FILE_SIZE]
    region.view(1)[:4] = b"here"
    region.close()
    with path.open("rb") as file:
        file.seek(128 << 10)
        assert file.read(4) == b"here"
