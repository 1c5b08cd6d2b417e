"""The keeper: a process of an instance that does one thing, start its host agent again when it dies.

    python -m host_agent.keeper DIRECTORY --lock-fd FD [--adopt PID --alive-fd FD --store-fds FD,FD,FD,FD]
                                          [--answers-fd FD]

The law: it knows nothing of VMs, ports or Docker, so that there is next to nothing in it that could
fail. It and the host agent watch each other: the agent holds the read end of a pipe whose write end
dies with the keeper, and starts a new keeper that adopts it. Both hold the instance's lock (one open
file description), so the instance counts as alive as long as either does.

What the files plane must not lose with a host agent (``descriptor_store``) is in the queues of sockets that the
keeper makes, has open and never looks at; keeper and host agent give them to each successor of the other. So do they
with what a user has answered on the way to an attached machine (``remote.answers``), which is nowhere else.

QEMU, the host agent's child, becomes the keeper's when the agent dies (it is a subreaper), which only
reaps it: the next host agent finds it by its recorded identity.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from host_agent import state
from host_agent.cleanup import clean_up, remember
from host_agent.paths import InstancePaths

#: A host agent that dies this often within the window has a fault that starting it again does not cure.
MAX_STARTS = 8
WINDOW = 60.0

#: Delay before the second start within the window, doubling: 0.05 s, 0.1 s ... 3.2 s.
FIRST_DELAY = 0.05

#: The host agent of a VM, and that of a machine that is attached.
VM_AGENT = "host_agent.daemon"
ATTACHED_AGENT = "host_agent.remote.daemon"

_PR_SET_CHILD_SUBREAPER = 36


def spawn(
    paths: InstancePaths,
    lock: int,
    *,
    adopt: int | None = None,
    alive: int | None = None,
    store: Sequence[int] = (),
    answers: int | None = None,
) -> None:
    """Start a keeper in a session of its own, which outlives us. It holds ``lock`` (a descriptor).

    With ``adopt`` it watches over that running host agent, ``alive`` being the write end of the pipe
    that tells the agent that its keeper lives, and ``store`` what the agent had from the keeper before.
    ``answers`` is for each host agent.
    """
    command = [sys.executable, "-m", "host_agent.keeper", str(paths.directory), "--lock-fd", str(lock)]
    descriptors = [lock]
    if adopt is not None and alive is not None:
        command += ["--adopt", str(adopt), "--alive-fd", str(alive)]
        descriptors.append(alive)
    if store:
        command += ["--store-fds", written(store)]
        descriptors += store
    if answers is not None:
        command += ["--answers-fd", str(answers)]
        descriptors.append(answers)
    with paths.agent_log.open("ab") as log:
        # Two generations: the keeper is nobody's child, so nobody has to reap it. The session is the
        # keeper's own, so a ^C in the terminal of `up` does not reach it.
        middle = subprocess.Popen(
            [sys.executable, "-c", _DETACH, *command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=descriptors,
            start_new_session=True,
            cwd="/",
            env=_environment(),
        )
        middle.wait()


_DETACH = """
import os, sys
if os.fork() == 0:
    os.execv(sys.argv[1], sys.argv[1:])
"""


def written(descriptors: Sequence[int]) -> str:
    """Descriptors as a word of a command line."""
    return ",".join(map(str, descriptors))


def read(word: str) -> list[int]:
    """The descriptors of such a word."""
    return [int(number) for number in word.split(",") if number]


def make_store() -> list[int]:
    """Two socket pairs, as ``descriptor_store`` uses them; none where they could not be used."""
    if sys.platform != "linux":
        return []
    pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2)]
    return [end.detach() for pair in pairs for end in pair]


def _environment() -> dict[str, str]:
    """Ours, with the packages found where we found them (a checkout that is not installed, too)."""
    environment = dict(os.environ)
    root = str(Path(__file__).parent.parent)
    paths = [root, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    environment["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    return environment


class Keeper:
    """Keeps one host agent running until it is no longer wanted."""

    def __init__(
        self, paths: InstancePaths, lock: int, store: Sequence[int] = (), answers: int | None = None
    ) -> None:
        self._paths = paths
        self._lock = lock
        self._store = store
        self._answers = answers
        self._starts: list[float] = []

    def run(self, adopted: int | None = None, alive: int | None = None) -> int:
        """Return the exit status when there is nothing left to keep."""
        if adopted is not None:
            _wait_for_stranger(adopted)
            if alive is not None:
                os.close(alive)
        elif self._run_agent() == 0:
            return 0
        while state.load(self._paths.state).wanted:
            if not self._may_start_again():
                self._give_up()
                return 1
            self._count_restart()
            if self._run_agent() == 0:
                return 0
        return 0

    def _run_agent(self) -> int:
        """Run a host agent to its end; its exit status, negative for a signal."""
        reader, writer = os.pipe()
        program = ATTACHED_AGENT if self._paths.attached.exists() else VM_AGENT
        command = [sys.executable, "-m", program, str(self._paths.directory)]
        command += ["--lock-fd", str(self._lock), "--keeper-fd", str(reader)]
        command += ["--store-fds", written(self._store)]
        inherited = [self._lock, reader, *self._store]
        if self._answers is not None:
            command += ["--answers-fd", str(self._answers)]
            inherited.append(self._answers)
        agent = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=inherited)
        os.close(reader)
        try:
            # Told to subprocess, too, which would otherwise go on waiting for this pid, whoever has it then.
            agent.returncode = _reap_until(agent.pid)
        finally:
            os.close(writer)
        return agent.returncode

    def _may_start_again(self) -> bool:
        now = time.monotonic()
        self._starts = [start for start in self._starts if now - start < WINDOW]
        if len(self._starts) >= MAX_STARTS:
            return False
        if self._starts:
            time.sleep(FIRST_DELAY * 2 ** (len(self._starts) - 1))
        self._starts.append(time.monotonic())
        return True

    def _count_restart(self) -> None:
        remember(self._paths, agent_restarts=state.load(self._paths.state).agent_restarts + 1)

    def _give_up(self) -> None:
        """Nothing is left running: a VM without a host agent is of no use to anybody."""
        print(f"keeper: the host agent died {MAX_STARTS} times in {WINDOW:.0f} s", file=sys.stderr)
        from host_agent.vm import kill_recorded

        kill_recorded(self._paths.qemu_identity)
        failure = f"the host agent died {MAX_STARTS} times in {WINDOW:.0f} s"
        remember(self._paths, wanted=False, failure=failure, hint="see: agentctl logs")
        clean_up(self._paths)


def _reap_until(wanted: int) -> int:
    """Reap children, QEMU orphans among them, until ``wanted`` ends; its status as subprocess has it."""
    while True:
        pid, status = os.wait()
        if pid == wanted:
            return os.waitstatus_to_exitcode(status)


def _wait_for_stranger(pid: int) -> None:
    """Wait for the end of a process that is not our child."""
    try:
        descriptor = os.pidfd_open(pid)
    except (AttributeError, OSError):
        # Not Linux, or gone already: signal 0 asks whether it is there.
        with contextlib.suppress(OSError):
            while True:
                os.kill(pid, 0)
                time.sleep(0.2)
        return
    select.select([descriptor], [], [])
    os.close(descriptor)


def become_subreaper() -> None:
    """Orphans below us become our children (prctl(2)); elsewhere than on Linux init takes them."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def main() -> int:
    parser = argparse.ArgumentParser(prog="agentctl-keeper")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--lock-fd", type=int, required=True)
    parser.add_argument("--adopt", type=int)
    parser.add_argument("--alive-fd", type=int)
    parser.add_argument("--store-fds", type=read)
    parser.add_argument("--answers-fd", type=int)
    arguments = parser.parse_args()
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    become_subreaper()
    store = make_store() if arguments.store_fds is None else arguments.store_fds
    keeper = Keeper(InstancePaths(arguments.directory), arguments.lock_fd, store, arguments.answers_fd)
    return keeper.run(arguments.adopt, arguments.alive_fd)


if __name__ == "__main__":
    sys.exit(main())
