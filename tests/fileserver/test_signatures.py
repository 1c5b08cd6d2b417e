from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fileserver import linux, signatures
from fileserver.linux import Status
from fileserver.nodes import Node
from fileserver.signatures import COARSE_NS, NEVER_NS, UNSETTLED_NS
from protocol.files import (
    ROOT,
    SET_MODE,
    SET_SIZE,
    Allocate,
    Create,
    GetAttributes,
    Lookup,
    Read,
    Rename,
    SetAttributes,
    Write,
)
from tests.fileserver.served import Served, serving
from tests.fileserver.watched import Watched

LONG_AGO = 10**9


@pytest.fixture
def share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """A second later than it is: every time stamp has settled."""
    now = time.time_ns
    monkeypatch.setattr(signatures.time, "time_ns", lambda: now() + 10**9)
    (tmp_path / "f").write_bytes(b"0123456789")
    with serving(tmp_path) as share:
        yield share


@pytest.fixture
def file(share: Served) -> int:
    return share.node("f")


def stale(share: Served, node: int) -> bool:
    """As both questions answer it: the second time is always no."""
    said: bool = share.ask(GetAttributes, node).stale
    assert not share.ask(GetAttributes, node).stale
    assert not share.ask(Lookup, ROOT, b"f").stale
    return said


def host_writes(share: Served, content: bytes = b"abcdefghij") -> None:
    time.sleep(0.01)  # a tick: the kernel's time stamps are no finer
    with open(share.path / "f", "r+b") as file:
        file.write(content)


def test_a_guest_that_has_nothing_need_not_drop_it(share: Served, file: int) -> None:
    host_writes(share)
    assert not stale(share, file)


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Served]:
    """Whose watches hear of every change, which has just happened as far as time stamps go."""
    (tmp_path / "f").write_bytes(b"0123456789")
    with serving(tmp_path, watches=Watched()) as share:
        yield share


def own_write(share: Served, file: int) -> None:
    share.ask(Write, file, 0, payload=b"x")


def own_mode(share: Served, file: int) -> None:
    share.bytes(Read, file, 0, 5)
    share.ask(SetAttributes, file, SET_MODE, 0o600)


def own_names(share: Served, file: int) -> None:
    share.bytes(Read, file, 0, 5)
    share.ask(Rename, ROOT, b"f", ROOT, b"g")
    share.ask(Rename, ROOT, b"g", ROOT, b"f")


def fresh_read(share: Served, file: int) -> None:
    own_write(share, file)
    share.bytes(Read, file, 0, 5)


OWN = [own_write, own_mode, own_names, fresh_read]


@pytest.mark.parametrize("change", OWN)
def test_what_the_guest_itself_did_to_a_watched_file_is_no_other_data(
    watched: Served, change: Callable[[Served, int], None]
) -> None:
    file = watched.node("f")
    watched.ask(GetAttributes, file)
    change(watched, file)
    assert not stale(watched, file)
    change(watched, file)
    assert not stale(watched, file)


@pytest.mark.parametrize("change", OWN)
def test_what_programs_did_to_a_watched_file_is(
    watched: Served, change: Callable[[Served, int], None]
) -> None:
    """As soon as it shows, which may be before they are heard of."""
    file = watched.node("f")
    watched.ask(GetAttributes, file)
    change(watched, file)
    host_writes(watched)
    assert stale(watched, file)


@pytest.mark.parametrize("change", [own_write, fresh_read])
def test_what_may_have_been_missed_is_doubted(watched: Served, change: Callable[[Served, int], None]) -> None:
    file = watched.node("f")
    watched.ask(GetAttributes, file)
    change(watched, file)
    watched.options["watches"].epoch += 1
    assert stale(watched, file)
    change(watched, file)
    watched.options["watches"].marked.clear()
    watched.options["watches"].full = True
    assert stale(watched, file)


def test_a_doubt_from_before_it_was_watched_stays(watched: Served) -> None:
    watches = watched.options["watches"]
    watches.full = True
    file = watched.node("f")
    own_write(watched, file)
    watches.full = False
    own_write(watched, file)
    assert stale(watched, file)


def test_a_change_on_the_host_is_reported_once(share: Served, file: int) -> None:
    share.bytes(Read, file, 0, 5)
    assert not stale(share, file)
    host_writes(share)
    assert stale(share, file)
    assert not stale(share, file)


def test_a_change_is_reported_to_everybody_until_the_first_was_told(share: Served, file: int) -> None:
    """Answers worked out at the same time may overtake each other."""
    share.bytes(Read, file, 0, 5)
    host_writes(share)
    for _ in range(3):
        answer: Any = share.tree.perform(share.call(GetAttributes, file)).value
        assert answer.stale
    share.bytes(Read, file, 0, 5)  # of this the guest lets go as well
    share.tree.alarm_told(file)
    assert not stale(share, file)


def test_a_change_is_reported_by_a_lookup_by_any_name(share: Served, file: int) -> None:
    share.bytes(Read, file, 0, 5)
    os.link(share.path / "f", share.path / "g")
    share.ask(Lookup, ROOT, b"g")
    share.bytes(Read, file, 0, 5)
    host_writes(share)
    assert share.ask(Lookup, ROOT, b"g").stale


def test_a_read_after_the_change_does_not_hide_it(share: Served, file: int) -> None:
    """The guest may still have other pages of before."""
    share.bytes(Read, file, 0, 5)
    host_writes(share)
    share.bytes(Read, file, 5, 5)
    assert stale(share, file)


def test_content_of_the_same_size_with_its_old_time(share: Served, file: int) -> None:
    os.utime(share.path / "f", ns=(LONG_AGO, LONG_AGO))
    share.bytes(Read, file, 0, 5)
    host_writes(share)
    os.utime(share.path / "f", ns=(LONG_AGO, LONG_AGO))
    assert stale(share, file)


def test_a_larger_size_makes_the_guest_s_kernel_drop_by_itself(share: Served, file: int) -> None:
    """It would not take the size from an answer that a drop came before. The next question makes sure."""
    share.bytes(Read, file, 0, 5)
    for size in (30, 40):
        os.truncate(share.path / "f", size)
        assert not share.ask(GetAttributes, file).stale
    assert stale(share, file)


def test_of_a_file_that_became_shorter_data_is_dropped(share: Served, file: int) -> None:
    """A readahead that met the new end may have told the guest's kernel, which then drops nothing."""
    share.bytes(Read, file, 0, 5)
    os.truncate(share.path / "f", 3)
    assert stale(share, file)


@pytest.mark.parametrize("append", [False, True])
def test_a_change_before_a_write_is_reported_after_it(share: Served, file: int, append: bool) -> None:
    share.bytes(Read, file, 0, 5)
    host_writes(share)
    share.ask(Write, file, 10 if append else 2, append, payload=b"x")
    assert stale(share, file)


def test_the_guest_s_kernel_counts_what_it_writes(share: Served, file: int) -> None:
    """And it knows nothing of what a program on the host has appended before."""
    share.bytes(Read, file, 0, 5)
    os.truncate(share.path / "f", 100)
    share.ask(Write, file, 10, payload=b"12345")  # up to 15, it believes
    assert not share.ask(GetAttributes, file).stale, "100 is news"
    assert stale(share, file)
    share.ask(Allocate, file, 0, 0, 200)
    assert stale(share, file), "200 is not"


def test_a_stream_of_writes_causes_one_alarm_afterwards(share: Served, file: int) -> None:
    share.bytes(Read, file, 0, 5)
    for offset in range(20):
        share.ask(Write, file, offset, payload=b"x")
    assert stale(share, file)
    assert not stale(share, file)


def test_between_writes_of_the_guest(share: Served, file: int) -> None:
    share.ask(Write, file, 0, payload=b"x")
    host_writes(share)
    share.ask(Write, file, 1, payload=b"x")
    assert stale(share, file)


def test_a_change_before_that_of_attributes_is_reported_after_it(share: Served, file: int) -> None:
    share.bytes(Read, file, 0, 5)
    host_writes(share)
    assert not share.ask(SetAttributes, file, SET_MODE, mode=0o600).stale
    assert stale(share, file)
    share.bytes(Read, file, 0, 5)
    host_writes(share)
    assert not share.ask(SetAttributes, file, SET_SIZE, size=5).stale
    assert stale(share, file)


def test_a_created_file_is_the_guest_s_own(share: Served) -> None:
    assert not share.ask(Create, ROOT, b"new", 0o644, os.O_RDWR).stale


def test_a_lost_reply_makes_everything_suspect(share: Served, file: int) -> None:
    share.bytes(Read, file, 0, 5)
    share.tree.suspect_all()
    assert stale(share, file)
    assert not share.ask(GetAttributes, ROOT).stale


def test_what_an_earlier_process_gave_is_suspect(share: Served, file: int) -> None:
    share.bytes(Read, file, 0, 5)
    share.restart()
    assert stale(share, file)


# --- the clock ------------------------------------------------------------------------------------------


def status(mtime_ns: int, ctime_ns: int = LONG_AGO) -> Status:
    found = linux.fstatx(0)
    (mtime, mtime_nsec), (ctime, ctime_nsec) = divmod(mtime_ns, 10**9), divmod(ctime_ns, 10**9)
    return found._replace(
        mode=0o100644, mtime=mtime, mtime_nsec=mtime_nsec, ctime=ctime, ctime_nsec=ctime_nsec, size=1
    )


@pytest.mark.parametrize(
    ("mtime_ns", "ctime_ns", "unsettled"),
    [
        (5 * 10**9, 5 * 10**9, True),
        (5 * 10**9 - 19_000_000, LONG_AGO, True),
        (5 * 10**9 + 19_000_000, LONG_AGO, True),
        (LONG_AGO, 5 * 10**9 - 19_000_000, True),
        (5 * 10**9 - 21_000_000, 5 * 10**9 - 21_000_000, False),
        (50 * 10**9, LONG_AGO, False),
    ],
)
def test_time_stamps_of_just_now_may_hide_another_change(
    mtime_ns: int, ctime_ns: int, unsettled: bool
) -> None:
    assert signatures.is_unsettled(status(mtime_ns, ctime_ns), 5 * 10**9, UNSETTLED_NS) == unsettled


@pytest.mark.parametrize(
    ("mtime_ns", "ctime_ns", "unsettled"),
    [
        (3 * 10**9, LONG_AGO, True),
        (3 * 10**9, 3 * 10**9, True),
        (3 * 10**9 + 1, LONG_AGO, False),
        (LONG_AGO, 3 * 10**9 + 1, False),
        (2 * 10**9, LONG_AGO, False),
    ],
)
def test_whole_seconds_may_be_of_a_filesystem_that_has_no_more(
    mtime_ns: int, ctime_ns: int, unsettled: bool
) -> None:
    assert signatures.is_unsettled(status(mtime_ns, ctime_ns), 5 * 10**9, UNSETTLED_NS) == unsettled


def test_how_long_time_stamps_may_stay_the_same_is_the_filesystem_s() -> None:
    settled = status(3 * 10**9 - 1, 3 * 10**9 - 1)
    assert not signatures.is_unsettled(settled, 5 * 10**9, UNSETTLED_NS)
    assert signatures.is_unsettled(settled, 5 * 10**9, COARSE_NS)
    assert not signatures.is_unsettled(settled, 6 * 10**9, COARSE_NS)
    for seconds in (5, 10**9, 1 << 40):
        assert signatures.is_unsettled(settled, seconds * 10**9, NEVER_NS)


def test_data_given_just_after_a_change_is_doubted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    node, now = Node(2, (1, 1, 1), 0o100000, False), 5 * 10**9
    monkeypatch.setattr(signatures.time, "time_ns", lambda: now)
    signatures.giving(node, status(now), UNSETTLED_NS)
    assert signatures.is_stale(node, status(now))
    signatures.acknowledged(node)
    assert not signatures.is_stale(node, status(now))
    now += 10**9
    signatures.giving(node, status(now - 10**9 + 1), UNSETTLED_NS)
    assert not signatures.is_stale(node, status(now - 10**9 + 1))


# --- filesystems whose time stamps are coarse -----------------------------------------------------------


@pytest.mark.parametrize("filesystem", [0x6969, 0x65735546, 0x4D44], ids=["nfs", "fuse", "fat"])
def test_data_of_a_filesystem_that_is_not_believed_is_doubted_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, filesystem: int
) -> None:
    monkeypatch.setattr(linux, "filesystem_type", lambda descriptor: filesystem)
    frozen: list[tuple[int, ...]] = []
    sign = signatures.sign
    monkeypatch.setattr(signatures, "sign", lambda status: frozen[0] if frozen else sign(status))
    (tmp_path / "f").write_bytes(b"0123456789")
    os.utime(tmp_path / "f", ns=(LONG_AGO + 1, LONG_AGO + 1))
    now = time.time_ns
    monkeypatch.setattr(signatures.time, "time_ns", lambda: now() + 3600 * 10**9)
    with serving(tmp_path) as share:
        file = share.node("f")
        frozen.append(sign(linux.fstatx(0)))
        for _ in range(3):
            share.bytes(Read, file, 0, 5)
            assert stale(share, file)


@contextmanager
def seconds_only(image: Path, mounted: Path) -> Iterator[None]:
    """ext4 with inodes of 128 bytes."""
    if os.geteuid() != 0 or shutil.which("mkfs.ext4") is None:
        pytest.skip("needs to mount")
    with image.open("wb") as file:
        file.truncate(4 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-I", "128", image], check=True, capture_output=True)
    mounted.mkdir()
    if subprocess.run(["mount", "-o", "loop", image, mounted], capture_output=True).returncode:
        pytest.skip("no loop devices in this sandbox")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", mounted], check=True)


def test_two_edits_within_a_second_of_a_disk_that_has_no_more(tmp_path: Path) -> None:
    """The real thing, in real time: an edit, a read 0.1 s later, another edit in the same second."""
    with seconds_only(tmp_path / "image", tmp_path / "disk"):
        path = tmp_path / "disk" / "f"
        path.write_bytes(b"0123456789")
        with serving(tmp_path / "disk") as share:
            file = share.node("f")
            stamps = set()
            while len(stamps) != 1:  # the second may end in between
                with path.open("r+b") as host:
                    host.write(b"abcdefghij")
                stamps = {(s := path.stat()).st_mtime_ns, s.st_ctime_ns}
                time.sleep(0.1)
                assert share.bytes(Read, file, 0, 5) in (b"abcde", b"ABCDE")
                with path.open("r+b") as host:
                    host.write(b"ABCDEFGHIJ")
                stamps |= {(s := path.stat()).st_mtime_ns, s.st_ctime_ns}
                assert share.ask(GetAttributes, file).stale
            assert share.bytes(Read, file, 0, 5) == b"ABCDE"
