"""Both agents as processes (``tests.ports.agents``), the guest's in a network namespace of its own, with programs in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tests.bench import processes
from tests.e2e.harness import eventually

REPOSITORY = Path(__file__).parents[2]
SERVER = Path(__file__).with_name("server.py")


def unshare_command() -> list[str]:
    return ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--net"]


def permitted() -> bool:
    return not subprocess.run([*unshare_command(), "true"], capture_output=True, check=False).returncode


class Agent:
    """One of the two processes."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.pid = process.pid
        assert process.stdin is not None
        assert process.stdout is not None
        self._stdin, self._stdout = process.stdin, process.stdout

    def report(self) -> dict[str, Any]:
        self._stdin.write(b"\n")
        self._stdin.flush()
        answer: dict[str, Any] = json.loads(self._stdout.readline())
        return answer


class Programs:
    """What listens in the guest (``tests.ports.server``)."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._stdin, self._stdout = process.stdin, process.stdout

    def listen(self, first: int, count: int = 1) -> None:
        self._say("listen", first, count)

    def close(self, first: int, count: int = 1) -> None:
        self._say("close", first, count)

    def _say(self, word: str, first: int, count: int) -> None:
        self._stdin.write(f"{word} {first} {count}\n".encode())
        self._stdin.flush()
        assert self._stdout.readline() == b"done\n"


class Ports:
    """The two agents, joined, and what listens in the guest."""

    def __init__(self, host: Agent, guest: Agent, programs: Programs) -> None:
        self.host, self.guest, self.programs = host, guest, programs

    def states(self) -> dict[str, int]:
        states: dict[str, int] = self.host.report()["states"]
        return states

    def wait(self, **states: int) -> None:
        """Until there are these and no others."""
        eventually(lambda: self.states() == states, interval=0.2)


@contextmanager
def running(directory: Path) -> Iterator[Ports]:
    """``directory`` has a short name, for a socket."""
    path = directory / "control"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1"}
    agent = [sys.executable, "-W", "error", "-m", "tests.ports.agents"]
    with ExitStack() as stack:

        def start(*command: str) -> subprocess.Popen[bytes]:
            pipe = subprocess.PIPE
            process = processes.spawn(command, env=environment, stdin=pipe, stdout=pipe)
            stack.callback(processes.end, process)
            return process

        guest = start(*unshare_command(), *agent, "guest", str(path))
        eventually(path.exists)
        enter = ["nsenter", "--target", str(guest.pid), "--net"]
        if os.geteuid() != 0:
            enter += ["--user", "--preserve-credentials"]
        ports = Ports(
            Agent(start(*agent, "host", str(path))),
            Agent(guest),
            Programs(start(*enter, sys.executable, str(SERVER))),
        )
        eventually(lambda: ports.host.report()["sessions"] == 1 and ports.guest.report()["dumps"])
        yield ports
