"""The file server's life, with a process of the tests' own in its place."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import trio

from host_agent import file_server_process, file_service, mounts
from host_agent.errors import UserError
from host_agent.file_service import FileService
from host_agent.paths import Home, InstancePaths
from host_agent.process import ProcessIdentity
from protocol.api import MountSpec, MountState

HOME = MountSpec("/home/me", "/home/me", real_path="/home/me")
DATA = MountSpec("/srv/data", "/data", read_only=True, host_locks=True, real_path="/disk/data")

# argv: a mode, a folder for what it was told, then what the service adds.
STAND_IN = """
import os, socket, sys, time
from pathlib import Path
import trio
from host_agent.client import hello
from fileserver.control import *
from fileserver.keepsakes import Keepsakes
from protocol import codec
from protocol.link import Link, Role, Service
import json

mode, folder, arguments = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
(folder / "argv").write_text(json.dumps(arguments))
print("a word on stderr", file=sys.stderr, flush=True)
if mode == "dies":
    sys.exit(3)

async def main():
    known, guest, calls = ShareStates([]), GuestStage.WAITING if mode == "late" else GuestStage.MOUNTED, 0

    async def serve(request):
        nonlocal known
        with (folder / "served").open("a") as file:
            file.write(json.dumps(codec.encode(request)) + "\\n")
        states = [ShareState(share.id, ShareStage.SERVING, guest) for share in request.shares]
        known = ShareStates(states, True)
        if mode == "late":
            nursery.start_soon(mount_later)
        return known

    async def mount_later():
        await trio.sleep(0.1)
        states = [ShareState(state.id, ShareStage.SERVING, GuestStage.MOUNTED) for state in known.shares]
        await link.notify(SharesChanged(ShareStates(states, True)))

    async def get(request):
        nonlocal calls
        calls += 1
        states = [ShareState(state.id, state.stage, state.guest, calls=calls) for state in known.shares]
        return ShareStates(states, True)

    if mode == "keeps":
        keepsakes = Keepsakes(socket.socket(fileno=int(arguments[arguments.index("--store-fd") + 1])))
        kept = keepsakes.of(1)
        for number, descriptor in kept.claim().nodes.items():
            (folder / "kept").write_text(f"{number} {os.readlink(f'/proc/self/fd/{descriptor}')}")
        gone = folder / "gone"
        gone.touch()
        descriptor = os.open(gone, os.O_PATH)
        gone.unlink()
        kept.keep_node(7, descriptor)
    service = Service()
    service.on_request(ServeShares, serve)
    service.on_request(GetShares, get)
    control = socket.socket(fileno=int(arguments[arguments.index("--control-fd") + 1]))
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(control))
    link = Link(stream, Role.SERVER, service, hello("stand-in"))
    async with trio.open_nursery() as nursery:
        await link.run()
        nursery.cancel_scope.cancel()

trio.run(main)
while mode == "deaf":
    time.sleep(60)
"""


@dataclass
class Diary:
    """What the service said, and what it wanted remembered."""

    said: list[tuple[str, str]] = field(default_factory=list)
    remembered: list[tuple[MountSpec, ...]] = field(default_factory=list)
    failure: OSError | None = None

    def say(self, kind: str, message: str, **fields: str) -> None:
        self.said.append((kind, message))

    def remember(self, specs: tuple[MountSpec, ...]) -> None:
        if self.failure is not None:
            raise self.failure
        self.remembered.append(specs)

    def of(self, kind: str) -> list[str]:
        return [message for said, message in self.said if said == kind]


@dataclass
class Served:
    service: FileService
    diary: Diary
    folder: Path

    def requests(self) -> list[list[list[object]]]:
        """The shares of each ``ServeShares``, as they were encoded."""
        return [json.loads(line)[0] for line in (self.folder / "served").read_text().splitlines()]

    def states(self) -> list[MountState]:
        return [mount.state for mount in self.service.current().mounts]


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[str]]:
    program = tmp_path / "stand_in.py"
    program.write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    return lambda mode: [sys.executable, str(program), mode, str(tmp_path)]


@asynccontextmanager
async def served(instance: InstancePaths, program: Sequence[str], *specs: MountSpec) -> AsyncIterator[Served]:
    diary = Diary()
    home = Home(instance.directory.parent.parent)
    service = FileService(home, instance, specs, diary.say, diary.remember, program)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(service.run)
        yield Served(service, diary, Path(program[-1]))
        nursery.cancel_scope.cancel()


async def until(condition: Callable[[], object], timeout: float = 20) -> None:
    with trio.fail_after(timeout):
        while not condition():
            await trio.sleep(0.01)


def is_running(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


# --- one process after another ---------------------------------------------------------------------


async def test_it_is_told_what_to_serve_and_its_answer_is_shown(
    instance: InstancePaths, stand_in: Callable[[str], list[str]]
) -> None:
    async with served(instance, stand_in("sound"), DATA, HOME) as it:
        await until(lambda: it.states() == [MountState.MOUNTED] * 2)
        ids = mounts.numbers([DATA, HOME])
        assert it.requests() == [
            [
                [ids["/data"], "/disk/data", "/data", True, True],
                [ids["/home/me"], "/home/me", "/home/me", False, False],
            ]
        ]
        argv = json.loads((it.folder / "argv").read_text())
        assert argv[:6] == [
            *("--guest-socket", str(instance.files_socket)),
            *("--instance", str(instance.directory)),
            *("--journal", str(instance.files_journal)),
        ]
        assert f"--hide={instance.directory.parent.parent}" in argv
        assert it.diary.of("mount") == ["mounted /data", "mounted /home/me"]
        assert "a word on stderr" in instance.files_log.read_text()
        pid = it.service.pid
        assert is_running(pid)
    assert not is_running(pid)
    assert it.service.pid == 0


async def test_the_counters_are_asked_for(
    instance: InstancePaths, stand_in: Callable[[str], list[str]]
) -> None:
    async with served(instance, stand_in("sound"), HOME) as it:
        await until(lambda: it.states() == [MountState.MOUNTED])
        assert [(await it.service.report()).mounts[0].calls for _ in range(2)] == [1, 2]


async def test_a_killed_one_is_replaced_and_told_again(
    instance: InstancePaths, stand_in: Callable[[str], list[str]]
) -> None:
    async with served(instance, stand_in("sound"), HOME) as it:
        await until(lambda: it.states() == [MountState.MOUNTED])
        first = it.service.pid
        os.kill(first, signal.SIGKILL)
        await until(lambda: it.service.restarts == 1)
        await until(lambda: it.states() == [MountState.MOUNTED])
        assert it.service.pid not in (0, first)
        assert len(it.requests()) == 2
        assert it.requests()[0] == it.requests()[1]
        assert it.diary.of("file-server") == [
            "the file server was killed by signal 9 (SIGKILL); starting it again"
        ]
        # The mount was there all the time as far as anybody has to know.
        assert it.diary.of("mount") == ["mounted /home/me"]


async def test_the_next_one_is_given_what_the_killed_one_kept(
    instance: InstancePaths, stand_in: Callable[[str], list[str]], tmp_path: Path
) -> None:
    gone = f"{tmp_path / 'gone'} (deleted)"

    def held() -> int:
        return sum(os.path.realpath(fd.path, strict=False) == gone for fd in os.scandir("/proc/self/fd"))

    async with served(instance, stand_in("keeps"), HOME) as it:
        await until(lambda: it.states() == [MountState.MOUNTED])
        await until(lambda: held() == 1)
        assert not (it.folder / "kept").exists()
        os.kill(it.service.pid, signal.SIGKILL)
        await until(lambda: it.service.restarts == 1)
        await until(lambda: it.states() == [MountState.MOUNTED])
        assert (it.folder / "kept").read_text() == f"7 {gone}"
    assert held() == 0


async def test_where_a_folder_is_does_not_change(
    instance: InstancePaths, stand_in: Callable[[str], list[str]], tmp_path: Path
) -> None:
    """A guest that may write to what it is in may put a symlink in its place, and have the file server end."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    spec = MountSpec(str(tmp_path / "link"), "/guest")
    async with served(instance, stand_in("sound"), spec) as it:
        await until(lambda: it.states() == [MountState.MOUNTED])
        (tmp_path / "link").unlink()
        (tmp_path / "link").symlink_to("/")
        os.kill(it.service.pid, signal.SIGKILL)
        await until(lambda: it.service.restarts == 1)
        await until(lambda: it.states() == [MountState.MOUNTED])
        assert str(tmp_path / "real") in json.dumps(it.requests()[0])
        assert it.requests()[0] == it.requests()[1]
        assert it.service.current().mounts[0].spec == spec


async def test_what_the_user_chose_is_served_whatever_its_path_means_now(
    instance: InstancePaths, stand_in: Callable[[str], list[str]], tmp_path: Path
) -> None:
    """Between two starts, a guest has made a symlink of a folder inside another share."""
    (tmp_path / "secret").mkdir()
    folder = tmp_path / "share" / "inner"
    folder.parent.mkdir()
    folder.symlink_to(tmp_path / "secret")
    spec = MountSpec(str(folder), "/a place", read_only=True, real_path=str(folder))
    async with served(instance, stand_in("sound"), spec, HOME) as it:
        await until(lambda: it.states() == [MountState.MOUNTED] * 2)
        assert str(tmp_path / "secret") not in json.dumps(it.requests())
        assert it.diary.remembered == []
        mount, home = (await it.service.report()).mounts
        assert mount.spec.host_path == mount.spec.real_path == str(folder)
        assert mount.reason == (
            f"{folder} has come to mean {tmp_path}/secret; what the VM was given is {folder}"
        )
        assert f"agentctl up --mount '{folder}:/a place:ro'" in mount.hint
        assert home.reason == home.hint == ""
        folder.unlink()
        assert not (await it.service.report()).mounts[0].reason


async def test_what_was_not_recorded_is_looked_up_once_and_recorded(
    instance: InstancePaths, stand_in: Callable[[str], list[str]], tmp_path: Path
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    old = MountSpec(str(tmp_path / "link"), "/a")
    async with served(instance, stand_in("sound"), HOME, old) as it:
        ((home, recorded),) = it.diary.remembered
        assert (home, recorded) == (HOME, old)
        assert (home.real_path, recorded.real_path) == ("/home/me", str(tmp_path / "real"))
        await until(lambda: it.states() == [MountState.MOUNTED] * 2)
        await it.service.add([MountSpec(str(tmp_path / "link"), "/b")])
        assert [spec.real_path for spec in it.diary.remembered[-1]] == [
            "/home/me",
            *[str(tmp_path / "real")] * 2,
        ]


async def test_what_is_served_already_is_not_moved_by_asking_again(
    instance: InstancePaths, stand_in: Callable[[str], list[str]]
) -> None:
    async with served(instance, stand_in("sound"), HOME) as it:
        await until(lambda: it.states() == [MountState.MOUNTED])
        await it.service.add([replace(HOME, real_path="/elsewhere"), DATA])
        assert [spec.real_path for spec in it.service.specs] == ["/home/me", "/disk/data"]


async def test_what_cannot_be_recorded_is_served(instance: InstancePaths, tmp_path: Path) -> None:
    diary = Diary(failure=OSError(28, "No space left on device"))
    home = Home(instance.directory.parent.parent)
    (tmp_path / "link").symlink_to("real")
    specs = [MountSpec(str(tmp_path / "link"), "/a")]
    service = FileService(home, instance, specs, diary.say, diary.remember)
    assert service.specs[0].real_path == str(tmp_path / "real")


async def test_a_disk_that_is_away_is_waited_for_once(
    instance: InstancePaths, stand_in: Callable[[str], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    looks, back = [], threading.Event()

    def look(specs: Sequence[MountSpec]) -> dict[str, str]:
        looks.append(specs)
        back.wait(20)
        return {}

    monkeypatch.setattr(file_service, "ANSWER_TIME", 0.2)
    monkeypatch.setattr(mounts, "strayed", look)
    async with served(instance, stand_in("sound"), HOME) as it:
        try:
            with trio.fail_after(10):
                for _ in range(3):
                    assert len((await it.service.report()).mounts) == 1
            assert len(looks) == 1
        finally:
            back.set()


async def test_one_that_does_not_stay_up_is_shown_as_that(
    instance: InstancePaths, stand_in: Callable[[str], list[str]]
) -> None:
    async with served(instance, stand_in("dies"), HOME) as it:
        assert it.states() == [MountState.WAITING]
        await until(lambda: it.states() == [MountState.FAILED])
        mount = it.service.current().mounts[0]
        assert mount.reason == "the file server does not stay up: the file server exited with status 3"
        assert mount.hint == "see: agentctl logs --component files"
        tries = it.service.restarts
        await until(lambda: it.service.restarts > tries + 1)
        # Said as often as it is news.
        assert len(it.diary.of("file-server")) == file_service.MANY_FAILURES
        assert it.diary.of("mount") == [f"the mount /home/me: {mount.reason}"]


async def test_one_that_cannot_be_started_is_tried_again(instance: InstancePaths) -> None:
    async with served(instance, ["/nonexistent/python"], HOME) as it:
        await until(lambda: it.states() == [MountState.FAILED])
        assert "could not be started: No such file or directory" in it.service.current().mounts[0].reason


async def test_one_that_does_not_end_is_killed(
    instance: InstancePaths, stand_in: Callable[[str], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_server_process, "END_TIME", 0.3)
    async with served(instance, stand_in("deaf"), HOME) as it:
        await until(lambda: it.states() == [MountState.MOUNTED])
        pid = it.service.pid
    assert not is_running(pid)


async def test_two_never_run_at_once(
    instance: InstancePaths, stand_in: Callable[[str], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host agent before this one was killed, and its file server is still about to end."""
    monkeypatch.setattr(file_server_process, "END_TIME", 0.3)
    left = await trio.lowlevel.open_process(["sleep", "1000"])
    ProcessIdentity.of_child(left.pid).write(instance.files_identity)
    async with served(instance, stand_in("sound"), HOME) as it:
        await trio.sleep(0.1)
        assert left.poll() is None
        assert it.service.pid == 0
        assert await left.wait() == -signal.SIGKILL
        await until(lambda: it.states() == [MountState.MOUNTED])
        assert ProcessIdentity.read(instance.files_identity) == ProcessIdentity.of(it.service.pid)


async def test_what_was_mounted_stays_so_while_nobody_answers(
    instance: InstancePaths, stand_in: Callable[[str], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bind of what the guest never mounted would be an empty folder; of what it did, it waits."""
    monkeypatch.setattr(file_service, "FIRST_DELAY", 0.5)
    async with served(instance, stand_in("late"), HOME) as it:
        await until(lambda: it.requests() if (it.folder / "served").exists() else None)
        assert it.service.mounted() == []
        await until(lambda: it.states() == [MountState.MOUNTED])
        assert it.service.mounted() == [HOME]
        os.kill(it.service.pid, signal.SIGKILL)
        await until(lambda: it.states() == [MountState.WAITING])
        assert it.service.mounted() == [HOME]


# --- more mounts -----------------------------------------------------------------------------------


async def test_a_mount_is_added_while_it_runs(
    instance: InstancePaths, stand_in: Callable[[str], list[str]]
) -> None:
    async with served(instance, stand_in("late"), HOME) as it:
        await until(lambda: it.states() == [MountState.MOUNTED])
        table = await it.service.add([DATA, HOME])
        assert [(mount.spec, mount.state) for mount in table.mounts] == [
            (DATA, MountState.MOUNTED),
            (HOME, MountState.MOUNTED),
        ]
        assert it.diary.remembered == [(HOME, DATA)]
        assert it.service.specs == (HOME, DATA)
        first, second = it.requests()
        assert first[0] in second


async def test_what_was_added_is_served_by_the_next_process_as_well(
    instance: InstancePaths, stand_in: Callable[[str], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_service, "SETTLE_TIME", 0)
    async with served(instance, stand_in("sound"), HOME) as it:
        table = await it.service.add([DATA])  # nobody is there yet to be told
        assert [mount.state for mount in table.mounts] == [MountState.WAITING] * 2
        await until(lambda: it.states() == [MountState.MOUNTED] * 2)


async def test_a_mount_is_taken_away_while_it_runs(
    instance: InstancePaths, stand_in: Callable[[str], list[str]]
) -> None:
    async with served(instance, stand_in("sound"), HOME, DATA) as it:
        await until(lambda: it.states() == [MountState.MOUNTED] * 2)
        with pytest.raises(UserError, match="/nowhere is not a mount"):
            await it.service.remove([DATA.guest_path, "/nowhere"])
        assert it.service.specs == (HOME, DATA)
        table = await it.service.remove([DATA.guest_path])
        assert [mount.spec for mount in table.mounts] == [HOME]
        assert it.diary.remembered == [(HOME,)]
        first, second = it.requests()
        assert len(first) == 2
        assert len(second) == 1


@pytest.mark.parametrize(
    ("failure", "spec"),
    [(None, MountSpec("/other", "/home/me")), (OSError(28, "No space left on device"), DATA)],
)
async def test_a_mount_that_cannot_be_added_changes_nothing(
    instance: InstancePaths,
    stand_in: Callable[[str], list[str]],
    failure: OSError | None,
    spec: MountSpec,
) -> None:
    async with served(instance, stand_in("sound"), HOME) as it:
        await until(lambda: it.states() == [MountState.MOUNTED])
        it.diary.failure = failure
        with pytest.raises(OSError if failure else UserError):
            await it.service.add([spec])
        assert it.service.specs == (HOME,)
        assert it.diary.remembered == []
        assert len(it.requests()) == 1
