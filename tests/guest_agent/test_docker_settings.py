from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import trio

from guest_agent.docker_settings import DAEMON_FILE, DockerSettings, changed, merged, run_program
from protocol.api import DockerSettingsUsed, Effect, UseDockerSettings
from protocol.errors import ErrorCode, RpcError

IMAGE = {"host-gateway-ip": "10.0.2.2", "log-driver": "local"}
MIRROR = {"registry-mirrors": ["https://mirror.test"]}


class Guest:
    """A root of its own, and a systemd and a dockerd that write down what they are asked."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.file = root / DAEMON_FILE
        self.file.parent.mkdir(parents=True)
        self.file.write_text(json.dumps(IMAGE))
        self.asked: list[str] = []
        self.readable: list[dict[str, Any]] = []
        self.state = "inactive"
        self.refuses = ""
        self.starts: Callable[[], bool] = lambda: True
        self.slow = ""
        self.heeds = True
        self.again()

    def again(self) -> None:
        """Another agent comes, as after a crash."""
        self.settings = DockerSettings(
            lambda: self.readable.append(self.daemon),
            self.root,
            run=self._run,
            hear=self._hear,
            clock=lambda: 1000.0 + len(self.asked),
        )

    @property
    def daemon(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(self.file.read_text())
        return content

    def _run(self, argv: Sequence[str], timeout: float) -> subprocess.CompletedProcess[str]:
        verb = argv[1].lstrip("-")
        if verb == self.slow:
            raise subprocess.TimeoutExpired(argv, timeout)
        if verb != "is-active":
            self.asked.append(verb)
        match verb:
            case "is-active":
                return subprocess.CompletedProcess(argv, 3, f"{self.state}\n", "")
            case "validate":
                path = argv[2].partition("=")[2]
                assert json.loads(Path(path).read_text())["host-gateway-ip"] == "10.0.2.2"
                said = f"unable to configure with {path}: {self.refuses}\n" if self.refuses else ""
                return subprocess.CompletedProcess(argv, bool(said), "", said)
            case "restart" if not self.starts():
                return subprocess.CompletedProcess(argv, 1, "", "Job for docker.service failed.\n")
        return subprocess.CompletedProcess(argv, 0, "", "")

    def _hear(self, since: float) -> bool:
        assert (self.asked[-1], since) == ("reload", 1000.0 + len(self.asked) - 1), (
            "what it says counts from then"
        )
        return self.heeds

    async def use(self, settings: dict[str, Any]) -> DockerSettingsUsed:
        return await self.settings.use(UseDockerSettings(json.dumps(settings)))


@pytest.fixture
def guest(tmp_path: Path) -> Guest:
    return Guest(tmp_path)


async def test_no_settings_start_no_process_and_let_docker_go_ahead(guest: Guest) -> None:
    written = guest.file.stat().st_ino
    assert await guest.use({}) == DockerSettingsUsed()
    assert (guest.asked, guest.daemon, guest.file.stat().st_ino) == ([], IMAGE, written)
    assert guest.readable == [IMAGE]


async def test_settings_are_there_before_docker_starts_and_only_once(guest: Guest) -> None:
    for _ in range(2):
        assert await guest.use(MIRROR) == DockerSettingsUsed()
        guest.again()
    assert guest.asked == ["validate"]
    assert guest.daemon == {**IMAGE, **MIRROR}
    assert guest.readable[0] == {**IMAGE, **MIRROR}


async def test_what_somebody_made_of_the_file_is_not_undone_by_the_next_session(guest: Guest) -> None:
    await guest.use(MIRROR)
    guest.file.write_text('{"debug": true}')
    await guest.use(MIRROR)
    assert guest.daemon == {"debug": True}


@pytest.mark.parametrize(
    ("settings", "effect", "asked"),
    [
        (MIRROR, Effect.RELOADED, ["validate", "reload"]),
        ({"bip": "10.9.0.1/16"}, Effect.RESTARTED, ["validate", "restart"]),
        ({**MIRROR, "bip": "10.9.0.1/16"}, Effect.RESTARTED, ["validate", "restart"]),
    ],
)
@pytest.mark.parametrize("state", ["active", "activating"])
async def test_a_docker_that_runs_takes_them_up(
    guest: Guest, settings: dict[str, Any], effect: Effect, asked: list[str], state: str
) -> None:
    guest.state = state
    assert await guest.use(settings) == DockerSettingsUsed(effect)
    assert guest.asked == asked


async def test_they_are_taken_up_when_docker_says_so(guest: Guest) -> None:
    guest.state, guest.heeds = "active", False
    late = DockerSettingsUsed(
        Effect.NONE, "Docker has not taken up its settings yet", "it has not said so within 30 s"
    )
    assert await guest.use(MIRROR) == late
    guest.heeds, guest.slow = True, "reload"
    assert "180 s" in (await guest.use({"debug": True})).details
    # They are in place, and the next session has nothing to do.
    assert guest.daemon == {**IMAGE, "debug": True}
    assert await guest.use({"debug": True}) == DockerSettingsUsed()


async def test_without_settings_the_images_come_back(guest: Guest) -> None:
    await guest.use({"log-driver": "json-file", **MIRROR})
    assert guest.daemon["log-driver"] == "json-file"
    guest.state = "active"
    assert await guest.use({}) == DockerSettingsUsed(Effect.RESTARTED)
    assert guest.daemon == IMAGE


async def test_what_docker_refuses_is_said_each_time_and_judged_once(guest: Guest) -> None:
    guest.refuses = "nonsense: no such option"
    for _ in range(2):
        used = await guest.use({"nonsense": 1})
        assert used.problem == "Docker does not take these settings"
        assert used.details == "unable to configure with daemon.json: nonsense: no such option"
        guest.again()
    assert guest.asked == ["validate"]
    assert guest.daemon == guest.readable[0] == IMAGE
    guest.refuses = ""
    assert await guest.use(MIRROR) == DockerSettingsUsed()


async def test_a_docker_that_does_not_start_with_them_gets_those_of_before(guest: Guest) -> None:
    await guest.use(MIRROR)
    guest.state = "active"
    guest.starts = lambda: "bip" not in guest.daemon
    for _ in range(2):
        used = await guest.use({**MIRROR, "bip": "1.2.3.4/8"})
        assert used.effect is Effect.NONE
        assert "those of before" in used.problem
        assert used.details == "Job for docker.service failed."
    assert guest.asked[-3:] == ["restart", "reset-failed", "restart"]
    assert guest.daemon == {**IMAGE, **MIRROR}
    assert await guest.use(MIRROR) == DockerSettingsUsed(Effect.RELOADED)


async def test_a_slow_judge_is_no_refusal_and_a_slow_start_is_one(guest: Guest) -> None:
    guest.slow = "validate"
    assert await guest.use({"bip": "10.9.0.1/16"}) == DockerSettingsUsed()
    guest.slow, guest.state = "restart", "active"
    assert "180 s" in (await guest.use({"bip": "10.9.0.2/16"})).details
    assert guest.daemon["bip"] == "10.9.0.1/16"


@pytest.mark.parametrize("text", ["[]", "{", "1", "[" * 100_000, '{"a": "' + "x" * 70_000 + '"}'])
async def test_what_is_no_object_is_refused_with_nothing_done(guest: Guest, text: str) -> None:
    with pytest.raises(RpcError) as caught:
        await guest.settings.use(UseDockerSettings(text))
    assert caught.value.code is ErrorCode.INVALID
    assert (guest.asked, guest.daemon, guest.readable) == ([], IMAGE, [])


async def test_a_file_that_cannot_be_written_keeps_nobody_waiting(guest: Guest) -> None:
    guest.file.unlink()
    guest.file.mkdir()
    guest.again = lambda: None  # type: ignore[method-assign]
    ready = trio.Event()
    settings = DockerSettings(ready.set, guest.root, run=guest._run)
    with pytest.raises(RpcError) as caught:
        await settings.use(UseDockerSettings('{"debug": true}'))
    assert caught.value.code is ErrorCode.INTERNAL
    assert ready.is_set()


async def test_two_sessions_are_served_in_turn(guest: Guest) -> None:
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(guest.use, MIRROR)
    assert guest.asked == ["validate"]


def test_objects_are_merged_and_lists_replaced() -> None:
    before = {"a": {"x": 1, "y": [1]}, "b": [1, 2], "c": 3}
    assert merged(before, {"a": {"y": [2]}, "b": [3], "d": {}}) == {
        "a": {"x": 1, "y": [2]},
        "b": [3],
        "c": 3,
        "d": {},
    }
    assert before == {"a": {"x": 1, "y": [1]}, "b": [1, 2], "c": 3}


def test_what_changed() -> None:
    assert changed({"a": 1, "b": None, "c": [1]}, {"b": 2, "c": [1], "d": None}) == {"a", "b", "d"}


def test_programs_are_run(tmp_path: Path) -> None:
    done = run_program(["sh", "-c", "echo no >&2; exit 3"], 10)
    assert (done.returncode, done.stderr) == (3, "no\n")
