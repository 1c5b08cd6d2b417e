"""A private mount namespace, and programs in it, none of which can take the test run down with it.

The law: nothing here follows a path into the mount from this process. Who does is a process of its own with
a time limit, and what the limit does not end, because it waits for a server that is gone, a forced unmount
does.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from protocol.outlet import MAX_HELD
from tests.files.fence import wait_landed

MOUNT_TYPE = "fuse.agentctl"

FORCE_DETACH = "import ctypes, sys; [ctypes.CDLL(None).umount2(path.encode(), 3) for path in sys.argv[1:]]"
"""umount(8) would look at what it unmounts; 3 is MNT_FORCE | MNT_DETACH."""

UNTIL_WE_END = ["setpriv", "--pdeathsig", "KILL"]
"""Before a command: it does not outlive a test run that was killed."""

IN_DIRECTORY = ["sh", "-c", 'cd "$1" && shift && exec "$@"', "sh"]


class Stuck(AssertionError):
    """A program did not end in time."""


@dataclass(frozen=True, slots=True)
class Finished:
    """How a program ended, and what it said."""

    status: int
    output: str
    errors: str


class Running:
    """A program that was started and goes on; its group is killed on leaving."""

    def __init__(self, argv: Sequence[str], **options: object) -> None:
        self.argv = argv
        self._files = contextlib.ExitStack()
        self._output = self._files.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
        self._errors = self._files.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
        self.process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=self._errors,
            start_new_session=True,
            **options,
        )  # type: ignore[call-overload]

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()
        self._files.close()

    def kill(self) -> bool:
        """Kill it and its children. False if it is still there after 3 s: it waits in the kernel."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        try:
            self.process.wait(3)
        except subprocess.TimeoutExpired:
            return False
        return True

    def wait(self, timeout: float) -> Finished:
        """Raises ``subprocess.TimeoutExpired``."""
        status = self.process.wait(timeout)
        return Finished(status, *self.said())

    def said(self) -> tuple[str, str]:
        texts = []
        for file in (self._output, self._errors):
            texts.append(os.pread(file.fileno(), 1 << 24, 0).decode(errors="backslashreplace"))
        return texts[0], texts[1]


class Namespace:
    """Mounts made in here, which all are below ``top``, are seen in here only. A sleeping process holds it."""

    def __init__(self, top: Path, kind: str = MOUNT_TYPE) -> None:
        self._top = top
        self._kind = kind

    def __enter__(self) -> Namespace:
        self._holder = subprocess.Popen(
            [
                *UNTIL_WE_END,
                "unshare",
                "--mount",
                "--propagation",
                "private",
                "sh",
                "-c",
                "echo ready; exec sleep infinity",
            ],
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == b"ready\n"
        return self

    def __exit__(self, *exception: object) -> None:
        self.force_unmount()
        self._holder.kill()
        self._holder.wait()
        assert self._holder.stdout is not None
        self._holder.stdout.close()

    def command(self, argv: Sequence[str]) -> list[str]:
        return [*UNTIL_WE_END, "nsenter", "--target", str(self._holder.pid), "--mount", "--", *argv]

    def mounts(self) -> list[tuple[str, str]]:
        """Where a filesystem of ours is mounted, and its options, oldest first. Not those it was born with."""
        found = []
        for line in Path(f"/proc/{self._holder.pid}/mounts").read_text().splitlines():
            _, path, kind, options, *_ = line.split(" ")
            if kind == self._kind and path.startswith(f"{self._top}/"):
                found.append((path.encode().decode("unicode_escape").encode("latin-1").decode(), options))
        return found

    def force_unmount(self) -> None:
        """Detach every mount of ours, and fail what waits for it."""
        paths = [path for path, _ in reversed(self.mounts())]
        if paths:
            subprocess.run(self.command([sys.executable, "-c", FORCE_DETACH, *paths]), timeout=30, check=True)

    def wait_landed(self) -> None:
        """Until what the guest was answered for is on the host; as long as the guest agent waits with what it says."""
        with contextlib.suppress(FileNotFoundError, TimeoutError):
            wait_landed(str(self._top / "fence"), MAX_HELD)

    def start(self, argv: Sequence[str], *, cwd: Path, env: Mapping[str, str] | None = None) -> Running:
        return Running(
            self.command([*IN_DIRECTORY, str(cwd), *argv]), cwd="/", env={**os.environ, **(env or {})}
        )

    def run(
        self,
        argv: Sequence[str],
        *,
        cwd: Path,
        timeout: float = 60,
        env: Mapping[str, str] | None = None,
        status: int | None = 0,
    ) -> Finished:
        """Run it to its end. Its exit status must be ``status``; None for any."""
        with self.start(argv, cwd=cwd, env=env) as running:
            try:
                finished = running.wait(timeout)
            except subprocess.TimeoutExpired:
                said = running.said()
                if not running.kill():
                    self.force_unmount()
                raise Stuck(f"{argv} did not end within {timeout:g} s; it said {said}") from None
        self.wait_landed()
        if status is not None and finished.status != status:
            raise AssertionError(
                f"{list(argv)} ended with {finished.status}\n{finished.output[-8000:]}\n{finished.errors[-8000:]}"
            )
        return finished
