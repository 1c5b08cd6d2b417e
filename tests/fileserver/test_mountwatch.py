"""Mounts and sleep: what is read of them, and what is told."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from fileserver import mountwatch
from fileserver.mountwatch import Mount, MountWatch, concerns, parse
from protocol.lane import Lane
from tests.descriptors import open_descriptors

MOUNTINFO = rb"""22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
23 22 0:21 / /proc rw,nosuid - proc proc rw
64 22 0:44 /sub/dir /home/me/with\040blank\134 rw shared:7 master:3 - btrfs /dev/sda2 rw,subvol=/home
"""


def test_lines_of_mountinfo() -> None:
    assert parse(MOUNTINFO) == [
        Mount(22, b"254:0", b"/", b"/"),
        Mount(23, b"0:21", b"/", b"/proc"),
        Mount(64, b"0:44", b"/sub/dir", b"/home/me/with blank\\"),
    ]
    assert parse(b"") == []
    assert parse(b"what is this\n\nx y z a b\n1 2 3:4 / /bad\\9 rw\n" + MOUNTINFO) == parse(MOUNTINFO)


def test_what_this_process_sees() -> None:
    points = [mount.point for mount in parse(mountwatch.MOUNTINFO.read_bytes())]
    assert len(points) == len(mountwatch.MOUNTINFO.read_bytes().splitlines())
    assert all(os.path.lexists(point) for point in points if point.startswith(b"/proc"))


def test_which_folders_a_mount_concerns() -> None:
    assert concerns([b"/mnt", b"/home/me/src/out"], b"/home/me/src")
    assert concerns([b"/home/me/src"], b"/home/me/src")
    assert concerns([b"/home/me/src"], b"/")
    assert not concerns([b"/home/me/src2", b"/home", b"/"], b"/home/me/src")
    assert not concerns([], b"/")


class Heard:
    """What a watch has told."""

    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        self.mounts: list[frozenset[bytes]] = []
        self.sleeps: list[float] = []
        self.watch = MountWatch(lane, self.mounts.append, self.sleeps.append)


@pytest.fixture
def lane() -> Iterator[Lane]:
    lane = Lane()
    yield lane
    lane.close()


# In a mount namespace of its own. A turn of the lane waits for nothing, so the descriptor that it watches is waited for.
_MOUNTS = textwrap.dedent(
    """
    import os, select, subprocess, sys
    from fileserver.mountwatch import MountWatch
    from protocol.lane import Lane
    place = sys.argv[1].encode()
    lane, told = Lane(), []
    def sleeps(seconds): raise AssertionError(seconds)
    watch = MountWatch(lane, told.append, sleeps)
    point = os.path.join(place, b"point")
    os.mkdir(point)
    def run(*arguments):
        subprocess.run(arguments, check=True)
        heard = set()
        while point not in heard:
            assert select.select([lane._set.fileno()], [], [], 30)[0]
            lane.turn()
            heard |= frozenset().union(*told)
        told.clear()
        return heard
    assert not watch.is_below(place)
    assert run("mount", "-t", "tmpfs", "none", point) == {point}
    assert watch.is_below(place) and not watch.is_below(point)
    assert run("umount", point) == {point}
    assert not watch.is_below(place)
    watch.close()
    lane.close()
    print("as it should be")
    """
)


def _can_mount() -> bool:
    return os.geteuid() == 0 and subprocess.run(["unshare", "-m", "true"], check=False).returncode == 0


@pytest.mark.skipif(not _can_mount(), reason="nothing can be mounted")
def test_mounts_that_come_and_go(place: Path) -> None:
    done = subprocess.run(
        ["unshare", "-m", sys.executable, "-c", _MOUNTS, place.resolve()],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("as it should be\n", "")


def test_news_without_a_difference_may_be_of_any_mount(lane: Lane, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a mount that was there when it was looked, and one that was there in between only."""
    heard = Heard(lane)
    mounts = {
        state: frozenset(Mount(number, b"0:1", b"/", b"/%d" % number) for number in state)
        for state in [(1, 2), (1, 2, 3)]
    }
    states = iter([(1, 2, 3), (1, 2, 3), (1, 2)])
    monkeypatch.setattr(mountwatch, "_read", lambda descriptor: mounts[next(states)])
    heard.watch._mounts = mounts[1, 2]
    for expected in [{b"/3"}, {b"/1", b"/2", b"/3"}, {b"/3"}]:
        heard.watch._look()
        lane.turn()
        assert heard.mounts.pop() == expected
    lane.turn()
    assert heard.mounts == []
    heard.watch.close()


def test_sleep(lane: Lane, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is set, which wakes us; how long the machine has slept decides."""
    reading, writing = os.pipe2(os.O_NONBLOCK)
    monkeypatch.setattr(mountwatch, "_timer", lambda: reading)
    asleep = iter([100.0, 100.0 + mountwatch.ASLEEP / 2, 100.0, 107.5, 107.5])
    monkeypatch.setattr(mountwatch, "_asleep", lambda: next(asleep))
    heard = Heard(lane)
    for expected in [[], [], [7.5], []]:
        os.write(writing, b"x")
        lane.turn()
        assert heard.sleeps == expected
        heard.sleeps.clear()
    assert heard.mounts == []
    heard.watch.close()
    os.close(writing)


def test_a_machine_that_is_awake(lane: Lane) -> None:
    assert mountwatch._asleep() > -mountwatch.ASLEEP
    before = len(open_descriptors())
    heard = Heard(lane)
    lane.turn()
    assert (heard.mounts, heard.sleeps) == ([], [])
    with suppress(BlockingIOError):
        assert os.read(heard.watch._timer, 8) == b"", "it does not expire by itself"
    heard.watch.close()
    assert len(open_descriptors()) == before
