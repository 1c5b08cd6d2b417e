"""Copies that are cut off in the middle, of a VM and of an attached machine alike.

The command is stopped (SIGSTOP) nearly all of the time, and runs for moments until enough has come: so what happens to it
then happens in the middle of a copy, however fast or slow the machines are.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import trio

from host_agent.client import RESTART_TIME, connected
from host_agent.paths import InstancePaths
from protocol.api import GetUsage
from tests.e2e.harness import Instance, eventually

SIZE = 48 << 20
ENOUGH = 4 << 20
#: Of the ends of records and pieces, and of what was under way.
SLACK = 1 << 20
#: Of what was on its way to the command when it was stopped.
UNDER_WAY = 16 << 20
#: Seconds that it runs before it is looked at again, which takes longer; until something came, and from then on.
UNTIL_BEGUN = 0.1
MOMENT = 0.02

PART_SIZE = "cat %s/.agentctl-part-* 2>/dev/null | wc -c"


def noise(path: Path) -> Path:
    with path.open("wb") as file:
        for _ in range(SIZE >> 20):
            file.write(os.urandom(1 << 20))
    return path


def carried(instance: Instance) -> tuple[int, int]:
    """Bytes that its connections have brought, and taken there."""

    async def ask() -> tuple[int, int]:
        async with connected(InstancePaths(instance.directory), patience=RESTART_TIME) as link:
            usage = await link.request(GetUsage())
            return usage.received, usage.sent

    return trio.run(ask)


def here(folder: Path) -> int:
    """The size of the parts in it."""
    return sum(path.stat().st_size for path in folder.glob(".agentctl-part-*"))


@contextmanager
def in_the_middle(
    instance: Instance, source: str, destination: str, came: Callable[[], int]
) -> Iterator[subprocess.Popen[bytes]]:
    """``agentctl cp``, stopped when some of it came and most did not; it is let go on at the end."""
    words = ("cp", source, destination)
    with instance.popen(*words, stdin=subprocess.DEVNULL) as process:
        try:

            def enough() -> bool:
                nonlocal moment
                process.send_signal(signal.SIGCONT)
                time.sleep(moment)
                process.send_signal(signal.SIGSTOP)
                assert process.poll() is None, "it was over before it was stopped"
                there = came()
                moment = MOMENT if there else UNTIL_BEGUN
                return there >= ENOUGH

            moment = UNTIL_BEGUN
            eventually(enough, 240, 0)
            yield process
            process.send_signal(signal.SIGCONT)
        except BaseException:
            process.kill()
            raise


def goes_on_when_it_is_called_again(
    instance: Instance, folder: Path, there: str, came: Callable[[], int]
) -> None:
    """Into the instance, to its empty folder ``there``, whose parts are ``came`` bytes: only the rest is sent."""
    source = noise(folder / "noise")
    with in_the_middle(instance, str(source), f"{instance.name}:{there}", came) as process:
        process.send_signal(signal.SIGINT)
    assert process.returncode == 130
    kept = eventually(came)
    assert ENOUGH <= kept < SIZE, "else there was nothing to go on with"
    _, before = carried(instance)
    done = instance.agentctl("cp", str(source), f"guest:{there}", timeout=240)
    assert done.stdout + done.stderr == b"", "it is no terminal"
    _, after = carried(instance)
    assert SIZE - kept <= after - before < SIZE - kept + SLACK
    # What is whole is not sent again.
    instance.agentctl("cp", str(source), f"guest:{there}", timeout=240)
    assert carried(instance)[1] - after < SLACK


def goes_on_by_itself(instance: Instance, folder: Path, there: str, cut: Callable[[], None]) -> None:
    """Out of the instance, of its file ``there``; ``cut`` ends the connection, which comes back."""
    with in_the_middle(instance, f"guest:{there}", str(folder), lambda: here(folder)) as process:
        came = here(folder)
        assert came < SIZE
        cut()
        before, _ = carried(instance)
    assert process.returncode == 0
    assert SIZE - came - UNDER_WAY < carried(instance)[0] - before < SIZE - came + UNDER_WAY
    assert here(folder) == 0
