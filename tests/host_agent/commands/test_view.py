"""``agentctl view``, of a host agent that says what it is told to."""

from __future__ import annotations

import json

import click
import pytest
import trio
from click.testing import CliRunner, Result

from host_agent import state
from host_agent.cli import cli
from host_agent.errors import ExitCode, UserError
from host_agent.paths import InstancePaths
from host_agent.view import library
from protocol.api import View, ViewPlace, ViewStage
from tests.host_agent.test_api_server import served


@pytest.fixture(autouse=True)
def fuse(monkeypatch: pytest.MonkeyPatch) -> list[UserError]:
    """What is missing on this machine."""
    missing: list[UserError] = []

    def check() -> str:
        for error in missing:
            raise error
        return "libfuse3.so.3"

    monkeypatch.setattr(library, "check", check)
    return missing


async def call(instance: InstancePaths, *words: str) -> Result:
    """In a thread, as if the instance ran."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state, "is_locked", lambda path: path == instance.lock)
        return await trio.to_thread.run_sync(lambda: CliRunner().invoke(cli, ["view", *words]))


async def test_it_says_where_and_what_may_be_changed(instance: InstancePaths) -> None:
    async with served(instance):
        done = await call(instance)
        assert done.exit_code == 0, done.output
        lines = [line.split() for line in done.stdout.splitlines()]
        assert lines == [["/somewhere/view"], ["BELOW", "IT", "MODE"], ["volumes/db", "read-write"]]


async def test_json_has_the_fields_of_the_message(instance: InstancePaths) -> None:
    async with served(instance):
        assert json.loads((await call(instance, "--json", "--owner", "guest")).stdout) == {
            "stage": "mounted",
            "path": "/somewhere/view",
            "owner": "guest",
            "connected": True,
            "reason": "",
            "hint": "",
            "places": [{"path": "volumes/db", "read_only": False}],
        }


async def test_a_folder_is_told_by_its_real_path(
    instance: InstancePaths, tmp_path_factory: pytest.TempPathFactory
) -> None:
    place = tmp_path_factory.mktemp("place")
    (place / "real").mkdir()
    (place / "link").symlink_to("real")
    async with served(instance) as running:
        assert (await call(instance, str(place / "link"))).exit_code == 0
        assert running.instance.view.path == str(place / "real")


async def test_whose_they_are_stays_unless_it_is_said(instance: InstancePaths) -> None:
    async with served(instance) as running:
        running.instance.view = View(ViewStage.MOUNTED, "/there", "guest", True)
        await call(instance)
        assert (running.instance.view.path, running.instance.view.owner) == ("/there", "guest")


async def test_it_is_ended(instance: InstancePaths) -> None:
    async with served(instance) as running:
        await call(instance)
        done = await call(instance, "--end")
        assert done.exit_code == 0
        assert "not shown here" in done.stdout
        assert running.instance.view.stage is ViewStage.OFF


async def test_to_end_it_takes_no_folder(instance: InstancePaths) -> None:
    async with served(instance):
        done = await call(instance, "--end", "/tmp")
        assert isinstance(done.exception, UserError | SystemExit | click.ClickException)


async def test_without_fuse_it_ends_as_without_any_other_program(
    instance: InstancePaths, fuse: list[UserError]
) -> None:
    fuse.append(UserError("this machine has no FUSE library", "install it", ExitCode.DEPENDENCY))
    async with served(instance) as running:
        running.instance.view = View(ViewStage.OFF, "/there", "me")
        done = await call(instance)
        assert isinstance(done.exception, UserError)
        assert done.exception.exit_code == ExitCode.DEPENDENCY
        assert running.instance.view.stage is ViewStage.OFF
        assert (await call(instance, "--end")).exit_code == 0


async def test_why_it_cannot_be_is_told(instance: InstancePaths) -> None:
    async with served(instance) as running:
        running.instance.view_failure = UserError("no FUSE library", "install it")
        done = await call(instance)
        assert done.exit_code != 0
        assert isinstance(done.exception, Exception)
        assert "no FUSE library" in str(done.exception)


async def test_what_the_guest_calls_its_volumes_is_data(instance: InstancePaths) -> None:
    async with served(instance) as running:
        await call(instance)
        running.instance.view = View(
            ViewStage.MOUNTED, "/there", "me", True, places=[ViewPlace("volumes/\x1b[31m[bold]x", True)]
        )

        async def as_it_is(path: str, owner: str) -> View:
            await trio.lowlevel.checkpoint()
            return running.instance.view

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(running.server, "_answers", _with(running.server._answers, start_view=as_it_is))
            said = (await call(instance)).stdout
        assert "\x1b" not in said
        assert "[bold]x" in said


def _with(answers: object, **changes: object) -> object:
    from dataclasses import replace

    return replace(answers, **changes)  # type: ignore[type-var]
