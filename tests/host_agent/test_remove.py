from __future__ import annotations

import os
from pathlib import Path

import pytest

from host_agent import docker_context, state
from host_agent.errors import ExitCode, UserError
from host_agent.paths import InstancePaths
from host_agent.remove import remove


@pytest.fixture
def stopped(instance: InstancePaths) -> InstancePaths:
    for path in (instance.lock, instance.config, instance.state, instance.agent_log, instance.data_disk):
        path.write_bytes(path.name.encode())
    instance.config_draft.touch()
    return instance


def test_the_data_disk_stays_unless_it_is_named(stopped: InstancePaths) -> None:
    remove(stopped, data=False)
    assert list(stopped.directory.iterdir()) == [stopped.data_disk]
    assert stopped.data_disk.read_bytes() == b"data.img"
    assert not stopped.config_draft.exists()


def test_with_data_nothing_stays(stopped: InstancePaths) -> None:
    remove(stopped, data=True)
    assert not stopped.directory.exists()


def test_twice_is_once(stopped: InstancePaths) -> None:
    remove(stopped, data=False)
    remove(stopped, data=False)
    assert list(stopped.directory.iterdir()) == [stopped.data_disk]


@pytest.mark.parametrize("lock", ["lock", "up_lock"])
@pytest.mark.parametrize("data", [False, True])
def test_nothing_is_removed_while_somebody_is_at_work(stopped: InstancePaths, lock: str, data: bool) -> None:
    before = {path.name for path in stopped.directory.iterdir()} | {"up.lock"}
    with state.locked(getattr(stopped, lock)):
        with pytest.raises(UserError, match="another command is at work on instance default") as caught:
            remove(stopped, data=data)
    assert caught.value.exit_code is ExitCode.BUSY
    assert {path.name for path in stopped.directory.iterdir()} | {"up.lock"} == before


def test_the_data_disk_goes_last(stopped: InstancePaths, monkeypatch: pytest.MonkeyPatch) -> None:
    """A removal that is cut short has not taken the data while the rest stayed."""
    removed: list[str] = []
    unlink = Path.unlink

    def note(path: Path, missing_ok: bool = False) -> None:
        removed.append(path.name)
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", note)
    remove(stopped, data=True)
    assert removed[-2:] == ["data.img", "up.lock"]


def test_the_docker_context_goes_too(stopped: InstancePaths) -> None:
    directory = docker_context.config_dir(os.environ)
    name = docker_context.context_name(stopped.name)
    docker_context.create(directory, name, stopped.docker_socket, "a VM")
    assert any(directory.rglob("meta.json"))
    remove(stopped, data=False)
    assert not any(directory.rglob("meta.json"))
