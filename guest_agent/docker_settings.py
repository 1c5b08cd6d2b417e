"""dockerd's settings: what the user wants of them, merged into what the image's daemon.json says.

The law: dockerd never starts with what it would refuse. It judges a file itself (``dockerd --validate``) before the
file takes its place, and one with which it does not come back is taken away again. To say the same settings again
starts no process and changes nothing, whatever somebody else has made of the file meanwhile.
"""

from __future__ import annotations

import json
import logging
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import trio

from guest_agent import dockerd
from guest_agent.accounts import write_atomically
from protocol.api import DockerSettingsUsed, Effect, UseDockerSettings
from protocol.errors import ErrorCode, RpcError
from protocol.link import Service
from protocol.messages import clip

log = logging.getLogger(__name__)

DAEMON_FILE = "etc/docker/daemon.json"

SCRATCH = "run/agentctl/docker"
"""Of one boot, as the root is. ``image.json`` is the image's file, ``candidate.json`` what dockerd is to judge, and
``used.json`` the settings that were used last, and what was wrong with them."""

UNIT = "docker.service"

VALIDATION_TIME = 60.0
RESTART_TIME = 180.0
RELOAD_TIME = 30.0
"""Seconds. Docker may take 90 s to stop its containers (its unit's TimeoutStopSec), and an emulated one 10 to start, or
some tenths to read its file again."""

MAX_SETTINGS = 64 * 1024
"""Bytes of JSON."""

RELOADABLE = frozenset(
    {
        "allow-nondistributable-artifacts",
        "authorization-plugins",
        "debug",
        "default-runtime",
        "insecure-registries",
        "labels",
        "live-restore",
        "max-concurrent-downloads",
        "max-concurrent-uploads",
        "max-download-attempts",
        "registry-mirrors",
        "runtimes",
        "shutdown-timeout",
    }
)
"""What dockerd takes up on SIGHUP, with all containers running (dockerd(8), "Configuration reload behavior"). Not
``features``: of these it takes up some, and not the containerd image store."""

Run = Callable[[Sequence[str], float], "subprocess.CompletedProcess[str]"]
"""Runs a program for so many seconds at the most. Raises ``OSError``, ``subprocess.TimeoutExpired``."""


def run_program(argv: Sequence[str], timeout: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        argv, capture_output=True, text=True, errors="replace", timeout=timeout, check=False
    )


class _Refused(Exception):
    """Settings are not used: a sentence, and what dockerd says."""

    def __init__(self, problem: str, details: str) -> None:
        super().__init__(problem)
        self.problem = problem
        self.details = details


class _NotYet(Exception):
    """Settings are in place, and dockerd has not taken them up: why."""


def reloaded(since: float) -> bool:
    """Whether dockerd has read its file again after ``since``, as it says within ``RELOAD_TIME``."""
    return dockerd.hear(dockerd.SOCKET, "daemon", "reload", since, RELOAD_TIME)


class DockerSettings:
    """Answers ``UseDockerSettings``. ``on_readable`` is called when what Docker reads as it starts has been written."""

    def __init__(
        self,
        on_readable: Callable[[], None],
        root: Path = Path("/"),
        *,
        run: Run = run_program,
        hear: Callable[[float], bool] = reloaded,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._on_readable = on_readable
        self._file = root / DAEMON_FILE
        self._scratch = root / SCRATCH
        self._run = run
        self._hear = hear
        self._clock = clock
        self._lock = trio.Lock()

    def register(self, service: Service) -> None:
        service.on_request(UseDockerSettings, self.use)

    async def use(self, request: UseDockerSettings) -> DockerSettingsUsed:
        """Use them. ``RpcError`` INVALID for what is no JSON object, with nothing done; INTERNAL if the file cannot
        be written."""
        settings = _parsed(request.settings)
        async with self._lock:
            try:
                used = await trio.to_thread.run_sync(partial(self._use, settings))
            except OSError as error:
                raise RpcError(
                    ErrorCode.INTERNAL, f"dockerd's settings cannot be written: {error}"
                ) from error
            finally:
                self._on_readable()
        if used.problem:
            log.warning("docker.settings problem=%s details=%r", used.problem, used.details)
        return used

    def _use(self, settings: Mapping[str, Any]) -> DockerSettingsUsed:
        image = self._of_image()
        last, problem, details = self._last()
        if last == settings:
            return DockerSettingsUsed(Effect.NONE, problem, details)
        try:
            effect = self._replace(merged(image, settings), settings)
        except _NotYet as late:
            self._remember(settings)
            return DockerSettingsUsed(Effect.NONE, "Docker has not taken up its settings yet", str(late))
        except _Refused as refused:
            # Not tried again in each session: it would restart Docker each time.
            self._remember(settings, refused.problem, refused.details)
            return DockerSettingsUsed(Effect.NONE, refused.problem, refused.details)
        self._remember(settings)
        return DockerSettingsUsed(effect)

    def _of_image(self) -> Mapping[str, Any]:
        """What the image has, kept aside before it is first replaced."""
        kept = self._scratch / "image.json"
        if not kept.exists():
            write_atomically(kept, self._file.read_text() if self._file.exists() else "{}")
        settings: Mapping[str, Any] = json.loads(kept.read_text())
        return settings

    def _last(self) -> tuple[Mapping[str, Any], str, str]:
        """The settings that were used last, and what was wrong with them; those of the image are none."""
        path = self._scratch / "used.json"
        if not path.exists():
            return {}, "", ""
        settings, problem, details = json.loads(path.read_text())
        return settings, problem, details

    def _remember(self, settings: Mapping[str, Any], problem: str = "", details: str = "") -> None:
        write_atomically(self._scratch / "used.json", json.dumps([settings, problem, details]))

    def _replace(self, wanted: Mapping[str, Any], settings: Mapping[str, Any]) -> Effect:
        """Put ``wanted`` in place and have dockerd take it up. Raises ``_Refused`` with all as it was."""
        if settings:
            self._validate(wanted)
        before = self._file.read_text() if self._file.exists() else "{}"
        write_atomically(self._file, _text(wanted))
        if not self._runs():
            return Effect.NONE
        if changed(json.loads(before), wanted) <= RELOADABLE:
            self._reload()
            return Effect.RELOADED
        if failure := self._systemctl("restart"):
            write_atomically(self._file, before)
            self._systemctl("reset-failed")
            self._systemctl("restart")
            raise _Refused("Docker does not start with these settings, and has those of before", failure)
        return Effect.RESTARTED

    def _reload(self) -> None:
        """Raises ``_NotYet``: systemd only sends a signal, dockerd says when it has heeded it."""
        since = self._clock()
        if failure := self._systemctl("reload"):
            raise _NotYet(failure)
        if not self._hear(since):
            raise _NotYet(f"it has not said so within {RELOAD_TIME:.0f} s")

    def _validate(self, wanted: Mapping[str, Any]) -> None:
        candidate = self._scratch / "candidate.json"
        write_atomically(candidate, _text(wanted))
        try:
            done = self._run(["dockerd", "--validate", f"--config-file={candidate}"], VALIDATION_TIME)
        except subprocess.TimeoutExpired:
            return  # it starts with them or it does not; that it was slow here says nothing
        if done.returncode:
            said = done.stderr.strip().replace(str(candidate), "daemon.json")
            raise _Refused("Docker does not take these settings", clip(said))

    def _runs(self) -> bool:
        """Whether dockerd has read its file already, or is about to."""
        state = self._run(["systemctl", "is-active", UNIT], RESTART_TIME).stdout.strip()
        return state in ("active", "activating", "reloading")

    def _systemctl(self, verb: str) -> str:
        """What went wrong, or ""."""
        try:
            done = self._run(["systemctl", verb, UNIT], RESTART_TIME)
        except subprocess.TimeoutExpired:
            return f"systemctl {verb} {UNIT} takes more than {RESTART_TIME:.0f} s"
        return clip(done.stderr.strip() or f"exit status {done.returncode}") if done.returncode else ""


def merged(image: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """``image`` with ``settings``, which win; objects are merged key by key, lists replaced."""
    result = dict(image)
    for key, value in settings.items():
        before = result.get(key)
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            value = merged(before, value)
        result[key] = value
    return result


def changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> frozenset[str]:
    """The keys that are not as they were."""
    nothing = object()
    return frozenset(key for key in {*before, *after} if before.get(key, nothing) != after.get(key, nothing))


def _text(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, indent=2, ensure_ascii=False) + "\n"


def _parsed(text: str) -> Mapping[str, Any]:
    if len(text) > MAX_SETTINGS:
        raise RpcError(ErrorCode.INVALID, f"dockerd's settings are longer than {MAX_SETTINGS} bytes")
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RpcError(ErrorCode.INVALID, f"dockerd's settings are no JSON: {error}") from None
    if not isinstance(settings, dict):
        raise RpcError(ErrorCode.INVALID, "dockerd's settings are no JSON object")
    return settings
