from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from host_agent import agentlog

REPOSITORY = Path(__file__).parents[2]


def run(program: str, log: Path) -> subprocess.CompletedProcess[bytes]:
    """``program`` in a process whose stderr is ``log``, opened before, as the keeper does it."""
    with log.open("ab") as before:
        return subprocess.run(
            [sys.executable, "-c", f"import sys, pathlib, logging\n{program}", str(log)],
            cwd=REPOSITORY,
            stdout=before,
            stderr=before,
            timeout=60,
        )


BEGIN = """
from host_agent.agentlog import log_to
log_to(pathlib.Path(sys.argv[1]), 10_000)
say = logging.getLogger("test").info
"""


def test_a_record_is_a_line_with_its_time_and_origin(tmp_path: Path) -> None:
    log = tmp_path / "agent.log"
    run(BEGIN + "say('one'); logging.debug('too much'); say('gr\\xfc\\xdfe \\udcff')", log)
    first, second = log.read_text().splitlines()
    assert first[4] == "-"
    assert first.endswith(" test INFO one")
    assert second.endswith(" test INFO grüße \\udcff"), "words that are no text are no error"


@pytest.mark.parametrize("records", [1, 150], ids=["at the start", "after a rotation"])
def test_whatever_goes_to_stderr_or_stdout_is_in_the_log(tmp_path: Path, records: int) -> None:
    log = tmp_path / "agent.log"
    program = (
        f"for number in range({records}): say('x' * 80)\n"
        "import subprocess\n"
        "print('printed')\n"
        "subprocess.run(['sh', '-c', 'echo of a child; echo its error >&2'])\n"
        "raise ZeroDivisionError('the end')"
    )
    # Opened under another name first: what was stderr until now is not where the log is.
    log.touch()
    with (tmp_path / "elsewhere").open("ab") as elsewhere:
        done = subprocess.run(
            [sys.executable, "-c", f"import sys, pathlib, logging\n{BEGIN}{program}", str(log)],
            cwd=REPOSITORY,
            stdout=elsewhere,
            stderr=elsewhere,
            timeout=60,
        )
    assert done.returncode == 1
    text = log.read_text()
    for said in ("printed\n", "of a child\n", "its error\n", "Traceback", "ZeroDivisionError: the end\n"):
        assert said in text
    assert (tmp_path / "agent.log.1").exists() == (records > 1)
    assert (tmp_path / "elsewhere").read_bytes() == b""


def test_a_log_and_its_predecessor_are_all_there_is(tmp_path: Path) -> None:
    log = tmp_path / "agent.log"
    run(BEGIN + "for number in range(2000): say('%d %s', number, 'x' * 80)", log)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["agent.log", "agent.log.1"]
    kept = (tmp_path / "agent.log.1").read_text() + log.read_text()
    assert all(path.stat().st_size <= 10_000 for path in tmp_path.iterdir())
    numbers = [int(line.split()[4]) for line in kept.splitlines()]
    assert numbers == list(range(numbers[0], 2000)), "nothing is lost at a rotation"


def test_output_of_others_counts_towards_the_limit(tmp_path: Path) -> None:
    log = tmp_path / "agent.log"
    run(BEGIN + "sys.stderr.write('y' * 20_000); say('one'); say('two')", log)
    assert (tmp_path / "agent.log.1").stat().st_size == 20_000
    assert [line.split()[-1] for line in log.read_text().splitlines()] == ["one", "two"]


# --- files that others write -------------------------------------------------------------------------


class Looks:
    """``keep_bounded`` at work, quickly, and a way to wait for it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._count = 0
        self._cut = agentlog._cut
        monkeypatch.setattr(agentlog, "_cut", self._counted)

    def _counted(self, path: Path, limit: int) -> None:
        try:
            self._cut(path, limit)
        finally:
            self._count += 1

    @asynccontextmanager
    async def bounding(self, path: Path) -> AsyncIterator[None]:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(agentlog.keep_bounded, path, 1000, 0.001)
            yield
            nursery.cancel_scope.cancel()

    async def taken(self) -> None:
        """Return when the file has been looked at from beginning to end."""
        seen = self._count
        with trio.fail_after(30):
            while self._count < seen + 2:  # one may be under way
                await trio.sleep(0.001)


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Looks:
    return Looks(monkeypatch)


async def test_a_file_that_grows_is_begun_anew_and_its_end_is_kept(tmp_path: Path, looks: Looks) -> None:
    console = tmp_path / "console.log"
    async with looks.bounding(console):
        await looks.taken()  # it is not there yet
        with console.open("ab", buffering=0) as qemu:
            qemu.write(b"a" * 1000)
            await looks.taken()
            assert console.stat().st_size == 1000, "at the limit, not over it"
            qemu.write(b"b" * 500)
            await looks.taken()
            assert console.stat().st_size == 0
            assert (tmp_path / "console.log.1").read_bytes() == b"a" * 500 + b"b" * 500
            qemu.write(b"goes on at the start")
            await looks.taken()
            assert console.read_bytes() == b"goes on at the start"
            qemu.write(b"c" * 5000)
            await looks.taken()
    assert console.read_bytes() == b""
    assert (tmp_path / "console.log.1").read_bytes() == b"c" * 1000
    assert sorted(os.listdir(tmp_path)) == ["console.log", "console.log.1"]


async def test_a_full_disk_does_not_keep_the_file(
    tmp_path: Path,
    looks: Looks,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    console = tmp_path / "console.log"
    async with looks.bounding(console):
        with monkeypatch.context() as patch:
            patch.setattr(agentlog, "write_atomically", full)
            for _ in range(3):
                with console.open("ab") as qemu:
                    qemu.write(b"x" * 2000)
                await looks.taken()
                assert console.read_bytes() == b""
        assert [record.getMessage() for record in caplog.records] == [
            "cannot keep console.log small: [Errno 28] No space left on device"
        ]
        console.write_bytes(b"y" * 2000)
        await looks.taken()
    assert (tmp_path / "console.log.1").read_bytes() == b"y" * 1000


async def test_nothing_that_is_at_the_path_ends_it(
    tmp_path: Path, looks: Looks, caplog: pytest.LogCaptureFixture
) -> None:
    console = tmp_path / "console.log"
    console.mkdir()
    async with looks.bounding(console):
        await looks.taken()
        console.rmdir()
        console.write_bytes(b"x" * 2000)
        await looks.taken()
    assert console.read_bytes() == b""
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_a_log_that_a_new_boot_begins_meanwhile_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    console, predecessor = tmp_path / "console.log", tmp_path / "console.log.1"
    console.write_bytes(b"x" * 2000)
    write = agentlog.write_atomically

    def new_boot(path: Path, content: bytes) -> None:
        console.replace(predecessor)
        console.write_bytes(b"second boot")
        write(path, content)

    monkeypatch.setattr(agentlog, "write_atomically", new_boot)
    agentlog._cut(console, 1000)
    assert console.read_bytes() == b"second boot"
    assert predecessor.read_bytes() == b"x" * 1000
