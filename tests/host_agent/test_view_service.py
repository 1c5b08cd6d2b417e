"""The process of a view: started, told of, started again, ended; by a program that says what it is told to."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio

from host_agent import view_service
from host_agent.errors import UserError
from host_agent.paths import InstancePaths
from host_agent.view import library
from host_agent.view_service import ViewService
from protocol.api import ViewStage

PATIENCE = 60.0

PROGRAM = """
import json, os, socket, sys, trio
from host_agent.view.control import GetViewState, ViewChanged, ViewState
from protocol.api import ViewPlace
from protocol.link import Hello, Link, Role, Service

script = json.load(open(sys.argv[1]))
arguments = sys.argv[2:]
if not os.path.isdir(arguments[0]):
    sys.exit("there is nothing to mount on")
log = open(sys.argv[1] + ".log", "a")
log.write(json.dumps([os.getpid(), *arguments, os.environ.get("FUSE_LIBRARY_PATH")]) + "\\n")
log.close()
if not os.path.isdir(arguments[0]):
    sys.exit("there is no folder to mount it on")
if script.get("status") is not None:
    sys.exit(script["status"])

async def main():
    state = ViewState(True, True, script.get("reason", ""), [ViewPlace("volumes/db", False)])
    if state.reason:
        state = ViewState(False, False, state.reason)
    async def get(request):
        return state
    service = Service()
    service.on_request(GetViewState, get)
    control = socket.socket(fileno=int(arguments[arguments.index("--control-fd") + 1]))
    link = Link(trio.SocketStream(trio.socket.from_stdlib_socket(control)), Role.SERVER, service, Hello(name="view"))
    async with trio.open_nursery() as nursery:
        await nursery.start(link.run)
        if "after" in script:
            await trio.sleep(script["after"])
            os._exit(0)

trio.run(main)
"""


@dataclass
class Scene:
    paths: InstancePaths
    script: Path
    service: ViewService
    served: list[bool] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    refusal: UserError | None = None

    def lives(self) -> list[list[object]]:
        log = Path(f"{self.script}.log")
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    async def until(self, count: int) -> list[list[object]]:
        with trio.fail_after(PATIENCE):
            while len(found := self.lives()) < count:
                await trio.sleep(0.02)
        return found


@pytest.fixture(autouse=True)
def a_machine_with_fuse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "check", lambda: "libfuse3.so.3")
    monkeypatch.setattr(library, "find_library", lambda: "libfuse3.so.3")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))


def made(paths: InstancePaths, **script: object) -> Scene:
    scene: Scene

    async def serve(wanted: bool) -> None:
        await trio.lowlevel.checkpoint()
        if scene.refusal is not None:
            raise scene.refusal
        scene.served.append(wanted)

    def say(kind: str, message: str, **fields: str) -> None:
        scene.said.append(message)

    file = paths.directory / "script"
    file.write_text(json.dumps(script))
    service = ViewService(paths, say, serve, [sys.executable, "-c", PROGRAM, str(file)])
    scene = Scene(paths, file, service)
    return scene


@asynccontextmanager
async def running(scene: Scene) -> AsyncIterator[Scene]:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(scene.service.run)
        yield scene
        nursery.cancel_scope.cancel()


async def test_it_is_there_from_one_word_to_the_other(instance: InstancePaths) -> None:
    async with running(made(instance)) as scene:
        assert (await scene.service.report()).stage is ViewStage.OFF
        view = await scene.service.start(str(instance.view), "guest")
        assert (view.stage, view.path, view.owner, view.connected) == (
            ViewStage.MOUNTED,
            str(instance.view),
            "guest",
            True,
        )
        assert [place.path for place in view.places] == ["volumes/db"]
        assert instance.view_record.exists()
        again = await scene.service.start(str(instance.view), "guest")
        assert again == view
        (life,) = scene.lives()
        assert life[1:4] == [str(instance.view), "--owner", "guest"]
        assert life[-1] == "libfuse3.so.3"
        view = await scene.service.end()
        assert view.stage is ViewStage.OFF
        assert scene.served == [True, False]
        assert not instance.view.exists()
        assert not instance.view_record.exists()
        with pytest.raises(ProcessLookupError):
            os.kill(int(str(life[0])), 0)
        await scene.service.end()  # also if it is not


async def test_one_that_is_killed_is_shown_again(instance: InstancePaths) -> None:
    async with running(made(instance)) as scene:
        await scene.service.start(str(instance.view), "me")
        os.kill(int(str(scene.lives()[0][0])), signal.SIGKILL)
        await scene.until(2)
        assert any("showing it again" in message for message in scene.said)
        assert (await scene.service.start(str(instance.view), "me")).stage is ViewStage.MOUNTED
        assert len(scene.lives()) == 2


async def test_one_that_does_not_stay_up_is_said_and_given_up(
    instance: InstancePaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(view_service, "FIRST_DELAY", 0.01)
    async with running(made(instance, status=3)) as scene:
        with pytest.raises(UserError, match="does not stay up"):
            await scene.service.start(str(instance.view), "me")
        assert len(scene.lives()) == view_service.MANY_FAILURES
        assert scene.served == [True, False]
        assert (await scene.service.report()).stage is ViewStage.OFF
        scene.script.write_text("{}")
        assert (await scene.service.start(str(instance.view), "me")).stage is ViewStage.MOUNTED


async def test_why_it_cannot_be_mounted_is_said(instance: InstancePaths) -> None:
    async with running(made(instance, reason="the guest says nothing")) as scene:
        with pytest.raises(UserError, match="the guest says nothing"):
            await scene.service.start(str(instance.view), "me")
        assert not instance.view.exists()


async def test_who_unmounts_it_by_other_means_has_ended_it(instance: InstancePaths) -> None:
    async with running(made(instance, after=0.3)) as scene:
        await scene.service.start(str(instance.view), "me")
        with trio.fail_after(PATIENCE):
            while (await scene.service.report()).stage is not ViewStage.OFF:
                await trio.sleep(0.02)
        await trio.sleep(0.3)
        assert len(scene.lives()) == 1
        assert not instance.view_record.exists()


async def test_there_is_one_at_a_time(instance: InstancePaths, tmp_path: Path) -> None:
    async with running(made(instance)) as scene:
        await scene.service.start(str(instance.view), "me")
        for path, owner in ((str(tmp_path), "me"), (str(instance.view), "guest")):
            with pytest.raises(UserError, match="already") as said:
                await scene.service.start(path, owner)
            assert "--end" in said.value.hint


async def test_a_successor_of_a_killed_host_agent_shows_it_again(
    instance: InstancePaths, tmp_path: Path
) -> None:
    for count, path in enumerate((tmp_path, instance.view), 1):
        instance.view_record.write_text(json.dumps([str(path), "guest"]))
        async with running(made(instance)) as scene:
            assert scene.service.is_wanted
            life = (await scene.until(count))[-1]
            assert life[1:4] == [str(path), "--owner", "guest"]


async def test_where_something_was_put_meanwhile_it_is_not_shown_again(instance: InstancePaths) -> None:
    async with running(made(instance)) as scene:
        await scene.service.start(str(instance.view), "me")
        (instance.view / "file").write_text("somebody's\n")
        os.kill(int(str(scene.lives()[0][0])), signal.SIGKILL)
        with trio.fail_after(PATIENCE):
            while (await scene.service.report()).stage is not ViewStage.OFF:
                await trio.sleep(0.02)
        assert any("is not empty" in message for message in scene.said)
        assert (instance.view / "file").read_text() == "somebody's\n"
        assert len(scene.lives()) == 1


async def test_a_guest_that_cannot_serve_it_costs_nothing(instance: InstancePaths) -> None:
    async with running(made(instance)) as scene:
        scene.refusal = UserError("this VM has no port for it", "restart it")
        with pytest.raises(UserError, match="no port"):
            await scene.service.start(str(instance.view), "me")
        assert scene.lives() == []
        assert not scene.service.is_wanted


async def test_without_fuse_one_sentence(instance: InstancePaths, monkeypatch: pytest.MonkeyPatch) -> None:
    def check() -> str:
        raise UserError("this machine has no FUSE library", library.INSTALL)

    monkeypatch.setattr(library, "check", check)
    async with running(made(instance)) as scene:
        with pytest.raises(UserError, match="no FUSE library"):
            await scene.service.start(str(instance.view), "me")
        assert scene.served == []
        assert not instance.view.exists()
