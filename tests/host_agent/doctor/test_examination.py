from __future__ import annotations

from pathlib import Path

import pytest

from host_agent import state
from host_agent.doctor import folders, instance, programs
from host_agent.doctor.examination import examine
from host_agent.doctor.finding import Diagnosis, Level
from host_agent.paths import Home
from host_agent.state import InstanceState

TOPICS = {"system", "home", "memory", "disk", "qemu", "image", "docker", "folders", "instance"}


async def test_everything_is_looked_at_and_nothing_made(home: Home, folder: Path) -> None:
    nowhere = Home(folder / "nowhere")
    diagnosis = await examine(nowhere, nowhere.instance())
    assert {finding.topic for finding in diagnosis.findings} >= TOPICS
    assert all(finding.message for finding in diagnosis.findings)
    assert all(finding.fix for finding in diagnosis.findings if finding.level is Level.PROBLEM)
    assert not nowhere.root.exists()


async def test_without_qemu_the_rest_is_still_looked_at(
    home: Home, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(folder))
    diagnosis = await examine(home, home.instance())
    assert diagnosis.exit_code == 3
    topics = {finding.topic for finding in diagnosis.findings}
    assert topics >= TOPICS
    assert not topics & {"accelerator", "bulk data"}


async def test_a_damaged_configuration_is_one_of_the_problems(home: Home) -> None:
    home.instance().ensure()
    home.instance().config.write_text("{")
    diagnosis = await examine(home, home.instance())
    assert "configuration" in {finding.topic for finding in diagnosis.findings}
    assert diagnosis.exit_code == 2


async def test_how_it_ended_is_told(home: Home) -> None:
    home.instance().ensure()
    state.save(home.instance().state, InstanceState(failure="the VM panicked", hint="look"))
    last = (await examine(home, home.instance())).findings[-1]
    assert (last.topic, last.fix) == ("instance", "look")


async def test_what_runs_is_asked(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    home.instance().ensure()
    refusal = programs.problem("instance", "it does not answer", "end it")

    async def silent(paths: object) -> object:
        return refusal

    monkeypatch.setattr(instance, "ask", silent)
    diagnosis: Diagnosis = await examine(home, home.instance())
    assert diagnosis.findings[-1] == refusal
    assert folders.TOPIC in {finding.topic for finding in diagnosis.findings}
