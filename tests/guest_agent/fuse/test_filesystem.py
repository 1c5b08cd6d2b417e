"""Each request becomes the call that it means, and the result the reply that the kernel expects."""

from __future__ import annotations

import os
import stat
from typing import Any

import pytest

from guest_agent.fuse.abi import Opcode
from guest_agent.fuse.volume import Volume
from protocol import files
from protocol.files import Attributes, Content, Entry, FilesystemSize, Opened, Position, Written
from tests.guest_agent.fuse.script import (
    ATTRIBUTES,
    Script,
    ScriptedKernel,
    ScriptedNotifier,
    failed,
    pack,
    replied,
)

ENTRY = Entry(9, ATTRIBUTES)
ENTRY_OUT = pack("QQQQII", 9, 0, 0, 0, 0, 0) + ATTRIBUTES
OPEN_OUT_KEEP_CACHE = pack("QII", 0, 2, 0)
ATTR_OUT = pack("QII", 0, 0, 0) + ATTRIBUTES

TRANSLATIONS: list[tuple[Opcode, bytes, Any, object, bytes]] = [
    (Opcode.LOOKUP, b"na\xffme\0", files.Lookup(7, 2, 5, b"na\xffme"), ENTRY, ENTRY_OUT),
    (Opcode.GETATTR, pack("IIQ", 0, 0, 0), files.GetAttributes(7, 2, 5), Attributes(ATTRIBUTES), ATTR_OUT),
    (Opcode.READLINK, b"", files.ReadLink(7, 2, 5), Content(b"../there"), b"../there"),
    (Opcode.SYMLINK, b"new\0to/there\0", files.MakeSymlink(7, 2, 5, b"new", b"to/there"), ENTRY, ENTRY_OUT),
    (
        Opcode.MKNOD,
        pack("IIII", 0o10600, 0, 0o22, 0) + b"fifo\0",
        files.MakeNode(7, 2, 5, b"fifo", 0o10600),
        ENTRY,
        ENTRY_OUT,
    ),
    (
        Opcode.MKDIR,
        pack("II", 0o755, 0o22) + b"d\0",
        files.MakeDirectory(7, 2, 5, b"d", 0o755),
        ENTRY,
        ENTRY_OUT,
    ),
    (Opcode.UNLINK, b"gone\0", files.Unlink(7, 2, 5, b"gone"), None, b""),
    (Opcode.RMDIR, b"gone\0", files.RemoveDirectory(7, 2, 5, b"gone"), None, b""),
    (Opcode.RENAME, pack("Q", 6) + b"old\0new\0", files.Rename(7, 2, 5, b"old", 6, b"new", 0), None, b""),
    (
        Opcode.RENAME2,
        pack("QII", 6, 2, 0) + b"old\0new\0",
        files.Rename(7, 2, 5, b"old", 6, b"new", 2),
        None,
        b"",
    ),
    (Opcode.LINK, pack("Q", 8) + b"too\0", files.MakeLink(7, 2, 8, 5, b"too"), ENTRY, ENTRY_OUT),
    (
        Opcode.CREATE,
        pack("IIII", os.O_RDWR | os.O_EXCL, 0o100444, 0o22, 0) + b"f\0",
        files.Create(7, 2, 5, b"f", 0o100444, os.O_RDWR | os.O_EXCL),
        ENTRY,
        ENTRY_OUT + OPEN_OUT_KEEP_CACHE,
    ),
    (
        Opcode.TMPFILE,
        pack("IIII", os.O_WRONLY, 0o100600, 0o22, 0) + b"#123\0",
        files.CreateUnnamed(7, 2, 5, 0o100600, os.O_WRONLY),
        ENTRY,
        ENTRY_OUT + OPEN_OUT_KEEP_CACHE,
    ),
    (
        Opcode.STATFS,
        b"",
        files.GetFilesystemSize(7, 2, 5),
        FilesystemSize(100, 50, 40, 30, 20, 4096, 255, 512),
        pack("QQQQQIIII24x", 100, 50, 40, 30, 20, 4096, 255, 512, 0),
    ),
    (Opcode.FSYNC, pack("QII", 0, 1, 0), files.Sync(7, 2, 5, True), None, b""),
    (Opcode.FSYNCDIR, pack("QII", 0, 0, 0), files.Sync(7, 2, 5, False), None, b""),
    (
        Opcode.SETXATTR,
        pack("II", 3, 1) + b"user.k\0v\0v",
        files.SetXattr(7, 2, 5, b"user.k", b"v\0v", 1),
        None,
        b"",
    ),
    (
        Opcode.GETXATTR,
        pack("II", 9, 0) + b"user.k\0",
        files.GetXattr(7, 2, 5, b"user.k"),
        Content(b"v"),
        b"v",
    ),
    (
        Opcode.GETXATTR,
        pack("II", 0, 0) + b"user.k\0",
        files.GetXattr(7, 2, 5, b"user.k"),
        Content(b"v\0v"),
        pack("II", 3, 0),
    ),
    (Opcode.LISTXATTR, pack("II", 0, 0), files.ListXattr(7, 2, 5), Content(b"user.k\0"), pack("II", 7, 0)),
    (Opcode.LISTXATTR, pack("II", 7, 0), files.ListXattr(7, 2, 5), Content(b"user.k\0"), b"user.k\0"),
    (Opcode.REMOVEXATTR, b"user.k\0", files.RemoveXattr(7, 2, 5, b"user.k"), None, b""),
    (
        Opcode.FALLOCATE,
        pack("QQQII", 0, 4096, 8192, 3, 0),
        files.Allocate(7, 2, 5, 3, 4096, 8192),
        Attributes(ATTRIBUTES),
        b"",
    ),
    (
        Opcode.LSEEK,
        pack("QQII", 0, 1 << 40, 4, 0),
        files.Seek(7, 2, 5, 1 << 40, 4),
        Position(1 << 41),
        pack("Q", 1 << 41),
    ),
    (
        Opcode.COPY_FILE_RANGE,
        pack("QQQQQQQ", 0, 10, 6, 0, 20, 1 << 20, 0),
        files.CopyRange(7, 2, 5, 10, 6, 20, 1 << 20),
        Written(4096, 20, ATTRIBUTES),
        pack("II", 4096, 0),
    ),
]


@pytest.mark.parametrize(("opcode", "body", "call", "result", "reply"), TRANSLATIONS)
def test_a_request_is_a_call_and_its_result_the_reply(
    opcode: Opcode, body: bytes, call: Any, result: object, reply: bytes
) -> None:
    script = Script()
    unique = script.request(opcode, body)
    asked = script.take()
    assert (asked.call, asked.payload) == (call, b"")
    assert script.answers == []
    asked.answer(result)
    assert script.answers == replied(unique, reply)


@pytest.mark.parametrize(("opcode", "body", "call", "result", "reply"), TRANSLATIONS)
def test_an_errno_of_the_host_is_the_callers(
    opcode: Opcode, body: bytes, call: Any, result: object, reply: bytes
) -> None:
    script = Script()
    unique = script.request(opcode, body)
    script.take().fail(28)
    assert script.answers == failed(unique, "ENOSPC")


def setattr_body(valid: int, **fields: int) -> bytes:
    names = [
        "fh",
        "size",
        "owner",
        "atime",
        "mtime",
        "ctime",
        "atimensec",
        "mtimensec",
        "ctimensec",
        "mode",
        "unused",
        "uid",
        "gid",
    ]
    return pack("II" + "Q" * 6 + "I" * 8, valid, 0, *(fields.get(name, 0) for name in names), 0)


def test_setattr_passes_on_what_the_host_understands() -> None:
    script = Script()
    valid = files.SET_MODE | files.SET_SIZE | files.SET_ATIME | files.SET_MTIME_NOW | files.KILL_PRIVILEGE
    body = setattr_body(
        valid | 1 << 6 | 1 << 9 | 1 << 10,
        mode=0o640,
        size=77,
        atime=2**64 - 1,
        atimensec=5,
        mtime=3,
        mtimensec=4,
        uid=1,
        gid=2,
    )
    unique = script.request(Opcode.SETATTR, body)
    asked = script.take()
    # An access time before 1970 is a negative one.
    expected = files.SetAttributes(7, unique, 5, valid, 0o640, 1, 2, 77, -999_999_995, 3_000_000_004)
    assert asked.call == expected
    asked.answer(Attributes(ATTRIBUTES))
    assert script.answers == replied(unique, ATTR_OUT)


def read_body(offset: int, size: int) -> bytes:
    return pack("QQIIQII", 0, offset, size, 0, 0, 0, 0)


def test_read_gives_the_payload() -> None:
    script = Script()
    unique = script.request(Opcode.READ, read_body(1 << 33, 4096))
    asked = script.take()
    assert asked.call == files.Read(7, unique, 5, 1 << 33, 4096)
    asked.answer(payload=b"short")
    assert script.answers == replied(unique, b"short")


def write_body(data: bytes, offset: int = 0, flags: int = 0, write_flags: int = 0) -> bytes:
    return pack("QQIIQII", 0, offset, len(data), write_flags, 0, flags, 0) + data


@pytest.mark.parametrize(
    ("flags", "write_flags", "append", "kill"),
    [
        (os.O_WRONLY, 0, False, False),
        (os.O_WRONLY | os.O_APPEND, 0, True, False),
        (os.O_WRONLY | os.O_APPEND, 1, False, False),  # a dirty page is where it is
        (os.O_RDWR, 4, False, True),
    ],
)
def test_write_copies_its_data_out_of_the_buffer(
    flags: int, write_flags: int, append: bool, kill: bool
) -> None:
    script = Script()
    unique = script.request(Opcode.WRITE, write_body(b"data", 10, flags, write_flags))
    asked = script.take()
    assert asked.call == files.Write(7, unique, 5, 10, append, kill)
    assert asked.payload == b"data"
    asked.answer(Written(3, 10, ATTRIBUTES))
    assert script.answers == replied(unique, pack("II", 3, 0))


@pytest.mark.parametrize(
    ("opcode", "body", "error"),
    [
        (Opcode.OPEN, pack("II", 0, 0), "ENOSYS"),
        (Opcode.ACCESS, pack("II", 4, 0), "ENOSYS"),
        (Opcode.POLL, bytes(24), "ENOSYS"),
        (Opcode.BMAP, bytes(16), "ENOSYS"),
        (Opcode.SYNCFS, bytes(8), "ENOSYS"),
        (Opcode.IOCTL, bytes(32), "ENOTTY"),
        (Opcode.GETXATTR, pack("II", 20, 0) + b"security.capability\0", "ENODATA"),
        (Opcode.GETXATTR, pack("II", 20, 0) + b"trusted.overlay.opaque\0", "ENODATA"),
        (Opcode.GETXATTR, pack("II", 0, 0) + b"system.posix_acl_access\0", "EOPNOTSUPP"),
        (Opcode.SETXATTR, pack("II", 1, 0) + b"security.selinux\0x", "EOPNOTSUPP"),
        (Opcode.REMOVEXATTR, b"trusted.k\0", "EOPNOTSUPP"),
        (Opcode.COPY_FILE_RANGE, pack("QQQQQQQ", 0, 0, 6, 0, 0, 1, 1), "EINVAL"),
    ],
)
def test_some_answers_need_no_host(opcode: Opcode, body: bytes, error: str) -> None:
    script = Script()
    unique = script.request(opcode, body)
    assert script.link.calls == []
    assert script.answers == failed(unique, error)


def test_a_value_that_has_grown_does_not_fit() -> None:
    script = Script()
    unique = script.request(Opcode.GETXATTR, pack("II", 2, 0) + b"user.k\0")
    script.take().answer(Content(b"long"))
    assert script.answers == failed(unique, "ERANGE")


def test_a_release_of_no_handle_is_answered_here() -> None:
    script = Script()
    unique = script.request(Opcode.RELEASE, pack("QIIQ", 0, 0, 0, 0))
    assert script.link.calls == []
    assert script.answers == replied(unique)


def test_a_host_that_talks_nonsense_costs_the_caller_eio(caplog: pytest.LogCaptureFixture) -> None:
    script = Script()
    unique = script.request(Opcode.LOOKUP, b"a\0")
    script.take().answer(Position(5))
    assert script.answers == failed(unique, "EIO")
    assert "operation.failed" in caplog.text


def test_a_close_is_not_needed_where_no_locks_are_the_hosts() -> None:
    script = Script()
    unique = script.request(Opcode.FLUSH, pack("QIIQ", 0, 0, 0, 99))
    assert script.link.calls == []
    assert script.answers == failed(unique, "ENOSYS")


# --- forgetting ---------------------------------------------------------------------------------------------


def test_forgets_are_gathered_and_sent_together() -> None:
    script = Script()
    script.request(Opcode.FORGET, pack("Q", 1), node=5)
    script.request(Opcode.FORGET, pack("Q", 2), node=6)
    script.request(Opcode.BATCH_FORGET, pack("IIQQQQ", 2, 0, 5, 3, 8, 1), node=0)
    assert script.link.calls == []
    assert script.answers == []  # never answered
    script.timers.fire()
    (call,) = script.link.calls
    assert isinstance(call, files.Forget)
    assert (call.share, call.nodes, call.counts) == (7, [5, 6, 8], [4, 2, 1])
    assert call.unique >= 1 << 62
    assert script.timers.waiting == []


def test_many_forgets_are_cut_to_what_a_frame_holds() -> None:
    script = Script()
    nodes = range(2, 10_002)
    pairs = b"".join(pack("QQ", node, 1) for node in nodes)
    script.request(Opcode.BATCH_FORGET, pack("II", len(nodes), 0) + pairs)
    script.timers.fire()
    calls: list[Any] = script.link.calls
    assert [len(call.nodes) for call in calls] == [4096, 4096, 1808]
    assert [node for call in calls for node in call.nodes] == list(nodes)
    assert len({call.unique for call in calls}) == 3


# --- mounts that follow each other ---------------------------------------------------------------------------


def test_two_mounts_of_a_share_never_ask_with_the_same_unique() -> None:
    calls: list[Any] = []
    for salt in (1, 2):
        script = Script(salt=salt)
        script.request(Opcode.UNLINK, b"a\0", unique=2)
        calls += script.link.calls
    assert calls[0].unique != calls[1].unique
    assert all(call.unique < 1 << 62 for call in calls)


# --- stale data --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("opcode", "body", "result", "node"),
    [
        (Opcode.LOOKUP, b"a\0", Entry(9, ATTRIBUTES, True), 9),
        (Opcode.LINK, pack("Q", 8) + b"too\0", Entry(8, ATTRIBUTES, True), 8),
        (Opcode.CREATE, pack("IIII", 2, 0o100644, 0, 0) + b"f\0", Entry(9, ATTRIBUTES, True), 9),
        (Opcode.GETATTR, pack("IIQ", 0, 0, 0), Attributes(ATTRIBUTES, True), 5),
    ],
)
def test_stale_data_is_dropped_before_the_answer(
    opcode: Opcode, body: bytes, result: object, node: int
) -> None:
    script = Script()
    unique = script.request(opcode, body)
    script.take().answer(result)
    assert script.answers == []
    script.notifier.finish()
    dropped, answered = script.answers
    assert dropped == ("dropped", node)
    assert answered[:2] == ("reply", unique)


def test_only_attributes_of_a_directory_may_be_used_without_asking_for_a_tick() -> None:
    for kind, ns in ((stat.S_IFDIR, 1), (stat.S_IFREG, 0), (stat.S_IFLNK, 0)):
        attr = files.ATTR.pack(*[0] * 9, kind | 0o777, *[0] * 6)
        script = Script()
        script.request(Opcode.LOOKUP, b"a\0")
        script.take().answer(Entry(9, attr))
        assert script.answers[0][2] == pack("QQQQII", 9, 0, 0, 0, 0, ns) + attr
        script = Script()
        script.request(Opcode.GETATTR, pack("IIQ", 0, 0, 0))
        script.take().answer(Attributes(attr))
        assert script.answers[0][2] == pack("QII", 0, ns, 0) + attr


def test_whoever_asks_while_data_is_dropped_is_answered_after_that() -> None:
    """Two processes open a file that has changed on the host; both must see the new content."""
    script = Script()
    first = script.request(Opcode.GETATTR, pack("IIQ", 0, 0, 0))
    script.take().answer(Attributes(ATTRIBUTES, True))
    second = script.request(Opcode.GETATTR, pack("IIQ", 0, 0, 0))
    script.take().answer(Attributes(ATTRIBUTES))
    assert script.answers == []
    script.notifier.finish()
    assert [answer[:2] for answer in script.answers if answer[0] == "reply"] == [("reply", first)]
    script.notifier.finish()
    assert [answer[1] for answer in script.answers if answer[0] == "reply"][-1] == second
    third = script.request(Opcode.GETATTR, pack("IIQ", 0, 0, 0))
    script.take().answer(Attributes(ATTRIBUTES))
    assert script.answers[-1][:2] == ("reply", third)


def moved_append(script: Script) -> int:
    unique = script.request(Opcode.WRITE, write_body(b"x", 10, os.O_APPEND))
    script.take().answer(Written(1, 50, ATTRIBUTES))
    assert script.answers == []
    return unique


def test_an_append_that_went_elsewhere_is_dropped_before_the_answer() -> None:
    script = Script()
    unique = moved_append(script)
    script.notifier.finish()
    assert script.answers == [("dropped", 5), *replied(unique, pack("II", 1, 0))]
    script.timers.fire()
    assert script.answers == []


def test_an_append_whose_page_the_kernel_holds_is_answered_all_the_same() -> None:
    script = Script()
    unique = moved_append(script)
    assert script.timers.fire() == pytest.approx(0.02)
    assert script.answers == replied(unique, pack("II", 1, 0))
    script.notifier.finish()
    assert script.answers == [("dropped", 5)]


def test_only_the_first_of_many_appends_that_go_elsewhere_waits() -> None:
    script = Script()
    moved_append(script)
    script.timers.fire()
    assert len(script.answers) == 1
    for _ in range(3):
        unique = script.request(Opcode.WRITE, write_body(b"x", 10, os.O_APPEND))
        script.take().answer(Written(1, 50, ATTRIBUTES))
        assert script.answers == replied(unique, pack("II", 1, 0))
    assert [node for node, _ in script.notifier.waiting] == [5] * 4
    script.request(Opcode.WRITE, write_body(b"x", 50, os.O_APPEND))
    script.take().answer(Written(1, 50, ATTRIBUTES))  # where the kernel thought
    assert len(script.answers) == 1
    moved_append(script)  # and waits


def test_a_full_notifier_is_asked_again() -> None:
    script = Script()
    script.notifier.full = True
    unique = script.request(Opcode.GETATTR, pack("IIQ", 0, 0, 0))
    script.take().answer(Attributes(ATTRIBUTES, True))
    script.notifier.full = False
    assert script.answers == []
    script.timers.fire()
    script.notifier.finish()
    assert script.answers == [("dropped", 5), *replied(unique, ATTR_OUT)]


def test_what_one_mount_of_a_share_is_told_is_dropped_by_all() -> None:
    """The host says it once; a mount that was taken off may still be in use, with a cache of its own."""
    script = Script()
    kernel = ScriptedKernel()
    notifier = ScriptedNotifier(kernel)
    timers: Any = script.timers
    Volume(7, script.host, notifier, timers, salt=1, volumes=script.volumes)
    unique = script.request(Opcode.LOOKUP, b"a\0")
    script.take().answer(Entry(9, ATTRIBUTES, stale=True))
    assert script.answers == []
    assert [node for node, _ in notifier.waiting] == [9]
    script.notifier.finish()
    assert script.answers == [("dropped", 9), *replied(unique, ENTRY_OUT)]  # it does not wait for the other
    notifier.finish()
    assert kernel.log == [("dropped", 9)]


# --- locks that are the host's -----------------------------------------------------------------------------


def lock_body(kind: int, flags: int = 0) -> bytes:
    return pack("QQQQIIII", 3, 99, 0, 2**63 - 1, kind, 0, flags, 0)


def test_an_open_file_has_a_handle_on_the_host() -> None:
    script = Script(host_locks=True)
    unique = script.request(Opcode.OPEN, pack("II", os.O_RDWR | os.O_TRUNC, 0))
    asked = script.take()
    assert asked.call == files.OpenForLocks(7, unique, 5, os.O_RDWR)
    asked.answer(Opened(3))
    assert script.answers == replied(unique, pack("QII", 3, 2, 0))


def test_a_created_file_has_a_handle_too() -> None:
    script = Script(host_locks=True)
    unique = script.request(Opcode.CREATE, pack("IIII", 2, 0o100644, 0, 0) + b"f\0")
    script.take().answer(ENTRY)
    asked = script.take()
    assert asked.call == files.OpenForLocks(7, unique + 1, 9, os.O_RDWR)
    asked.answer(Opened(3))
    assert script.answers == replied(unique, ENTRY_OUT + pack("QII", 3, 2, 0))


def test_a_created_file_without_a_handle_is_forgotten() -> None:
    script = Script(host_locks=True)
    unique = script.request(Opcode.CREATE, pack("IIII", 2, 0o100644, 0, 0) + b"f\0")
    script.take().answer(ENTRY)
    script.take().fail(24)
    assert script.answers == failed(unique, "EMFILE")
    script.timers.fire()
    (call,) = script.link.calls
    assert isinstance(call, files.Forget)
    assert (call.nodes, call.counts) == ([9], [1])


def test_flush_gives_an_owners_locks_back_before_it_returns() -> None:
    script = Script(host_locks=True)
    unique = script.request(Opcode.FLUSH, pack("QIIQ", 3, 0, 0, 99))
    asked = script.take()
    assert asked.call == files.ReleaseOwner(7, unique, 5, 3, 99)
    assert script.answers == []
    asked.answer()
    assert script.answers == replied(unique)


def test_release_is_answered_at_once_and_reaches_the_host() -> None:
    script = Script(host_locks=True)
    unique = script.request(Opcode.RELEASE, pack("QIIQ", 3, 0, 2, 99))
    assert script.answers == replied(unique)
    assert script.link.calls == [files.Release(7, unique, 5, 3, 99)]


def lock(script: Script, *, stale: bool = False, flags: int = 0) -> int:
    """Have the host grant a lock; it has been asked about the data then."""
    unique = script.request(Opcode.SETLK, lock_body(1, flags))
    script.take().answer()
    asked = script.take()
    assert isinstance(asked.call, files.GetAttributes)
    assert asked.call.node == 5
    asked.answer(Attributes(ATTRIBUTES, stale))
    return unique


def test_who_gets_a_lock_sees_what_was_written_before() -> None:
    script = Script(host_locks=True)
    unique = lock(script, stale=True)
    assert script.answers == []
    script.notifier.finish()
    assert script.answers == [("dropped", 5), *replied(unique)]


def test_a_lock_is_kept_though_nobody_knows_of_the_data() -> None:
    script = Script(host_locks=True)
    unique = script.request(Opcode.SETLK, lock_body(1))
    script.take().answer()
    script.take().fail(116)
    script.notifier.finish()
    assert script.answers == [("dropped", 5), *replied(unique)]


def test_an_unlock_is_one_message() -> None:
    script = Script(host_locks=True)
    unique = script.request(Opcode.SETLK, lock_body(2))
    script.take().answer()
    assert script.answers == replied(unique)


def test_the_locks_of_an_open_file_end_with_it() -> None:
    """Of F_OFD_SETLK the kernel tells the owner, but at the end only RELEASE, which does not name it."""
    script = Script(host_locks=True)
    lock(script)
    script.request(Opcode.FLUSH, pack("QIIQ", 3, 0, 0, 77))  # by the process, whose lock it is not
    script.take().answer()
    script.request(Opcode.RELEASE, pack("QIIQ", 3, 0, 0, 0))
    given_back, released = script.link.calls
    assert isinstance(given_back, files.ReleaseOwner)
    assert (given_back.node, given_back.owner) == (5, 99)
    assert isinstance(released, files.Release)
    assert script.volume.lockers == {}


def test_the_locks_of_a_process_end_with_its_flush_alone() -> None:
    """Not with RELEASE, which comes later: the process may have locked the file through another handle by then."""
    script = Script(host_locks=True)
    lock(script)
    script.request(Opcode.FLUSH, pack("QIIQ", 3, 0, 0, 99))
    script.take().answer()
    unique = script.request(Opcode.RELEASE, pack("QIIQ", 3, 0, 0, 0))
    assert script.link.calls == [files.Release(7, unique, 5, 3, 0)]


def test_getlk() -> None:
    script = Script(host_locks=True)
    unique = script.request(Opcode.GETLK, lock_body(1))
    asked = script.take()
    assert asked.call == files.TestLock(7, unique, 5, 3, 99, 0, 2**63 - 1, 1)
    asked.answer(files.LockState(0, 10, 20, 0))
    assert script.answers == replied(unique, pack("QQII", 10, 20, 0, 0))


@pytest.mark.parametrize(("flags", "whole"), [(0, False), (1, True)])
def test_setlk_never_waits(flags: int, whole: bool) -> None:
    script = Script(host_locks=True)
    unique = script.request(Opcode.SETLK, lock_body(1, flags))
    asked = script.take()
    assert asked.call == files.SetLock(7, unique, 5, 3, 99, 0, 2**63 - 1, 1, whole)
    asked.fail(11)
    assert script.answers == failed(unique, "EAGAIN")


def test_setlkw_asks_again_with_growing_pauses_until_the_lock_is_free() -> None:
    script = Script(host_locks=True)
    unique = script.request(Opcode.SETLKW, lock_body(1))
    pauses, uniques = [], set()
    for _ in range(7):
        asked = script.take()
        call: Any = asked.call
        uniques.add(call.unique)
        asked.fail(11)
        pauses.append(script.timers.fire())
    assert pauses == [0.005, 0.01, 0.02, 0.04, 0.08, 0.1, 0.1]
    script.take().answer()
    script.take().answer(Attributes(ATTRIBUTES))
    assert script.answers == replied(unique)
    assert len(uniques) == 7  # each a question of its own
    assert script.volume.locking == {}


def test_who_waits_for_a_lock_can_be_interrupted_in_a_pause() -> None:
    script = Script(host_locks=True)
    unique = script.request(Opcode.SETLKW, lock_body(1))
    script.take().fail(11)
    script.request(Opcode.INTERRUPT, pack("Q", unique))
    assert script.answers == failed(unique, "EINTR")
    script.timers.fire()
    assert script.answers == []


def test_who_waits_for_a_lock_can_be_interrupted_in_an_attempt() -> None:
    script = Script(host_locks=True)
    unique = script.request(Opcode.SETLKW, lock_body(1))
    script.request(Opcode.INTERRUPT, pack("Q", unique))
    assert script.answers == []
    script.take().fail(11)
    assert script.answers == failed(unique, "EINTR")


def test_a_lock_that_was_got_all_the_same_is_kept() -> None:
    script = Script(host_locks=True)
    unique = script.request(Opcode.SETLKW, lock_body(1))
    script.request(Opcode.INTERRUPT, pack("Q", unique))
    script.take().answer()
    script.take().answer(Attributes(ATTRIBUTES))
    assert script.answers == replied(unique)
