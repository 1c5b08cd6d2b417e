from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from host_agent import state
from host_agent.state import InstanceState

REPOSITORY = Path(__file__).parents[2]

HOLDER = """
import sys, time
from pathlib import Path
from host_agent import state
assert state.try_lock(Path(sys.argv[1])) is not None
print("held", flush=True)
time.sleep(60)
"""


@contextmanager
def holder(path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_lock_dies_with_the_process_that_holds_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with holder(path) as process:
        assert state.is_locked(path)
        assert state.try_lock(path) is None
        process.kill()
        process.wait()
        assert not state.is_locked(path)
        descriptor = state.try_lock(path)
        assert descriptor is not None
        os.close(descriptor)


def test_a_file_is_not_a_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert not state.is_locked(path)
    assert not path.exists()
    path.write_text("12345")
    assert not state.is_locked(path)


def test_the_lock_is_held_as_long_as_any_of_its_descriptors_is(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    first = state.try_lock(path)
    assert first is not None
    second = os.dup(first)
    os.close(first)
    assert state.is_locked(path)
    os.close(second)
    assert not state.is_locked(path)


def test_a_lock_does_not_leak_into_programs_that_are_started(tmp_path: Path) -> None:
    with state.locked(tmp_path / "lock"):
        sleeper = subprocess.Popen(["sleep", "60"], close_fds=False)
    try:
        assert not state.is_locked(tmp_path / "lock")
    finally:
        sleeper.kill()
        sleeper.wait()


def test_locked_says_whether_it_is_ours(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with state.locked(path) as first:
        assert first
        with state.locked(path) as second:
            assert not second
        # The one that did not get it did not let go of it either.
        assert state.is_locked(path)
    assert not state.is_locked(path)


def test_any_number_may_ask_at_once(tmp_path: Path) -> None:
    """Nobody who only asks is taken for the holder, neither by others who ask nor by who wants the lock."""
    path = tmp_path / "lock"
    path.touch()
    over = threading.Event()
    wrong: list[str] = []

    def ask() -> None:
        while not over.is_set():
            if state.is_locked(path) and not mine.is_set():
                wrong.append("somebody who asked was taken for the holder")
            time.sleep(0.001)  # far more often than any number of commands would

    mine = threading.Event()
    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    over.wait(0.3)
    mine.set()
    for _ in range(20):
        descriptor = state.try_lock(path)
        if descriptor is None:
            wrong.append("the lock could not be had")
        else:
            os.close(descriptor)
    over.set()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_lock_of_a_removed_file_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between open and flock the file is removed by the command that held it, as `delete` does."""
    path = tmp_path / "lock"
    opened = os.open
    opens: list[int] = []

    def open_and_lose(name: Path, flags: int, mode: int = 0o777) -> int:
        descriptor = opened(name, flags, mode)
        opens.append(descriptor)
        if len(opens) == 1:
            path.unlink()
        return descriptor

    monkeypatch.setattr(os, "open", open_and_lose)
    descriptor = state.try_lock(path)
    assert descriptor is not None
    assert len(opens) == 2
    assert state.is_locked(path)
    os.close(descriptor)


def test_a_state_is_what_was_saved(tmp_path: Path) -> None:
    saved = InstanceState(wanted=True, started_at=1.5, failure="", failure_code=7, previous_context="colima")
    state.save(tmp_path / "state.json", saved)
    assert state.load(tmp_path / "state.json") == saved


@pytest.mark.parametrize(
    "content",
    [None, b"", b"{", b"[1]", b'{"unknown": 1}', b'{"failure_code": "no"}', b'{"wanted": 1}', b"\0" * 64],
)
def test_a_missing_or_damaged_state_is_an_instance_that_never_ran(
    tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "state.json"
    if content is not None:
        path.write_bytes(content)
    assert state.load(path) == InstanceState()
