"""The words of ``agentctl cp``; what it copies is tested in test_copying."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio
import trio.testing

from host_agent.commands import copy as command
from host_agent.copy_words import Plan
from host_agent.copying import Copy, CutOff, FarEnd
from host_agent.errors import ExitCode, UserError
from host_agent.paths import Home
from tests.host_agent.command_line import agentctl, said


@pytest.mark.parametrize(
    "words",
    [
        ["a", "b"],
        ["guest:a", "guest:b"],
        ["a", "guest:b", "guest:c"],
        ["guest:a", "b", "c"],
        ["-r", "a", "/b"],
    ],
)
def test_one_side_is_the_vm_and_the_other_is_not(home: Home, words: list[str]) -> None:
    done = agentctl("cp", *words)
    assert said(done)[0] == "error: all of SRC are to be on one side, and DST on the other"
    assert "guest:/etc/hosts" in said(done)[1]
    assert done.returncode == ExitCode.USAGE


@pytest.mark.parametrize("words", [["a", "guest:"], ["-r", "guest:a", "guest:b", "."]])
def test_it_needs_a_vm_that_runs(home: Home, words: list[str]) -> None:
    done = agentctl("cp", *words)
    assert said(done)[0] == "error: instance default is not running"
    assert done.returncode == ExitCode.NOT_RUNNING


def test_a_destination_is_needed(home: Home) -> None:
    done = agentctl("cp", "guest:a")
    assert done.returncode == ExitCode.USAGE
    assert "Missing argument" in done.stderr


def test_an_instance_is_named_by_its_paths(home: Home) -> None:
    home.instance("dev").ensure()
    done = agentctl("cp", "dev:/etc/hosts", ".")
    assert said(done) == ["error: instance dev is not running", "hint: start it: agentctl --instance dev up"]
    assert done.returncode == ExitCode.NOT_RUNNING
    done = agentctl("--instance", "box", "cp", "dev:/etc/hosts", ".")
    assert said(done)[0] == "error: dev: is one instance, and --instance says box"
    assert done.returncode == ExitCode.USAGE


def test_a_name_that_no_instance_has_is_told(home: Home) -> None:
    home.instance("dev").ensure()
    done = agentctl("cp", "dve:/etc/hosts", ".")
    assert said(done) == ["error: there is no instance dve, and no file dve:/etc/hosts", "hint: there is dev"]


# --- attempts, without any copy ---------------------------------------------------------------------------


LOST = CutOff("the connection was lost", "see: agentctl status", ExitCode.GUEST)
OUT = Plan("dev", "dev:", False, ("a",), ".")


@dataclass
class Attempts:
    """Each lasts 10 s and comes so much further, and then the connection is lost. 101 is all."""

    home: Home
    patch: pytest.MonkeyPatch
    failed: list[UserError] = field(default_factory=list)

    def run(self, *come: int, plan: Plan = OUT, resumes: bool = True) -> list[float]:
        """When each began."""
        began: list[float] = []
        left, copy = iter(come), Copy(print)

        async def attempt(*_: object) -> None:
            copy.begin()
            copy.resumes = resumes
            began.append(trio.current_time())
            await trio.sleep(10)
            copy.gauge.size = next(left, 0)
            copy.sent = copy.gauge.size == 100
            if copy.gauge.size < 101:
                raise LOST

        self.patch.setattr(command, "_attempt", attempt)
        clock = trio.testing.MockClock(autojump_threshold=0)
        try:
            trio.run(command._persist, self.home.instance("dev"), plan, "", copy, FarEnd(()), clock=clock)
        except UserError as error:
            self.failed.append(error)
        return [round(each - began[0]) for each in began]


@pytest.fixture
def attempts(home: Home, monkeypatch: pytest.MonkeyPatch) -> Attempts:
    return Attempts(home, monkeypatch)


def test_it_is_tried_again_until_all_is_there(attempts: Attempts) -> None:
    assert attempts.run(10, 20, 101) == [0, 10, 20]
    assert attempts.failed == []


def test_a_minute_without_anything_new_is_the_end(attempts: Attempts) -> None:
    assert attempts.run(10, 30, 30) == [0, 10, 20, 30, 40, 50, 60, 70, 80]
    (error,) = attempts.failed
    assert (error.message, error.hint) == (LOST.message, command.AGAIN)


@pytest.mark.parametrize(("come", "resumes"), [(0, True), (50, False)])
def test_what_never_began_or_cannot_go_on_ends_at_once(attempts: Attempts, come: int, resumes: bool) -> None:
    assert attempts.run(come, resumes=resumes) == [0]
    assert attempts.failed == [LOST]


def test_a_folder_of_which_all_was_sent_is_not_sent_into_itself(attempts: Attempts, tmp_path: Path) -> None:
    folder = Plan("dev", "dev:", True, (str(tmp_path),), "there")
    (tmp_path / "file").touch()
    file = Plan("dev", "dev:", True, (str(tmp_path / "file"),), "there")
    assert attempts.run(100, 101, plan=folder) == [0]
    assert attempts.run(100, 101, plan=OUT) == [0]
    assert attempts.run(100, 101, plan=file) == [0, 10]
