from __future__ import annotations

import fcntl
import math
import os
import signal
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from queue import SimpleQueue

import pytest

from fileserver import datafiles
from fileserver.datafiles import AFTER_READ, AFTER_WRITE, MAX_OPEN, OpenFile
from fileserver.workers import THREADS, Workers
from protocol.files import (
    ROOT,
    SET_MODE,
    SET_SIZE,
    Allocate,
    Create,
    Read,
    SetAttributes,
    Sync,
    Unlink,
    Write,
)
from tests.fileserver.served import Served, ordinary_user, refused, serving


@pytest.fixture
def share(tmp_path: Path) -> Iterator[Served]:
    with serving(tmp_path) as share:
        yield share


def open_modes(path: Path) -> list[int]:
    """The access modes with which this process has the file open."""
    modes = []
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{descriptor}")
        except FileNotFoundError:
            continue
        if target.removesuffix(" (deleted)") != str(path):
            continue
        lines = Path(f"/proc/self/fdinfo/{descriptor}").read_text().splitlines()
        flags = int(next(line.split()[1] for line in lines if line.startswith("flags:")), 8)
        if not flags & os.O_PATH:
            modes.append(flags & os.O_ACCMODE)
    return sorted(modes)


def test_nothing_is_closed_twice(share: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads opened the file, and the second descriptor goes with its call; just then a third one looks for
    what is idle. Closed twice, the number might be that of another file by then."""
    (share.path / "f").touch()
    files, reach = share.tree._core.files, share.tree._core.reach
    with reach.use(share.node("f")) as node:
        first, second = (files._install(node, files._open_data(node, os.O_RDONLY), os.O_RDONLY) for _ in "ab")
        closed: list[int] = []
        monkeypatch.setattr(datafiles.os, "close", closed.append)
        close, meanwhile = files._close, iter([True])

        def interrupted(idle: list[OpenFile]) -> None:
            if next(meanwhile, False):
                files.close_idle(math.inf)
            close(idle)

        monkeypatch.setattr(files, "_close", interrupted)
        files.release(second)
        files.release(first)
        files.close_idle(math.inf)
        monkeypatch.undo()
        assert sorted(closed) == sorted([first.descriptor, second.descriptor])
        for descriptor in closed:
            os.close(descriptor)


def test_a_writer_goes_soon_after_the_last_write(share: Served) -> None:
    node = share.ask(Create, ROOT, b"f", 0o644, os.O_RDWR).node
    now = time.monotonic()
    due = share.tree.close_idle(now)
    assert now < due <= time.monotonic() + AFTER_WRITE
    assert open_modes(share.path / "f") == [os.O_RDWR]
    share.tree.close_idle(time.monotonic() + AFTER_WRITE)
    assert open_modes(share.path / "f") == []
    share.ask(Write, node, 0, payload=b"x")
    assert open_modes(share.path / "f") == [os.O_RDWR]


def test_reading_does_not_keep_a_writer(share: Served) -> None:
    node = share.ask(Create, ROOT, b"f", 0o644, os.O_RDWR).node
    share.ask(Write, node, 0, payload=b"x")
    began = time.monotonic()
    assert share.bytes(Read, node, 0, 1) == b"x"
    share.tree.close_idle(began + AFTER_WRITE)
    assert open_modes(share.path / "f") == []


def test_one_that_is_used_is_not_closed_for_a_look(share: Served) -> None:
    files = share.tree._core.files
    created = share.ask(Create, ROOT, b"f", 0o644, os.O_RDWR).node
    with share.tree._core.reach.use(created) as node:
        used = files.writer(node)
        files.close_writer(node)
        assert open_modes(share.path / "f") == [os.O_RDWR]
        files.release(used)
        files.close_writer(node)
        assert open_modes(share.path / "f") == []
        files.close_writer(node)


def test_readers_go_later(share: Served) -> None:
    (share.path / "f").write_text("x")
    node = share.node("f")
    share.bytes(Read, node, 0, 1)
    share.tree.close_idle(time.monotonic() + AFTER_READ / 2)
    assert open_modes(share.path / "f") == [os.O_RDONLY]
    share.tree.close_idle(time.monotonic() + AFTER_READ)
    assert open_modes(share.path / "f") == []


def test_so_many_at_once(share: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datafiles, "MAX_OPEN", 5)
    for index in range(20):
        (share.path / str(index)).write_text(str(index))
        assert share.bytes(Read, share.node(str(index)), 0, 9) == b"%d" % index
    assert share.tree._core.files.descriptors == 5
    assert MAX_OPEN >= 64


def test_a_program_can_be_executed_soon_after_it_was_written(share: Served) -> None:
    node = share.ask(Create, ROOT, b"f", 0o755, os.O_RDWR).node
    share.ask(Write, node, 0, payload=b"#!/bin/sh\nexit 7\n")
    share.tree.close_idle(time.monotonic() + AFTER_WRITE)
    assert os.waitstatus_to_exitcode(os.system(str(share.path / "f"))) == 7


def test_a_running_program_is_not_written_to(share: Served) -> None:
    (share.path / "sleep").write_bytes(Path("/bin/sleep").read_bytes())
    (share.path / "sleep").chmod(0o755)
    pid = os.posix_spawn(str(share.path / "sleep"), ["sleep", "60"], {})
    try:
        assert share.refused(Write, share.node("sleep"), 0) == "ETXTBSY"
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)


# --- what the mode does not allow -----------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o444, 0o000, 0o200, 0o555])
def test_a_file_stays_open_to_the_guest_whatever_its_mode(mode: int) -> None:
    with ordinary_user() as place, serving(place) as share:
        node = share.ask(Create, ROOT, b"f", mode, os.O_RDWR).node
        share.ask(Write, node, 0, payload=b"one ")
        share.tree.close_idle(float("inf"))
        share.ask(Write, node, 4, payload=b"two")
        share.tree.close_idle(float("inf"))
        assert share.bytes(Read, node, 0, 10) == b"one two"
        share.tree.close_idle(float("inf"))
        share.ask(Sync, node)
        share.ask(SetAttributes, node, SET_SIZE, size=3)
        share.ask(Allocate, node, 0, 0, 10)
        assert stat.S_IMODE(os.stat(place / "f").st_mode) == mode


def test_and_after_chmod(share: Served) -> None:
    with ordinary_user() as place, serving(place) as share:
        (place / "f").write_text("data")
        node = share.node("f")
        share.ask(SetAttributes, node, SET_MODE, mode=0)
        assert share.bytes(Read, node, 0, 4) == b"data"
        share.ask(Unlink, ROOT, b"f")
        share.tree.close_idle(float("inf"))
        assert share.bytes(Read, node, 0, 4) == b"data"


def test_never_on_a_share_that_is_read_only() -> None:
    with ordinary_user() as place, serving(place, read_only=True) as share:
        (place / "f").write_text("secret")
        (place / "f").chmod(0)
        changed = os.stat(place / "f").st_ctime_ns
        assert share.refused(Read, share.node("f"), 0, 10) == "EACCES"
        assert os.stat(place / "f").st_ctime_ns == changed


@pytest.mark.skipif(os.geteuid() != 0, reason="needs somebody else's file")
def test_somebody_else_s_file_is_as_its_mode_says() -> None:
    with ordinary_user() as place, serving(place) as share:
        os.seteuid(0)
        (place / "f").write_text("root's")
        (place / "f").chmod(0o644)
        (place / "g").write_text("x")
        (place / "g").chmod(0o622)
        os.seteuid(65534)
        assert share.bytes(Read, share.node("f"), 0, 10) == b"root's"
        assert share.refused(Write, share.node("f"), 0) == "EACCES"
        assert share.refused(Read, share.node("g"), 0, 1) == "EACCES"
        assert share.ask(Write, share.node("g"), 0, payload=b"written").size == 7


# --- leases ---------------------------------------------------------------------------------------------

F_SETSIG = 10  # fcntl(2)
SOON = 10.0


@contextmanager
def leased(path: Path) -> Iterator[Callable[[], None]]:
    """A program of the host has a lease on the file, which ends as soon as it is told to: no sooner if somebody wants the
    file (it is told so by a signal that it ignores)."""
    with path.open("rb") as holder:
        fcntl.fcntl(holder, F_SETSIG, signal.SIGURG)
        fcntl.fcntl(holder, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        yield lambda: fcntl.fcntl(holder, fcntl.F_SETLEASE, fcntl.F_UNLCK) and None


def test_who_waits_for_a_lease_keeps_nobody(share: Served) -> None:
    """As many as there are threads, and all the others go on."""
    for index in range(THREADS):
        (share.path / f"leased{index}").write_text("x")
    (share.path / "other").write_text("other")
    workers, answers = Workers("leases"), SimpleQueue[bytes]()
    nodes = [share.node(f"leased{index}") for index in range(THREADS)]
    other = share.node("other")
    with ExitStack() as leases:
        give_up = [leases.enter_context(leased(share.path / f"leased{index}")) for index in range(THREADS)]
        for node in nodes:
            workers.submit(
                lambda node=node: answers.put(b"%d" % share.ask(Write, node, 0, payload=b"new").size)
            )
        for _ in range(20):
            workers.submit(lambda: answers.put(share.bytes(Read, other, 0, 9)))
            assert answers.get(timeout=SOON) == b"other"
        assert answers.empty(), "they wait"
        for end in give_up:
            end()
        assert [answers.get(timeout=SOON) for _ in nodes] == [b"3"] * THREADS
    workers.close(lambda: None)
    assert workers.wait_closed(SOON)


# --- for locks ------------------------------------------------------------------------------------------


def test_descriptors_for_locks_are_separate(share: Served) -> None:
    (share.path / "f").write_text("x")
    node = share.node("f")
    first, second = (share.tree.data_fd_for_locks(node, os.O_RDWR | os.O_TRUNC) for _ in range(2))
    assert first != second
    assert (share.path / "f").read_text() == "x"
    os.close(first)
    os.close(second)


def test_descriptors_for_locks_of_a_read_only_share(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("x")
    with serving(tmp_path, read_only=True) as share:
        node = share.node("f")
        assert refused(lambda: share.tree.data_fd_for_locks(node, os.O_RDWR)) == "EROFS"
        assert refused(lambda: share.tree.data_fd_for_locks(ROOT, os.O_RDONLY)) == "EISDIR"
        os.close(share.tree.data_fd_for_locks(node, os.O_RDONLY))
