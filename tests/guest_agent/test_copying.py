"""The guest's end of a copy, as a process: its words, its exit status, and what is left when it is ended."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO

import pytest

from protocol.treecopy import Entry, Kind, encode, piece_head

REPOSITORY = Path(__file__).parents[2]


def copying(*words: str, **options: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-S", "-P", "-m", "guest_agent.copying", *words],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,  # type: ignore[call-overload]
    )


def test_what_one_sends_another_receives(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("text")
    sent = copying("send", str(tmp_path / "a")).communicate(timeout=20)[0]
    with copying("receive", "--single", str(tmp_path / "b")) as receiver:
        assert receiver.communicate(sent, timeout=20) == (b"", b"")
    assert receiver.returncode == 0
    assert (tmp_path / "b").read_text() == "text"


def test_it_asks_and_answers(tmp_path: Path) -> None:
    """Two processes, joined as the two sides of a copy are."""
    (tmp_path / "a").write_bytes(os.urandom(3_000_000))
    (tmp_path / "b").write_bytes((tmp_path / "a").read_bytes())
    times = (1, 7_000_000_000)
    for name in "ab":
        os.utime(tmp_path / name, ns=times)
    with (
        copying("offer", "--total", "--", str(tmp_path / "a")) as sender,
        copying("take", "--single", "--", str(tmp_path / "b")) as receiver,
    ):
        assert sender.stdout is not None
        assert receiver.stdin is not None
        assert receiver.stdout is not None
        assert sender.stdin is not None
        answers = threading.Thread(target=carry, args=(receiver.stdout, sender.stdin))
        answers.start()
        sent = carry(sender.stdout, receiver.stdin)
        answers.join(20)
        assert (sender.wait(20), receiver.wait(20)) == (0, 0)
    assert sent < 10_000, "it is there already"


def carry(source: IO[bytes], target: IO[bytes]) -> int:
    """All of it; returns how much that was."""
    count = 0
    while data := source.read1(65536):  # type: ignore[attr-defined]
        count += len(data)
        with contextlib.suppress(BrokenPipeError):  # who has all may have ended
            target.write(data)
            target.flush()
    with contextlib.suppress(BrokenPipeError):
        target.close()
    return count


def test_a_problem_is_a_line_and_the_exit_status(tmp_path: Path) -> None:
    sender = copying("send", f"{tmp_path}/no\nwhere", f"{tmp_path}/nor here")
    assert sender.communicate(timeout=20)[1].decode() == (
        f"{tmp_path}/no\\nwhere: No such file or directory\n{tmp_path}/nor here: No such file or directory\n"
    )
    assert sender.returncode == 1
    for words, text in (
        (("receive", "/nowhere"), b"/nowhere: No such file or directory\n"),
        (("receive", "/tmp"), b"the copy was cut off\n"),
        (("fly",), b"guest_agent.copying: unknown words ['fly']\n"),
    ):
        process = copying(*words)
        assert process.communicate(b"", timeout=20)[1] == text
        assert process.returncode == 1


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_who_is_hung_up_on_leaves_nothing(tmp_path: Path, number: int) -> None:
    with copying("receive", str(tmp_path)) as receiver:
        assert receiver.stdin is not None
        receiver.stdin.write(encode(Entry(Kind.FILE, b"half", 0o644)) + piece_head(5) + b"begun")
        receiver.stdin.flush()
        deadline = time.monotonic() + 20
        while not any(path.stat().st_size for path in tmp_path.iterdir()) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert [path.name[:9] for path in tmp_path.iterdir()] == [".agentctl"]
        receiver.send_signal(number)
        assert receiver.wait(20) == 128 + number
    assert list(tmp_path.iterdir()) == []
