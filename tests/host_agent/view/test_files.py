"""The operations, of a guest in the same process: a real tree is served (``fileserver``), and nothing is between."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fileserver.tree import Tree as Served
from host_agent.view.attributes import Owner, Ownership
from host_agent.view.files import NOW, OMIT, Files
from host_agent.view.tree import Tree
from protocol import codec
from protocol.files import (
    ROOT,
    Content,
    Entry,
    FileCall,
    Forget,
    List,
    Listing,
    Lookup,
    Read,
    ReadLink,
    Share,
)
from tests.fileserver.served import Journal

ME = Ownership(Owner.ME, os.geteuid(), os.getegid())


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Answered:
    value: Any = None
    payload: bytes = b""
    error: OSError | None = None

    def wait(self) -> tuple[Any, bytes]:
        if self.error is not None:
            raise self.error
        return self.value, self.payload


@dataclass
class Guest:
    """What would be at the other end. ``lies``: answers to a kind of call in place of the true ones."""

    served: dict[int, Served]
    tree: Tree
    epoch: str = "one"
    asked: list[FileCall[Any]] = field(default_factory=list)
    lies: dict[type, Answered] = field(default_factory=dict)

    def begin(self, call: FileCall[Any], payload: bytes = b"") -> Answered:
        self.asked.append(call)
        if type(call) in self.lies:
            return self.lies[type(call)]
        sent: Any = codec.decode(type(call), codec.encode(call))
        try:
            outcome = self.served[sent.share].perform(sent, payload)
        except OSError as error:
            return Answered(error=error)
        except KeyError:
            return Answered(error=OSError(errno.ESTALE, "gone"))
        return Answered(outcome.value, bytes(outcome.payload))  # type: ignore[arg-type]

    def kinds(self) -> list[str]:
        names = [type(call).__name__ for call in self.asked]
        self.asked.clear()
        return names


def serve(path: Path, *, read_only: bool = False) -> Served:
    return Served(str(path), read_only=read_only, recorder=Journal())


@pytest.fixture
def top(tmp_path: Path) -> Path:
    (tmp_path / "db/deep").mkdir(parents=True)
    (tmp_path / "db/file").write_text("content\n")
    (tmp_path / "ro").mkdir()
    return tmp_path


@pytest.fixture
def guest(top: Path) -> Iterator[Guest]:
    served = {1: serve(top / "db"), 2: serve(top / "ro", read_only=True)}
    yield Guest(served, Tree([Share(1, "/volumes/db"), Share(2, "/images/app:1", True)]))
    for each in served.values():
        each.close()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def files(guest: Guest, clock: Clock) -> Files:
    return Files(guest, ME, clock)


def names(files: Files, path: bytes) -> list[bytes]:
    handle = files.directories.opendir(path)
    found = [name for name, _, _ in files.directories.readdir(handle, 0)]
    files.directories.releasedir(handle)
    return found


def refused(number: int) -> Any:
    return pytest.raises(OSError, match=rf"\[Errno {number}\]")


# --- what is asked, and what is not ----------------------------------------------------------------------


def test_what_is_above_the_places_is_asked_of_nobody(files: Files, guest: Guest) -> None:
    assert names(files, b"/") == [b".", b"..", b"volumes", b"images"]
    assert names(files, b"/volumes") == [b".", b"..", b"db"]
    assert stat.S_ISDIR(files.getattr(b"/volumes").mode)
    assert files.statfs(b"/").namelen == 255
    assert guest.kinds() == []


def test_to_list_a_directory_and_look_at_all_of_it_is_one_message(
    files: Files, guest: Guest, top: Path
) -> None:
    for number in range(50):
        (top / f"db/deep/{number}").write_text("x")
    files.getattr(b"/volumes/db/deep")
    guest.kinds()
    for name in names(files, b"/volumes/db/deep")[2:]:
        assert files.getattr(b"/volumes/db/deep/" + name).size == 1
    assert guest.kinds() == ["List"]


def test_a_file_that_was_just_looked_up_is_opened_without_a_message(files: Files, guest: Guest) -> None:
    files.getattr(b"/volumes/db/file")
    guest.kinds()
    handle = files.data.open(b"/volumes/db/file", os.O_RDONLY)
    assert guest.kinds() == []
    assert files.data.read(handle, 100, 0) == b"content\n"
    files.data.release(handle)
    assert guest.kinds() == ["Read"]


def test_what_is_read_on_is_read_ahead(files: Files, guest: Guest, top: Path) -> None:
    noise = os.urandom(3_500_000)
    (top / "db/noise").write_bytes(noise)
    handle = files.data.open(b"/volumes/db/noise", os.O_RDONLY)
    guest.kinds()
    step, got = 128 << 10, b""
    while piece := files.data.read(handle, step, len(got)):
        got += piece
    assert got == noise
    assert len(guest.kinds()) <= 8
    assert files.data.read(handle, 10, 5) == noise[5:15]


def test_what_came_ahead_is_not_kept(files: Files, guest: Guest, clock: Clock, top: Path) -> None:
    (top / "db/noise").write_bytes(bytes(500_000))
    handle = files.data.open(b"/volumes/db/noise", os.O_RDONLY)
    assert files.data.read(handle, 1000, 0) == bytes(1000)
    assert files.data.read(handle, 1000, 1000) == bytes(1000)
    (top / "db/noise").write_bytes(b"x" * 500_000)
    clock.now += 1.1
    assert files.data.read(handle, 1000, 2000) == b"x" * 1000
    files.data.write(handle, b"y" * 10, 3000, append=False)
    assert files.data.read(handle, 10, 3000) == b"y" * 10


def test_what_came_ahead_of_a_change_that_was_shown_is_not_used(files: Files, top: Path) -> None:
    """The kernel drops what it has when it is shown another time, and would keep for long what it is given then."""
    path = b"/volumes/db/noise"
    (top / "db/noise").write_bytes(bytes(4_000_000))
    handle = files.data.open(path, os.O_RDONLY)
    for offset in (0, 1000, 2000):
        assert files.data.read(handle, 1000, offset) == bytes(1000)
    (top / "db/noise").write_bytes(b"x" * 4_000_000)
    files.getattr(path, handle)
    assert files.data.read(handle, 1000, 3000) == b"x" * 1000
    ahead = 1 << 20
    while ahead < 3 << 20:
        assert files.data.read(handle, 131072, ahead) == b"x" * 131072
        ahead += 131072


def test_what_came_ahead_of_our_own_change_is_not_used(files: Files, top: Path) -> None:
    path = b"/volumes/db/noise"
    (top / "db/noise").write_bytes(bytes(500_000))
    reader, writer = files.data.open(path, os.O_RDONLY), files.data.open(path, os.O_RDWR)

    def read_on() -> bytes:
        for offset in (0, 1000):
            files.data.read(reader, 1000, offset)
        return files.data.read(reader, 5, 3000)

    assert read_on() == bytes(5)
    files.data.write(writer, b"right", 3000, append=False)
    assert files.data.read(reader, 5, 3000) == b"right"
    assert read_on() == b"right"
    files.truncate(path, 3002)
    assert files.data.read(reader, 5, 3000) == b"ri"
    files.data.release(writer)
    files.data.release(reader)


def test_nodes_are_given_back(files: Files, guest: Guest, clock: Clock, top: Path) -> None:
    for number in range(200):
        (top / f"db/deep/{number}").touch()
    for number in range(200):
        files.getattr(b"/volumes/db/deep/%d" % number)
    for number in range(200):
        files.unlink(b"/volumes/db/deep/%d" % number)
    assert sum(len(call.nodes) for call in guest.asked if isinstance(call, Forget)) >= 128
    assert guest.served[1].describe().nodes < 80


# --- what others do --------------------------------------------------------------------------------------


def test_what_the_guest_changes_is_seen_a_second_later(files: Files, clock: Clock, top: Path) -> None:
    assert files.getattr(b"/volumes/db/file").size == 8
    (top / "db/file").write_text("longer content\n")
    (top / "db/deep").rename(top / "db/moved")
    clock.now += 1.1
    assert files.getattr(b"/volumes/db/file").size == 15
    with refused(errno.ENOENT):
        files.getattr(b"/volumes/db/deep")
    assert stat.S_ISDIR(files.getattr(b"/volumes/db/moved").mode)


def test_what_we_change_is_seen_at_once(files: Files, top: Path) -> None:
    handle = files.data.create(b"/volumes/db/new", 0o640, os.O_RDWR)
    files.data.write(handle, b"12345", 0, append=False)
    assert files.getattr(b"/volumes/db/new").size == 5
    assert files.getattr(b"", handle).size == 5
    files.data.write(handle, b"6", 0, append=True)
    files.truncate(b"", 3, handle)
    files.data.release(handle)
    assert (top / "db/new").read_bytes() == b"123"
    files.chmod(b"/volumes/db/new", 0o600)
    assert stat.S_IMODE(files.getattr(b"/volumes/db/new").mode) == 0o600
    files.utimens(b"/volumes/db/new", OMIT, 5_000_000_007)
    assert (top / "db/new").stat().st_mtime_ns == 5_000_000_007
    files.utimens(b"/volumes/db/new", NOW, OMIT)
    assert (top / "db/new").stat().st_mtime_ns == 5_000_000_007
    files.rename(b"/volumes/db/new", b"/volumes/db/file", 0)
    assert files.getattr(b"/volumes/db/file").size == 3
    with refused(errno.ENOENT):
        files.getattr(b"/volumes/db/new")


def test_what_is_written_goes_to_the_file_that_has_the_name_now(files: Files, top: Path) -> None:
    files.getattr(b"/volumes/db/file")
    (top / "db/file").rename(top / "db/old")
    (top / "db/file").write_text("by the guest\n")
    handle = files.data.open(b"/volumes/db/file", os.O_WRONLY | os.O_TRUNC)
    files.data.write(handle, b"here\n", 0, append=False)
    files.data.release(handle)
    assert (top / "db/file").read_text() == "here\n"
    assert (top / "db/old").read_text() == "content\n"


def test_who_opens_what_has_just_gone_has_the_kernel_look_again(files: Files, top: Path) -> None:
    files.getattr(b"/volumes/db/file")
    (top / "db/file").unlink()
    with refused(errno.ESTALE):
        files.data.open(b"/volumes/db/file", os.O_WRONLY | os.O_TRUNC)


def test_a_place_that_is_another_one_now(files: Files, guest: Guest, top: Path) -> None:
    files.getattr(b"/volumes/db/file")
    handle = files.data.open(b"/volumes/db/file", os.O_RDONLY)
    (top / "other").mkdir()
    guest.served[3] = serve(top / "other")
    guest.tree = Tree([Share(3, "/volumes/db")])
    with refused(errno.ENOENT):
        files.getattr(b"/volumes/db/file")
    with refused(errno.ENOENT):
        files.getattr(b"/images")
    guest.served.pop(1).close()
    with refused(errno.ESTALE):
        files.data.read(handle, 10, 0)
    files.data.release(handle)
    guest.served.pop(3).close()


def test_after_a_killed_server_an_open_file_is_found_by_its_path_if_it_is_the_same(
    files: Files, guest: Guest, clock: Clock, top: Path
) -> None:
    files.getattr(b"/volumes/db/file")
    same, other = (files.data.open(b"/volumes/db/file", os.O_RDONLY) for _ in range(2))
    guest.served[1].close()
    guest.served[1], guest.epoch = serve(top / "db"), "two"
    assert files.data.read(same, 100, 0) == b"content\n"
    (top / "db/file").rename(top / "db/old")
    (top / "db/file").write_text("another\n")
    clock.now += 1.1
    with refused(errno.ESTALE):
        files.data.read(other, 100, 0)
    files.data.release(same)
    files.data.release(other)


def test_a_number_that_is_good_for_nothing_is_looked_for_again(files: Files, guest: Guest, top: Path) -> None:
    files.getattr(b"/volumes/db/deep")
    (top / "db/deep/x").write_text("x")
    guest.served[1].close()
    guest.served[1] = serve(top / "db")  # nobody has told us
    assert files.getattr(b"/volumes/db/deep/x").size == 1


# --- what cannot be --------------------------------------------------------------------------------------


def test_what_is_read_only_is_not_even_asked_for(files: Files, guest: Guest) -> None:
    files.getattr(b"/images/app:1")
    guest.kinds()
    for change in (
        lambda: files.mkdir(b"/images/app:1/x", 0o700),
        lambda: files.data.create(b"/images/app:1/x", 0o700, os.O_RDWR),
        lambda: files.unlink(b"/images/app:1/x"),
        lambda: files.symlink(b"/images/app:1/x", b"y"),
        lambda: files.chmod(b"/images/app:1", 0o700),
        lambda: files.mkdir(b"/volumes/x", 0o700),
        lambda: files.setxattr(b"/images/app:1", b"user.x", b"", 0),
        lambda: files.access(b"/images/app:1", os.W_OK),
        lambda: files.access(b"/", os.W_OK),
    ):
        with refused(errno.EROFS):
            change()
    assert guest.kinds() == []


def test_a_place_itself_stays_where_it_is(files: Files) -> None:
    with refused(errno.EBUSY):
        files.rmdir(b"/volumes/db")
    with refused(errno.EBUSY):
        files.rename(b"/volumes/db", b"/volumes/db/deep/x", 0)
    with refused(errno.EROFS):
        files.rename(b"/volumes", b"/other", 0)


def test_nothing_goes_from_one_place_to_another(files: Files, guest: Guest, top: Path) -> None:
    guest.served[3] = serve(top / "ro")
    guest.tree = Tree([Share(1, "/volumes/db"), Share(3, "/volumes/other")])
    with refused(errno.EXDEV):
        files.rename(b"/volumes/db/file", b"/volumes/other/file", 0)
    with refused(errno.EXDEV):
        files.link(b"/volumes/db/file", b"/volumes/other/file")
    guest.served.pop(3).close()


# --- a guest that lies -----------------------------------------------------------------------------------

GOOD = Entry(5, b"")


@pytest.mark.parametrize("entry", [Entry(ROOT, b""), Entry(-3, b""), Entry(7, b""), Entry(7, b"x" * 88)])
def test_an_entry_that_is_none(files: Files, guest: Guest, entry: Entry) -> None:
    guest.lies[Lookup] = Answered(entry)
    with refused(errno.EIO):
        files.getattr(b"/volumes/db/x")


@pytest.mark.parametrize("target", [b"", b"a\0b", b"x" * 4096])
def test_a_target_that_is_none(files: Files, guest: Guest, top: Path, target: bytes) -> None:
    (top / "db/link").symlink_to("x")
    guest.lies[ReadLink] = Answered(Content(target))
    with refused(errno.EIO):
        files.readlink(b"/volumes/db/link")


def test_no_target_leads_out(files: Files, top: Path) -> None:
    (top / "db/deep/link").symlink_to("/etc/passwd")
    (top / "db/deep/up").symlink_to("../../../../etc/passwd")
    assert files.readlink(b"/volumes/db/deep/link") == b"../etc/passwd"
    assert files.readlink(b"/volumes/db/deep/up") == b"../etc/passwd"


def test_more_data_than_was_asked_for(files: Files, guest: Guest) -> None:
    handle = files.data.open(b"/volumes/db/file", os.O_RDONLY)
    guest.lies[Read] = Answered(None, b"x" * 100)
    with refused(errno.EIO):
        files.data.read(handle, 10, 0)


def test_a_listing_without_an_end(files: Files, guest: Guest) -> None:
    guest.lies[List] = Answered(Listing(0, False), b"")
    with refused(errno.EIO):
        names(files, b"/volumes/db")
