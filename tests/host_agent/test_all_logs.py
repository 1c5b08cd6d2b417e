"""All logs together: files of this machine, and the journal of a VM that the test has made up."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import trio
import trio.testing

from host_agent import all_logs, state
from host_agent.all_logs import Shown
from host_agent.errors import ExitCode, UserError
from host_agent.log_lines import LogLine
from host_agent.paths import InstancePaths
from protocol import execio
from protocol.api import Exec, Target
from protocol.errors import ErrorCode, OpenRefused
from tests.host_agent.stand_in import STATUS, Agent, running

NOON = time.mktime((2026, 1, 31, 12, 0, 0, 0, 0, -1))


def host_line(second: int, text: str) -> str:
    return f"2026-01-31 12:00:{second:02},000 {text}\n"


def entry(second: float, text: str, unit: str = "docker.service") -> bytes:
    fields = {
        "__REALTIME_TIMESTAMP": str(int((NOON + second) * 1e6)),
        "__CURSOR": f"at-{second}",
        "_SYSTEMD_UNIT": unit,
        "MESSAGE": text,
    }
    return json.dumps(fields).encode() + b"\n"


@dataclass
class Journal:
    """A VM whose journalctl says ``entries``; what is asked of it is kept."""

    entries: list[bytes] = field(default_factory=list)
    asked: list[list[str]] = field(default_factory=list)
    refusal: OpenRefused | None = None
    hangs: bool = False
    more: trio.Event = field(default_factory=trio.Event)

    async def dial(self, target: Target) -> trio.abc.HalfCloseableStream:
        await trio.lowlevel.checkpoint()
        assert isinstance(target, Exec)
        self.asked.append(target.argv)
        if self.refusal is not None:
            raise self.refusal
        ours, theirs = trio.testing.memory_stream_pair()
        trio.lowlevel.spawn_system_task(self._say, ours, "--follow" in target.argv)
        return theirs

    async def _say(self, stream: trio.abc.HalfCloseableStream, follow: bool) -> None:
        try:
            if self.hangs:
                await trio.sleep_forever()
            while True:
                for said in self.entries:
                    await stream.send_all(execio.encode(execio.Stdout(said)))
                self.entries.clear()
                if not follow:
                    break
                await self.more.wait()
                self.more = trio.Event()
            await stream.send_all(execio.encode(execio.Exit(0)))
            await stream.send_eof()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return


@pytest.fixture
def logs(instance: InstancePaths) -> InstancePaths:
    """An instance that ran: a QEMU that began at 11:59:58, whose kernel took two seconds to say something."""
    instance.agent_log.write_text(
        host_line(0, "one") + host_line(3, "two") + "rest of it\n" + host_line(9, "three")
    )
    instance.console_log.write_bytes(b"BIOS\n[    2.500000] Linux\n[    6.000000] up\nno end")
    os.utime(instance.console_log, (NOON + 4.0, NOON + 4.0))
    return instance


class Reader:
    def __init__(self) -> None:
        self.lines: list[LogLine] = []
        self.notes: list[str] = []
        self.news = trio.Event()

    def write(self, lines: Iterable[LogLine]) -> None:
        self.lines += lines
        self.news.set()
        self.news = trio.Event()

    def said(self) -> list[str]:
        return [f"{line.component} {line.text}" for line in self.lines]

    async def until(self, condition: Callable[[list[str]], bool]) -> None:
        while not condition(self.said()):
            await self.news.wait()


async def shown(paths: InstancePaths, lines: int = 200) -> Reader:
    reader = Reader()
    with trio.fail_after(20):
        await all_logs.show(paths, Shown(lines, follow=False), reader.write, reader.notes.append)
    return reader


async def test_files_by_time(logs: InstancePaths) -> None:
    logs.qemu_log.write_text("a warning\n")
    os.utime(logs.qemu_log, (NOON + 5, NOON + 5))
    reader = await shown(logs)
    assert reader.said() == [
        "host one",
        "console Linux",  # the last that it said was when the file was written to
        "host two",
        "host rest of it",
        "console BIOS",  # nobody knows when
        "console up",
        "console no end",
        "qemu a warning",
        "host three",
    ]
    assert reader.notes == []
    assert reader.lines[1].time == NOON + 0.5


async def test_of_a_vm_that_runs_the_kernel_began_with_its_qemu(logs: InstancePaths) -> None:
    logs.qemu_identity.write_text("{}")
    os.utime(logs.qemu_identity, (NOON - 2, NOON - 2))
    reader = await shown(logs)
    assert [line.time - NOON for line in reader.lines if line.text in ("Linux", "up")] == [0.5, 4.0]


@pytest.mark.parametrize(
    ("lines", "said"), [(1, ["host three"]), (0, []), (2, ["console no end", "host three"])]
)
async def test_the_last_lines_of_all(logs: InstancePaths, lines: int, said: list[str]) -> None:
    assert (await shown(logs, lines)).said() == said


async def test_there_are_no_logs_yet(instance: InstancePaths) -> None:
    with pytest.raises(UserError, match="no logs yet") as caught:
        await shown(instance)
    assert caught.value.exit_code is ExitCode.NOT_RUNNING


async def test_with_the_journal_of_a_vm_that_runs(logs: InstancePaths) -> None:
    lock = state.try_lock(logs.lock)
    assert lock is not None
    journal = Journal([entry(1, "starts"), entry(4.5, "says", "agentctl-agent.service")])
    async with running(logs, Agent(dial=journal.dial)):
        reader = await shown(logs, 5)
    os.close(lock)
    assert reader.said()[-2:] == ["guest says", "host three"]
    assert [line for line in reader.said() if line.startswith(("guest", "docker"))] == ["guest says"]
    assert journal.asked[0][-1] == "--lines=5"
    assert "--output=json" in journal.asked[0]
    assert {"--unit=agentctl-*", "--unit=docker", "--unit=containerd"} <= set(journal.asked[0])
    assert reader.notes == []


@pytest.mark.parametrize("how", ["refuses", "hangs", "nobody", "boots"])
async def test_a_vm_that_does_not_answer_is_a_note(
    logs: InstancePaths, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(all_logs, "JOURNAL_TIME", 0.3)
    monkeypatch.setattr(all_logs, "RESTART_TIME", 0.1)
    lock = state.try_lock(logs.lock)
    assert lock is not None
    refusal = OpenRefused(ErrorCode.UNREACHABLE, "the guest is away") if how == "refuses" else None
    journal = Journal(refusal=refusal, hangs=how == "hangs")
    if how == "nobody":
        reader = await shown(logs)
    else:
        status = replace(STATUS, guest_connected=how != "boots")
        async with running(logs, Agent(dial=journal.dial, status=status)):
            reader = await shown(logs)
        assert bool(journal.asked) == (how != "boots")
    os.close(lock)
    (note,) = reader.notes
    assert note.startswith("what the VM wrote down is not here: ")
    assert reader.said()[-1] == "host three"


async def test_following_all(logs: InstancePaths, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Growth, a log that is there only now, a boot that begins a log anew, and a host agent that is killed."""
    monkeypatch.setattr(all_logs, "JOURNAL_AGAIN", 0.01)
    lock = state.try_lock(logs.lock)
    assert lock is not None
    reader, first, second = Reader(), Journal([entry(1, "starts")]), Journal()
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            async with running(logs, Agent(dial=first.dial)):
                nursery.start_soon(
                    all_logs.show, logs, Shown(2, follow=True), reader.write, reader.notes.append
                )
                await reader.until(lambda said: said == ["console up", "host three"])
                with logs.agent_log.open("a") as file:
                    file.write(host_line(12, "four"))
                logs.files_log.write_text(host_line(11, "from files"))
                first.entries.append(entry(11.5, "from docker"))
                first.more.set()
                await reader.until(
                    lambda said: {"docker from docker", "host four", "files from files"} <= set(said)
                )
            successor = tmp_path / "next"
            successor.write_bytes(b"second boot\n")
            os.replace(successor, logs.console_log)
            await reader.until(lambda said: "console second boot" in said)
            assert "console no end" in reader.said(), "what nothing ended is not lost"
            async with running(logs, Agent(dial=second.dial)):
                second.entries.append(entry(20, "after it"))
                second.more.set()
                await reader.until(lambda said: "docker after it" in said)
            nursery.cancel_scope.cancel()
    os.close(lock)
    assert "--after-cursor=at-1" in first.asked[1]
    assert "--after-cursor=at-11.5" in second.asked[0]
    assert reader.said().count("host four") == 1
    assert reader.notes == []
    assert next(line for line in reader.lines if line.text == "second boot").time > NOON


async def test_lines_that_come_together_are_sorted(
    logs: InstancePaths, autojump_clock: trio.testing.MockClock
) -> None:
    reader = Reader()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(all_logs.show, logs, Shown(0, follow=True), reader.write, reader.notes.append)
        await trio.sleep(all_logs.BATCH / 2)
        logs.files_log.write_text(host_line(11, "first"))
        with logs.agent_log.open("a") as file:
            file.write(host_line(12, "second"))
        await trio.sleep(all_logs.BATCH)
        nursery.cancel_scope.cancel()
    assert [line for line in reader.said() if "console" not in line] == ["files first", "host second"]
