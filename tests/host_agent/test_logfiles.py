from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from host_agent import logfiles
from host_agent.errors import ExitCode, UserError
from tests.host_agent.test_plain_text import HARMLESS, HOSTILE

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "agent.log"
    path.write_bytes(b"".join(b"line %d\n" % number for number in range(1000)))
    return path


@pytest.mark.parametrize(
    ("lines", "shown"), [(2, b"line 998\nline 999\n"), (0, b""), (1, b"line 999\n"), (5000, None)]
)
def test_the_last_lines(
    log: Path, capfdbinary: pytest.CaptureFixture[bytes], lines: int, shown: bytes | None
) -> None:
    logfiles.show(log, lines, follow=False)
    assert capfdbinary.readouterr().out == (log.read_bytes() if shown is None else shown)


def test_a_log_that_is_not_there_yet(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no console\.log yet") as caught:
        logfiles.show(tmp_path / "console.log", 5, follow=False)
    assert caught.value.exit_code is ExitCode.NOT_RUNNING


FOLLOW = """
import sys
from pathlib import Path
from host_agent import logfiles
logfiles.POLL_INTERVAL = 0.01
logfiles.show(Path(sys.argv[1]), int(sys.argv[2]), follow=True)
"""


@contextmanager
def following(path: Path, lines: int) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [sys.executable, "-c", FOLLOW, str(path), str(lines)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        bufsize=0,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_following_goes_on_through_growth_a_new_file_and_truncation(log: Path, tmp_path: Path) -> None:
    with following(log, 1) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"line 999\n"
        with log.open("ab") as file:
            file.write(b"more\n")
        assert process.stdout.readline() == b"more\n"
        # The next boot begins a log of its own.
        successor = tmp_path / "next"
        successor.write_bytes(b"second boot\n")
        with log.open("ab") as file:
            file.write(b"last words\n")
            os.replace(successor, log)
        assert process.stdout.readline() == b"last words\n"
        assert process.stdout.readline() == b"second boot\n"
        log.write_bytes(b"cut\n")
        assert process.stdout.readline() == b"cut\n"
        # Removed, and there again.
        log.unlink()
        log.write_bytes(b"back\n")
        assert process.stdout.readline() == b"back\n"


def test_nothing_that_is_written_while_the_end_is_shown_is_left_out(
    log: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    class Done(Exception):
        pass

    flush = sys.stdout.buffer.flush
    late = [b"late\n"]

    def flush_and_write() -> None:
        flush()
        if late:
            with log.open("ab") as file:
                file.write(late.pop())

    def stop(seconds: float) -> None:
        raise Done

    class Output:
        class buffer:
            write = sys.stdout.buffer.write
            flush = staticmethod(flush_and_write)

        isatty = sys.stdout.isatty

    monkeypatch.setattr(sys, "stdout", Output)
    monkeypatch.setattr("time.sleep", stop)
    with pytest.raises(Done):
        logfiles.show(log, 1, follow=True)
    monkeypatch.undo()
    assert capfdbinary.readouterr().out == b"line 999\nlate\n"


# --- words of the guest ------------------------------------------------------------------------------


def test_a_pipe_gets_every_byte(log: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    log.write_bytes(HOSTILE)
    logfiles.show(log, 10, follow=False)
    assert capfdbinary.readouterr().out == HOSTILE


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [("utf-8", HARMLESS.encode()), ("latin-1", HARMLESS.encode("latin-1"))],
    ids=["utf-8", "latin-1"],
)
def test_a_terminal_gets_text_also_of_what_follows(log: Path, encoding: str, expected: bytes) -> None:
    log.write_bytes(HOSTILE)
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", FOLLOW, str(log), "10"],
        cwd=REPOSITORY,
        stdout=theirs,
        env={**os.environ, "PYTHONIOENCODING": encoding},
    )
    os.close(theirs)
    try:
        assert _read(ours, len(expected)) == expected
        with log.open("ab") as file:
            file.write(HOSTILE)
        assert _read(ours, len(expected)) == expected
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def _read(terminal: int, count: int) -> bytes:
    """``count`` bytes as a program wrote them: the terminal's line discipline adds the carriage returns."""
    output, end = b"", time.monotonic() + 30
    while len(output) < count and select.select([terminal], [], [], max(0, end - time.monotonic()))[0]:
        output += os.read(terminal, 65536).replace(b"\r\n", b"\n")
    return output
