from __future__ import annotations

import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from guest_agent.remote.rundir import Process, RunDir, RunDirError, start_ticks, write_holder


@pytest.fixture
def rundir(tmp_path: Path) -> RunDir:
    rundir = RunDir.of("a-session", tmp_path)
    rundir.make()
    return rundir


def test_it_is_nobody_elses(rundir: RunDir) -> None:
    assert rundir.path.stat().st_mode & 0o777 == 0o700
    rundir.path.chmod(0o755)
    rundir.make()
    assert rundir.path.stat().st_mode & 0o777 == 0o700


def test_what_is_not_a_folder_is_not_used(tmp_path: Path) -> None:
    rundir = RunDir.of("a-session", tmp_path)
    rundir.path.parent.mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    rundir.path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunDirError, match="is not a folder of this user"):
        rundir.make()


def test_it_is_made_while_others_remove_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rundir = RunDir.of("a-session", tmp_path)
    look, removals = Path.lstat, iter(range(3))

    def lstat(path: Path) -> os.stat_result:
        if next(removals, None) is not None:
            rundir.remove()
        return look(path)

    monkeypatch.setattr(Path, "lstat", lstat)
    rundir.make()
    assert next(removals, None) is None
    assert rundir.path.is_dir()


def test_one_has_the_lock_and_stands_in_it(rundir: RunDir) -> None:
    place = rundir.plane("control")
    assert place.holder() is None
    lock = place.take_lock()
    assert lock is not None
    assert place.take_lock() is None
    write_holder(lock)
    assert place.holder() == Process(os.getpid(), start_ticks(os.getpid()) or 0)
    os.close(lock)
    again = place.take_lock()
    assert again is not None
    assert place.holder() is None
    os.close(again)


def test_a_lock_whose_name_is_gone_is_none(rundir: RunDir) -> None:
    place = rundir.plane("control")
    lock = place.take_lock()
    assert lock is not None
    rundir.remove()
    assert not rundir.path.exists()
    rundir.make()
    other = place.take_lock()
    assert other is not None
    for descriptor in (lock, other):
        os.close(descriptor)


def test_a_socket_is_reached_by_however_long_a_path(tmp_path: Path) -> None:
    rundir = RunDir.of("a" * 40, tmp_path / ("b" * 100))
    rundir.make()
    place = rundir.plane("files")
    for _ in range(2):  # one that was left is replaced
        with place.listen(), socket.socket(socket.AF_UNIX) as client, place.address() as address:
            client.connect(address)


def test_a_pid_of_somebody_else_is_not_signalled() -> None:
    with subprocess.Popen(["sleep", "60"]) as child:
        started = start_ticks(child.pid)
        assert started is not None
        assert not Process(child.pid, started + 1).signal(signal.SIGKILL)
        assert Process(child.pid, started).signal(signal.SIGKILL)
    assert not Process(child.pid, started).signal(signal.SIGKILL)
    assert start_ticks(child.pid) is None


@pytest.mark.parametrize("content", ["", "12", "a b", "\udcff"])
def test_a_lock_in_which_nothing_sensible_stands(rundir: RunDir, content: str) -> None:
    place = rundir.plane("control")
    place.lock.write_bytes(os.fsencode(content))
    assert place.holder() is None
