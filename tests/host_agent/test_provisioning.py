"""Scripts of the user's, with a guest that is a folder of this machine and runs them really."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio
import trio.testing

from host_agent import provisioning
from host_agent.guest_settings import Script
from host_agent.provisioning import BURST, LineBudget, Provisioning
from protocol import execio
from protocol.api import Exec, Target
from protocol.errors import LinkError


class Guest:
    """Runs what it is asked to, without asking who it is for. ``dies`` so often while a script of the user's runs."""

    def __init__(self) -> None:
        self.ran: list[tuple[str, dict[str, str]]] = []
        self.dies = 0
        self.away = False

    async def dial(self, target: Target) -> trio.StapledStream:  # type: ignore[type-arg]
        assert isinstance(target, Exec)
        if self.away:
            raise LinkError("no guest")
        ours, theirs = trio.testing.memory_stream_pair()
        trio.lowlevel.spawn_system_task(self._serve, target, theirs)
        return ours

    async def _serve(self, target: Exec, stream: trio.StapledStream) -> None:  # type: ignore[type-arg]
        decoder, stdin, ended = execio.Decoder(), b"", False
        while not ended:
            for packet in decoder.receive_data(bytes(await stream.receive_some())):
                match packet:
                    case execio.Stdin(data):
                        stdin += data
                    case execio.StdinEof():
                        ended = True
        if target.argv[0] != "/bin/sh":
            self.ran.append((target.user, target.env))
            if self.dies:
                self.dies -= 1
                await stream.aclose()
                return
        done = await trio.run_process(
            target.argv, stdin=stdin, capture_stdout=True, capture_stderr=True, check=False
        )
        for data, kind in ((done.stdout, execio.Stdout), (done.stderr, execio.Stderr)):
            for start in range(0, len(data), 100):
                await stream.send_all(execio.encode(kind(data[start : start + 100])))
        await stream.send_all(execio.encode(execio.Exit(done.returncode)))


class Run:
    """One host agent after another, with one guest."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.guest = Guest()
        self.folder = folder
        self.log = folder / "provision.log"
        self.said: list[tuple[str, str]] = []
        in_guest = str(folder / "guest")
        for name in ("_INSTALL", "_RECORD"):
            script = getattr(provisioning, name).replace(provisioning.FOLDER, in_guest)
            monkeypatch.setattr(provisioning, name, script.replace('chown "$2"', ": chown"))
        monkeypatch.setattr(provisioning, "FOLDER", in_guest)

    async def __call__(self, *scripts: Script | str) -> list[str]:
        listed = [Script(script=script) if isinstance(script, str) else script for script in scripts]
        return await Provisioning(
            listed, self.guest.dial, lambda *said: self.said.append(said), self.log
        ).run()

    def lines(self) -> list[str]:
        return [line[24:] for line in self.log.read_text().splitlines()]

    @property
    def shown(self) -> list[str]:
        return [message for kind, message in self.said if kind == "provision-output"]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    return Run(tmp_path, monkeypatch)


async def test_scripts_run_in_order_as_who_they_are_for(run: Run) -> None:
    script = f"cd {run.folder}; pwd; echo $BASH"
    assert await run(script, Script("user", "mine", "#!/bin/sh\necho done >&2")) == []
    assert run.guest.ran == [("root", provisioning.SYSTEM_ENVIRONMENT), ("", {})]
    assert run.lines() == [
        "provision script 1: begins",
        f"provision script 1: {run.folder}",
        "provision script 1: /bin/bash",
        "provision script 1: ends with exit status 0",
        "provision script 2 (mine): begins",
        "provision script 2 (mine): done",
        "provision script 2 (mine): ends with exit status 0",
    ]
    assert run.said[0] == ("provision-started", "running provision script 1")
    assert run.shown[-1] == "provision script 2 (mine): done"


async def test_one_that_fails_is_said_and_the_next_one_runs(run: Run) -> None:
    (problem,) = await run("exit 3", "true")
    assert problem == f"provision script 1 failed with exit status 3 ({provisioning.HINT})"
    assert run.said[1] == ("provision-failed", "provision script 1 failed with exit status 3")
    assert len(run.guest.ran) == 2


async def test_the_next_host_agent_runs_none_again_and_knows_how_they_ended(run: Run) -> None:
    first = await run("exit 3", "true")
    assert await run("exit 3", "true") == first
    assert len(run.guest.ran) == 2
    assert await run("exit 4", "true") != first  # it has been edited
    assert len(run.guest.ran) == 3


async def test_one_that_was_cut_off_is_begun_again(run: Run) -> None:
    run.guest.dies = 2
    assert await run(f"touch {run.folder}/made") == []
    assert (run.folder / "made").exists()
    assert len(run.guest.ran) == 3


async def test_a_guest_that_is_never_there_ends_it(run: Run) -> None:
    run.guest.away = True
    assert await run("true") == [f"provision script 1 was cut off 3 times ({provisioning.HINT})"]


async def test_a_file_of_the_hosts(run: Run) -> None:
    script = run.folder / "setup.sh"
    script.write_text("echo from a file")
    assert await run(Script(file=str(script))) == []
    assert run.shown == ["provision script 1 (setup.sh): from a file"]
    script.unlink()
    (problem,) = await run(Script(file=str(script)))
    assert f"provision script 1 (setup.sh) was not run: {script}: No such file" in problem
    script.write_bytes(b"x" * (provisioning.MAX_SCRIPT + 1))
    assert "longer than" in (await run(Script(file=str(script))))[0]


async def test_a_log_that_cannot_be_written_costs_lines_and_no_more(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    run.log.mkdir()
    assert await run("seq 3") == []
    assert len(run.shown) == 3
    assert caplog.text.count("cannot be kept") == 1


async def test_a_script_that_is_long_arrives_whole(run: Run) -> None:
    assert await run(f": {'x' * 200_000}\nwc -c <$0") == []
    assert int(run.shown[0].rpartition(" ")[2]) > 200_000


async def test_output_is_text_and_one_line_at_a_time(run: Run) -> None:
    await run(r"printf '\033[31mred\033[0m\n10%%\r20%%\n\nno end \303\251 \377'; printf %3000s x >&2")
    assert run.shown[:4] == [
        "provision script 1: red",
        "provision script 1: 10%",
        "provision script 1: 20%",
        r"provision script 1: no end é \xff",
    ]
    assert max(map(len, run.lines())) < provisioning.MAX_LINE + 100


async def test_a_flood_is_in_the_log_and_not_in_the_progress(
    run: Run, autojump_clock: trio.testing.MockClock
) -> None:
    await run("seq 1000")
    assert len(run.shown) == BURST + 1
    assert run.shown[-1] == f"provision script 1: {1000 - BURST} more lines, {provisioning.HINT}"
    assert len(run.lines()) == 1002


def test_a_budget_comes_back_with_time() -> None:
    now = 0.0
    budget = LineBudget(lambda: now)
    assert [budget.spend() for _ in range(BURST + 1)] == [True] * BURST + [False]
    now = 0.3
    assert [budget.spend() for _ in range(2)] == [True, False]
    now = 1000.0
    assert [budget.spend() for _ in range(BURST + 1)] == [True] * BURST + [False]


async def test_a_script_belongs_to_whom_it_runs_as(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provisioning, "_INSTALL", 'echo "$2" >&2; cat >/dev/null; exit 1')
    monkeypatch.setattr(provisioning.os, "geteuid", lambda: 1234)
    said: list[str] = []
    monkeypatch.setattr(provisioning.logger, "warning", lambda *words: said.append(str(words[-1])))
    await run("true", Script("user", script="true"))
    assert [words.rpartition(" ")[2] for words in said] == ["0"] * 3 + ["1234"] * 3


def test_the_guests_folder_is_below_run() -> None:
    assert os.path.dirname(provisioning.FOLDER) == "/run/agentctl"
