"""Events as bytes, and as the kernel makes them for root and for an ordinary user."""

from __future__ import annotations

import errno
import os
import struct
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fileserver import fanotify
from fileserver.fanotify import OVERFLOW, Event, FanotifyGroup, identify, parse
from tests.fileserver.stranger import FILESYSTEMS, Stranger, watchable

NOBODY = 65534

FSID = b"\xae\xd2\xec\xb8\x75\x65\xff\x33"
KEY = FSID + struct.pack("=Ii", 8, 1) + b"\x01\x80\x23\x00\x35\x80\xd8\x7b"
CHILD = FSID + struct.pack("=Ii", 8, 1) + b"\x12\x80\x23\x00\x36\x10\x60\x38"
FID, DFID_NAME, DFID = 1, 2, 3

# As read on Linux 6.18, ext4: another process has made the file "x" in a directory, and written to it.
CREATED = bytes.fromhex(
    "38000000" "03" "00" "1800" "0001000000000000" "ffffffff" "00000000"
    "02002000" "aed2ecb87565ff33" "08000000" "01000000" "018023003580d87b" "78000000"
)  # fmt: skip
WRITTEN = bytes.fromhex(
    "54000000" "03" "00" "1800" "0a00000000000000" "ffffffff" "00000000"
    "02002000" "aed2ecb87565ff33" "08000000" "01000000" "018023003580d87b" "78000000"
    "01001c00" "aed2ecb87565ff33" "08000000" "01000000" "1280230036106038"
)  # fmt: skip


def record(kind: int, key: bytes, name: bytes = b"") -> bytes:
    content = key + (name + b"\0" if kind == DFID_NAME else b"")
    content += bytes(-len(content) % 4)
    return struct.pack("=BBH", kind, 0, 4 + len(content)) + content


def event(mask: int, pid: int, *records: bytes, version: int = 3) -> bytes:
    content = b"".join(records)
    return struct.pack("=IBBHQii", 24 + len(content), version, 0, 24, mask, -1, pid) + content


# --- bytes ---------------------------------------------------------------------------------------------


def test_what_a_kernel_has_written() -> None:
    assert parse(CREATED + WRITTEN) == [
        Event(fanotify.CREATE, 0, KEY, b"x", b""),
        Event(fanotify.MODIFY | fanotify.CLOSE_WRITE, 0, KEY, b"x", CHILD),
    ]
    assert event(fanotify.CREATE, 0, record(DFID_NAME, KEY, b"x")) == CREATED
    assert parse(b"") == []


def test_each_kind_of_record() -> None:
    assert parse(event(fanotify.ATTRIB, 7, record(FID, CHILD))) == [
        Event(fanotify.ATTRIB, 7, b"", b"", CHILD)
    ]
    assert parse(event(fanotify.ATTRIB, 7, record(DFID, KEY))) == [Event(fanotify.ATTRIB, 7, KEY, b"", b"")]
    name = bytes(range(1, 256)).replace(b"/", b"")
    assert parse(event(fanotify.DELETE, 0, record(DFID_NAME, KEY, name))) == [
        Event(fanotify.DELETE, 0, KEY, name, b"")
    ]


def test_what_a_process_did_can_be_left_out() -> None:
    mine = [event(mask, 7, record(FID, CHILD)) for mask in (fanotify.ATTRIB, fanotify.DELETE_SELF)]
    overflow = event(fanotify.Q_OVERFLOW, 7)
    damaged = event(fanotify.ATTRIB, 7, record(FID, CHILD), version=4)
    block = mine[0] + CREATED + mine[0] + mine[1] + overflow + mine[0] + damaged
    assert parse(block, without=7) == parse(CREATED + mine[1] + overflow + damaged)
    assert len(parse(block, without=8)) == 7


def test_an_overflow_of_the_queue() -> None:
    assert parse(event(fanotify.Q_OVERFLOW, 0) + CREATED) == [
        Event(fanotify.Q_OVERFLOW, 0, b"", b"", b""),
        *parse(CREATED),
    ]


@pytest.mark.parametrize(
    "block",
    [
        event(fanotify.CREATE, 0, record(DFID_NAME, KEY, b"x"), version=4),
        event(fanotify.CREATE, 0),
        event(fanotify.CREATE, 0, record(9, b"")),
        event(fanotify.CREATE, 0, struct.pack("=BBH", DFID_NAME, 0, 200) + KEY),
        event(fanotify.CREATE, 0, struct.pack("=BBH", DFID_NAME, 0, 0) + KEY),
        event(fanotify.CREATE, 0, record(DFID_NAME, FSID + struct.pack("=Ii", 1 << 31, 1))),
        struct.pack("=IBBHQii", 0, 3, 0, 24, 1, -1, 0),
        struct.pack("=IBBHQii", 1 << 31, 3, 0, 24, 1, -1, 0),
        struct.pack("=IBBHQii", 24, 3, 0, 0, 1, -1, 0),
        struct.pack("=IBBHQii", 24, 3, 0, 28, 1, -1, 0),
        b"\x18",
    ],
)
def test_what_is_not_understood_may_have_been_anything(block: bytes) -> None:
    assert parse(CREATED + block) == [*parse(CREATED), OVERFLOW]


@given(st.binary(max_size=400))
def test_no_bytes_are_passed_over(block: bytes) -> None:
    events = parse(block)
    assert bool(events) == bool(block)
    assert all(each.directory or each.child or each.mask & fanotify.Q_OVERFLOW for each in events)


@given(st.data())
def test_damage_is_noticed_or_is_in_what_is_told(data: st.DataObject) -> None:
    """Whatever byte is wrong, what came before it is as it was, and no event is gone without a word."""
    block = CREATED + WRITTEN + CREATED
    at = data.draw(st.integers(0, len(block) - 1))
    damaged = block[:at] + bytes([data.draw(st.integers(0, 255))]) + block[at + 1 :]
    events, before = parse(damaged), parse(block)
    whole = (at >= len(CREATED)) + (at >= len(CREATED + WRITTEN))
    assert events[:whole] == before[:whole]
    assert len(events) == len(before) or OVERFLOW in events
    cut = parse(block[:at])
    assert cut in (before[:whole], [*before[:whole], OVERFLOW])
    assert (len(cut) == whole) == (at in (0, len(CREATED), len(CREATED + WRITTEN)))


# --- the kernel ----------------------------------------------------------------------------------------

MASK = (
    fanotify.MODIFY | fanotify.ATTRIB | fanotify.CLOSE_WRITE | fanotify.MOVED_FROM | fanotify.MOVED_TO
    | fanotify.CREATE | fanotify.DELETE | fanotify.DELETE_SELF | fanotify.MOVE_SELF | fanotify.ONDIR
)  # fmt: skip
FILE_MASK = fanotify.MODIFY | fanotify.ATTRIB | fanotify.CLOSE_WRITE | fanotify.DELETE_SELF


class Marked:
    """A directory and what is in it, some of it marked."""

    def __init__(self, place: Path, stack: ExitStack) -> None:
        self.place = place
        self._stack = stack
        self.group = FanotifyGroup()
        stack.callback(self.group.close)
        self.stranger = stack.enter_context(Stranger(place))
        self.key = self.mark("", MASK)

    def mark(self, name: str, mask: int) -> bytes:
        """And the key of it."""
        descriptor = os.open(self.place / name, os.O_PATH | os.O_NOFOLLOW)
        self._stack.callback(os.close, descriptor)
        self.group.mark(descriptor, mask)
        return identify(descriptor).key

    def descriptor(self) -> int:
        descriptor = os.open(self.place, os.O_PATH)
        self._stack.callback(os.close, descriptor)
        return descriptor

    def events(self) -> list[Event]:
        events = parse(self.group.read(1 << 16))
        assert self.group.read(1 << 16) == b""
        return events


@pytest.fixture(params=FILESYSTEMS)
def marked(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Marked]:
    with watchable(request.param, tmp_path) as place, ExitStack() as stack:
        yield Marked(place, stack)


def test_names_in_a_directory(marked: Marked) -> None:
    marked.stranger("echo 1 > a; mkdir d; mv a b; ln b c; rm b; ln -s c e; rmdir d")
    told = [(each.mask, each.name) for each in marked.events()]
    assert [each for each in told if each[1] != b"d"] == [
        (fanotify.CREATE, b"a"),
        (fanotify.MOVED_FROM, b"a"),
        (fanotify.MOVED_TO, b"b"),
        (fanotify.CREATE, b"c"),
        (fanotify.DELETE, b"b"),
        (fanotify.CREATE, b"e"),
    ]
    assert (fanotify.CREATE | fanotify.ONDIR, b"d") in told


def test_what_we_do_is_told_as_ours_and_apart_from_what_others_do(marked: Marked) -> None:
    file = marked.place / "f"
    file.touch()
    key = marked.mark("f", FILE_MASK)
    marked.events()
    with file.open("ab", buffering=0) as mine:
        mine.write(b"1")
        marked.stranger("echo 2 >> f")
        mine.write(b"3")
    pids = [each.pid for each in marked.events() if each.child == key and each.mask & fanotify.MODIFY]
    assert len(pids) == 2
    assert [pid == os.getpid() for pid in sorted(pids)] in ([True, False], [False, True])


def test_the_directory_itself(marked: Marked) -> None:
    marked.stranger("chmod 711 .; chmod 700 .")
    about = (fanotify.ATTRIB | fanotify.ONDIR, marked.key, fanotify.SELF, b"")
    assert {each[:1] + each[2:] for each in marked.events()} == {about}


def test_a_file_that_has_a_mark_is_heard_by_whatever_name(marked: Marked) -> None:
    (marked.place / "f").touch()
    (marked.place / "elsewhere").mkdir()
    key = marked.mark("f", FILE_MASK)
    marked.events()
    masks = []
    for commands in ("ln f elsewhere/g", "echo 1 >> elsewhere/g", "chmod 600 elsewhere/g", "rm elsewhere/g"):
        marked.stranger(commands)
        events = [each for each in marked.events() if each.child == key]
        assert events, commands
        masks.append(events[0].mask)
    assert masks == [
        fanotify.ATTRIB,
        fanotify.MODIFY | fanotify.CLOSE_WRITE,
        fanotify.ATTRIB,
        fanotify.ATTRIB,
    ]


def test_what_is_no_regular_file_can_have_a_mark(marked: Marked) -> None:
    os.symlink("nowhere", marked.place / "link")
    os.mkfifo(marked.place / "fifo")
    keys = [marked.mark(name, fanotify.ATTRIB) for name in ("link", "fifo")]
    marked.events()
    marked.stranger("touch -h link; chmod 600 fifo")
    assert [(each.child, each.mask) for each in marked.events()] == [(key, fanotify.ATTRIB) for key in keys]


def test_a_file_keeps_its_key_and_no_other_has_it(marked: Marked) -> None:
    keys = set()
    for number in range(20):
        path = marked.place / "f"
        path.write_text(str(number))
        descriptor = os.open(path, os.O_PATH)
        key = identify(descriptor).key
        os.rename(path, marked.place / "g")
        assert identify(descriptor).key == key
        os.close(descriptor)
        os.unlink(marked.place / "g")  # so that its inode number is used again
        keys.add(key)
    assert len(keys) == 20
    assert marked.key not in keys


def test_a_path_that_is_swapped_takes_no_mark_along(marked: Marked) -> None:
    """A mark is made by the descriptor of what is read then, whatever its path leads to meanwhile."""
    directory = marked.place / "d"
    directory.mkdir()
    descriptor = os.open(directory, os.O_RDONLY)
    directory.rename(marked.place / "old")
    directory.mkdir()
    marked.events()
    marked.group.mark(descriptor, MASK)
    key = identify(descriptor).key
    os.close(descriptor)
    marked.stranger("touch d/in-the-new-one; touch old/in-the-one-that-was-meant")
    assert [(each.directory, each.name) for each in marked.events()] == [(key, b"in-the-one-that-was-meant")]


def test_without_its_mark_nothing_is_heard(marked: Marked) -> None:
    descriptor = os.open(marked.place, os.O_RDONLY)
    marked.group.unmark(descriptor, MASK)
    marked.stranger("echo 1 > a")
    assert marked.events() == []
    with pytest.raises(OSError) as unmarked:
        marked.group.unmark(descriptor, MASK)
    assert unmarked.value.errno == errno.ENOENT
    os.close(descriptor)


def test_what_is_no_file_is_refused(marked: Marked) -> None:
    for refused in (lambda: marked.group.mark(-1, MASK), lambda: identify(-1)):
        with pytest.raises(OSError):
            refused()


def test_kernels_without_the_flag_of_handles(marked: Marked, monkeypatch: pytest.MonkeyPatch) -> None:
    """The handles are the same where both are to be had."""
    with_flag = identify(marked.descriptor())
    asked = []
    ask = fanotify._name_to_handle_at

    def before_linux_6_5(descriptor: int, name: bytes, handle: int, mount: int, flags: int) -> int:
        asked.append(flags)
        if flags & 0x200:
            fanotify.ctypes.set_errno(errno.EINVAL)
            return -1
        return int(ask(descriptor, name, handle, mount, flags))

    monkeypatch.setattr(fanotify, "_name_to_handle_at", before_linux_6_5)
    monkeypatch.setattr(fanotify, "_handle_flags", 0x1200)
    assert [identify(marked.descriptor()) for _ in range(2)] == [with_flag] * 2
    assert asked == [0x1200, 0x1000, 0x1000]


# Modules are imported before the privileges go: the user may not read them.
_AS_NOBODY = textwrap.dedent(
    """
    import os, subprocess, sys
    from fileserver import fanotify
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
    place = sys.argv[1]
    group = fanotify.FanotifyGroup()
    descriptor = os.open(place, os.O_PATH)
    group.mark(descriptor, fanotify.CREATE)
    key = fanotify.identify(descriptor).key
    open(place + "/mine", "w").close()
    subprocess.run(["touch", place + "/theirs"], check=True)
    events = fanotify.parse(group.read(65536))
    assert [(each.name, each.pid) for each in events] == [(b"mine", os.getpid()), (b"theirs", 0)], events
    assert all(each.directory == key for each in events)
    os.chmod(place, 0o300)
    try:
        fanotify.FanotifyGroup().mark(descriptor, fanotify.CREATE)
    except PermissionError:
        print("as it should be")
    """
)


@pytest.mark.skipif(os.geteuid() != 0, reason="all other tests here run as an ordinary user, then")
def test_an_ordinary_user_hears_the_same_and_knows_only_himself(place: Path) -> None:
    os.chown(place, NOBODY, NOBODY)
    done = subprocess.run(
        [sys.executable, "-c", _AS_NOBODY, place], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.stderr) == ("as it should be\n", "")
