"""What a program of the host may do to files that the guest knows, row by row.

A row is a generator. Up to its first ``yield`` it makes files in the directory ``here`` of the share, and the guest gets to
know them; from then on, the guest must see each step that ends at a ``yield`` or with the row. ``away`` is a directory on
the same filesystem that is not shared. What a row has open or mapped stays so until the guest has seen everything.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

AT_FDCWD: Final = -100
AT_SYMLINK_FOLLOW: Final = 0x400
RENAME_EXCHANGE: Final = 2
PAGE: Final = mmap.PAGESIZE

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Hands:
    """Where a row works, and what it holds meanwhile."""

    here: Path
    away: Path
    kept: contextlib.ExitStack

    def open(self, path: Path, flags: int, mode: int = 0o644) -> int:
        descriptor = os.open(path, flags, mode)
        self.kept.callback(os.close, descriptor)
        return descriptor

    def map(self, path: Path) -> mmap.mmap:
        """The whole file, shared and writable."""
        return self.kept.enter_context(mmap.mmap(self.open(path, os.O_RDWR), 0))


Row = Callable[[Hands], Iterator[None]]


@dataclass(frozen=True, slots=True)
class Change:
    """``promised``: what is there before is kept by the guest without asking."""

    row: Row
    promised: bool


CHANGES: dict[str, Change] = {}


def change(*, promised: bool = True) -> Callable[[Row], Row]:
    """A row, named as its function is."""

    def add(row: Row) -> Row:
        CHANGES[row.__name__.replace("_", " ")] = Change(row, promised)
        return row

    return add


def exchange(one: Path, other: Path) -> None:
    """renameat2(2): both names at once."""
    if _libc.renameat2(AT_FDCWD, bytes(one), AT_FDCWD, bytes(other), RENAME_EXCHANGE) != 0:
        raise OSError(ctypes.get_errno(), "renameat2", str(one))


def put(path: Path, data: bytes, offset: int = 0) -> None:
    """Into the file as it is, neither made nor truncated."""
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.pwrite(descriptor, data, offset)
    finally:
        os.close(descriptor)


# --- data ------------------------------------------------------------------------------------------


@change()
def written_in_place(hands: Hands) -> Iterator[None]:
    (hands.here / "file").write_bytes(b"old" * 5000)
    yield
    put(hands.here / "file", b"new" * 5000)


@change()
def written_twice_within_a_tick(hands: Hands) -> Iterator[None]:
    (hands.here / "file").write_bytes(b"one")
    yield
    put(hands.here / "file", b"two")
    put(hands.here / "file", b"six")
    yield
    for number in range(100):
        put(hands.here / "file", b"%03d" % number)


@change()
def appended(hands: Hands) -> Iterator[None]:
    (hands.here / "file").write_bytes(b"first\n")
    yield
    with (hands.here / "file").open("ab") as file:
        file.write(b"second\n")
        file.flush()
        yield
        file.write(b"third\n" * PAGE)


@change()
def truncated(hands: Hands) -> Iterator[None]:
    (hands.here / "file").write_bytes(b"x" * 3 * PAGE)
    yield
    os.truncate(hands.here / "file", PAGE + 1)
    yield
    os.truncate(hands.here / "file", 2 * PAGE)
    yield
    (hands.here / "file").open("wb").close()


@change()
def allocated_and_punched(hands: Hands) -> Iterator[None]:
    (hands.here / "file").write_bytes(b"x" * 3 * PAGE)
    yield
    descriptor = hands.open(hands.here / "file", os.O_WRONLY)
    os.posix_fallocate(descriptor, 0, 4 * PAGE)
    yield
    punch_hole_and_keep_size = 3
    assert (
        _libc.fallocate(descriptor, punch_hole_and_keep_size, ctypes.c_long(PAGE), ctypes.c_long(PAGE)) == 0
    )


@change()
def copied_into(hands: Hands) -> Iterator[None]:
    (hands.here / "file").write_bytes(b"x" * 100)
    (hands.away / "source").write_bytes(b"y" * 50)
    yield
    source = hands.open(hands.away / "source", os.O_RDONLY)
    os.copy_file_range(source, hands.open(hands.here / "file", os.O_WRONLY), 50)


@change()
def written_by_one_who_moved_it_meanwhile(hands: Hands) -> Iterator[None]:
    (hands.here / "a").mkdir()
    (hands.here / "b").mkdir()
    (hands.here / "a/file").write_bytes(b"old")
    yield
    descriptor = hands.open(hands.here / "a/file", os.O_WRONLY)
    os.rename(hands.here / "a/file", hands.here / "b/file")
    os.pwrite(descriptor, b"new", 0)
    yield
    os.pwrite(descriptor, b"end", 0)


@change()
def mapped_and_stored_to(hands: Hands) -> Iterator[None]:
    """The later stores touch no time stamp, and until the end nobody closes anything."""
    (hands.here / "file").write_bytes(b"x" * 2 * PAGE)
    yield
    view = hands.map(hands.here / "file")
    for number in range(3):
        view[:2] = view[PAGE : PAGE + 2] = b"%02d" % number
        yield


@change(promised=False)
def mapped_before_the_guest_came(hands: Hands) -> Iterator[None]:
    (hands.here / "file").write_bytes(b"x" * 2 * PAGE)
    view = hands.map(hands.here / "file")
    view[:2] = b"00"
    yield
    for number in range(1, 4):
        view[:2] = view[PAGE : PAGE + 2] = b"%02d" % number
        yield


@change(promised=False)
def open_for_writing_before_the_guest_came(hands: Hands) -> Iterator[None]:
    descriptor = hands.open(hands.here / "file", os.O_WRONLY | os.O_CREAT)
    os.write(descriptor, b"first\n")
    yield
    os.write(descriptor, b"second\n")
    yield
    os.write(descriptor, b"third\n")


# --- other links -------------------------------------------------------------------------------------


@change(promised=False)
def written_through_another_link_here(hands: Hands) -> Iterator[None]:
    (hands.here / "file").write_bytes(b"old")
    (hands.here / "other").mkdir()
    os.link(hands.here / "file", hands.here / "other/link")
    yield
    put(hands.here / "other/link", b"new")


@change(promised=False)
def written_through_a_link_elsewhere(hands: Hands) -> Iterator[None]:
    (hands.here / "file").write_bytes(b"old")
    os.link(hands.here / "file", hands.away / "link")
    yield
    put(hands.away / "link", b"new")
    yield
    os.chmod(hands.away / "link", 0o600)
    yield
    os.unlink(hands.away / "link")


@change()
def linked_elsewhere_and_written_there(hands: Hands) -> Iterator[None]:
    """Of neither the directory of the file hears anything."""
    (hands.here / "file").write_bytes(b"old")
    yield
    os.link(hands.here / "file", hands.away / "link")
    put(hands.away / "link", b"new")
    yield
    put(hands.away / "link", b"newer")
    yield
    os.unlink(hands.away / "link")
    yield
    put(hands.here / "file", b"newest")


@change()
def linked_from_elsewhere(hands: Hands) -> Iterator[None]:
    """Nothing but the count of links changes."""
    (hands.here / "file").write_bytes(b"x")
    yield
    os.link(hands.here / "file", hands.away / "link")
    yield
    os.unlink(hands.away / "link")


@change(promised=False)
def written_through_a_link_that_is_gone(hands: Hands) -> Iterator[None]:
    (hands.here / "file").write_bytes(b"old")
    os.link(hands.here / "file", hands.away / "link")
    yield
    descriptor = hands.open(hands.away / "link", os.O_WRONLY)
    os.unlink(hands.away / "link")
    yield
    os.pwrite(descriptor, b"new", 0)
    yield
    os.pwrite(descriptor, b"end", 0)


@change(promised=False)
def made_without_a_name_and_written_after_it_got_one(hands: Hands) -> Iterator[None]:
    (hands.here / "known").write_bytes(b"x")
    descriptor = hands.open(hands.away, os.O_TMPFILE | os.O_RDWR)
    os.write(descriptor, b"first")
    source = f"/proc/self/fd/{descriptor}".encode()
    named = bytes(hands.here / "file")
    assert _libc.linkat(AT_FDCWD, source, AT_FDCWD, named, AT_SYMLINK_FOLLOW) == 0
    yield
    os.write(descriptor, b"second")
    yield
    os.pwrite(descriptor, b"third", 0)


# --- attributes ------------------------------------------------------------------------------------


@change()
def attributes(hands: Hands) -> Iterator[None]:
    (hands.here / "file").write_bytes(b"x")
    yield
    os.chmod(hands.here / "file", 0o640)
    yield
    os.utime(hands.here / "file", ns=(10**18, 10**18 + 123))
    yield
    os.chown(hands.here / "file", -1, 12)
    yield
    os.setxattr(hands.here / "file", "user.some", b"value")


@change()
def attributes_of_a_directory(hands: Hands) -> Iterator[None]:
    (hands.here / "directory").mkdir()
    yield
    os.chmod(hands.here / "directory", 0o700)
    yield
    os.utime(hands.here / "directory", ns=(10**18, 10**18 + 123))
    yield
    (hands.here / "directory/below").mkdir()
    yield
    (hands.here / "directory/below").rmdir()


# --- names -----------------------------------------------------------------------------------------


@change()
def created_where_nothing_was(hands: Hands) -> Iterator[None]:
    yield
    (hands.here / "file").write_bytes(b"new")
    yield
    (hands.here / "directory").mkdir()
    yield
    os.symlink("file", hands.here / "link")
    yield
    os.mkfifo(hands.here / "fifo")


@change()
def unlinked(hands: Hands) -> Iterator[None]:
    (hands.here / "file").write_bytes(b"x")
    (hands.here / "link").symlink_to("file")
    yield
    os.unlink(hands.here / "file")
    yield
    os.unlink(hands.here / "link")


@change()
def unlinked_and_made_again(hands: Hands) -> Iterator[None]:
    """Most filesystems give the number of the inode out again."""
    (hands.here / "file").write_bytes(b"0")
    yield
    for number in range(1, 4):
        os.unlink(hands.here / "file")
        (hands.here / "file").write_bytes(b"%d" % number)
        yield


@change()
def renamed(hands: Hands) -> Iterator[None]:
    (hands.here / "file").write_bytes(b"x")
    yield
    os.rename(hands.here / "file", hands.here / "directory")
    yield
    os.rename(hands.here / "directory", hands.here / "file")


@change()
def renamed_across_directories(hands: Hands) -> Iterator[None]:
    for name in ("a", "b"):
        (hands.here / name).mkdir()
    (hands.here / "a/file").write_bytes(b"x")
    yield
    os.rename(hands.here / "a/file", hands.here / "b/file")
    yield
    os.rename(hands.here / "b/file", hands.away / "file")
    yield
    os.rename(hands.away / "file", hands.here / "a/file")


@change()
def renamed_over(hands: Hands) -> Iterator[None]:
    (hands.here / "file").write_bytes(b"old")
    (hands.here / "draft").write_bytes(b"new")
    yield
    os.rename(hands.here / "draft", hands.here / "file")
    yield
    (hands.away / "draft").write_bytes(b"newer")
    os.rename(hands.away / "draft", hands.here / "file")


@change()
def exchanged(hands: Hands) -> Iterator[None]:
    (hands.here / "one").write_bytes(b"1")
    (hands.here / "two").write_bytes(b"2")
    (hands.here / "directory").mkdir()
    (hands.here / "directory/below").write_bytes(b"3")
    yield
    exchange(hands.here / "one", hands.here / "two")
    yield
    exchange(hands.here / "one", hands.here / "directory")


@change()
def exchanged_directories(hands: Hands) -> Iterator[None]:
    for name in ("one", "two"):
        (hands.here / name / "below").mkdir(parents=True)
        (hands.here / name / "below/file").write_text(name)
        (hands.here / name / f"only {name}").write_text(name)
    yield
    exchange(hands.here / "one", hands.here / "two")
    yield
    exchange(hands.here / "one/below", hands.here / "two/below")


@change()
def directories_made_and_removed(hands: Hands) -> Iterator[None]:
    yield
    (hands.here / "directory/below").mkdir(parents=True)
    (hands.here / "directory/below/file").write_bytes(b"x")
    yield
    shutil.rmtree(hands.here / "directory")
    yield
    (hands.here / "directory").mkdir()


@change()
def a_directory_renamed(hands: Hands) -> Iterator[None]:
    (hands.here / "directory/below").mkdir(parents=True)
    (hands.here / "directory/below/file").write_bytes(b"x")
    yield
    os.rename(hands.here / "directory", hands.here / "renamed")
    yield
    put(hands.here / "renamed/below/file", b"y")
    yield
    (hands.here / "renamed/below/new").write_bytes(b"z")


@change()
def a_directory_out_of_the_share_and_back(hands: Hands) -> Iterator[None]:
    (hands.here / "directory/below").mkdir(parents=True)
    (hands.here / "directory/below/file").write_bytes(b"x")
    yield
    os.rename(hands.here / "directory", hands.away / "directory")
    yield
    put(hands.away / "directory/below/file", b"y")
    (hands.away / "directory/below/new").write_bytes(b"z")
    os.rename(hands.away / "directory", hands.here / "directory")
    yield
    put(hands.here / "directory/below/file", b"z")


@change()
def a_directory_replaced(hands: Hands) -> Iterator[None]:
    (hands.here / "directory").mkdir()
    (hands.here / "directory/file").write_bytes(b"old")
    (hands.away / "directory").mkdir()
    (hands.away / "directory/file").write_bytes(b"new")
    yield
    os.rename(hands.here / "directory", hands.away / "old")
    os.rename(hands.away / "directory", hands.here / "directory")
    yield
    put(hands.here / "directory/file", b"end")


@change()
def kinds(hands: Hands) -> Iterator[None]:
    (hands.here / "file").write_bytes(b"x")
    yield
    os.unlink(hands.here / "file")
    (hands.here / "file").mkdir()
    yield
    (hands.here / "file").rmdir()
    os.symlink("nowhere", hands.here / "file")
    yield
    os.unlink(hands.here / "file")
    (hands.here / "file").write_bytes(b"y")


@change()
def symlinks_retargeted(hands: Hands) -> Iterator[None]:
    (hands.here / "link").symlink_to("one")
    yield
    (hands.here / "draft").symlink_to("two")
    os.rename(hands.here / "draft", hands.here / "link")
    yield
    os.unlink(hands.here / "link")
    (hands.here / "link").symlink_to("six")


@change()
def many_at_once(hands: Hands) -> Iterator[None]:
    for number in range(300):
        (hands.here / f"{number:03}").write_bytes(b"x")
    yield
    for number in range(0, 300, 3):
        put(hands.here / f"{number:03}", b"y")
        os.unlink(hands.here / f"{number + 1:03}")
        (hands.here / f"new{number:03}").write_bytes(b"z")
