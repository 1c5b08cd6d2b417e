"""An attached machine: whether it is reached, what it lacks, and what is in the way here."""

from __future__ import annotations

import shutil
from typing import Final

from host_agent import state
from host_agent.doctor import folders, instance, machine
from host_agent.doctor.finding import Finding, advice, ok, problem
from host_agent.errors import ExitCode
from host_agent.paths import Home, InstancePaths
from host_agent.remote.record import Attached
from protocol.api import Attachment, LinkState

MACHINE: Final = "machine"
SSH: Final = "ssh"


async def examine(home: Home, paths: InstancePaths, attached: Attached) -> list[Finding]:
    """All that can be found of one."""
    told = await instance.ask(paths)
    found = [machine.system(), machine.home(home, paths), _ssh(attached)]
    if told is None:
        return [*found, instance.at_rest(state.load(paths.state))]
    if isinstance(told, Finding):
        return [*found, told]
    found += [*_link(told.status.attached), *(advice(MACHINE, each) for each in told.status.warnings)]
    found += await folders.running(told.mounts)
    return [*found, *instance.ports(told.forwards)]


def _ssh(attached: Attached) -> Finding:
    """agentctl does not need it, but what it says of a machine is often to be tried with it."""
    if shutil.which("ssh"):
        return ok(SSH, f"to try the way there: ssh {attached.address}")
    return advice(SSH, "there is no ssh to try the way there with", "sudo apt-get install openssh-client")


def _link(link: Attachment | None) -> list[Finding]:
    if link is None:
        return []
    if link.link is LinkState.CONNECTED:
        return [ok(MACHINE, f"{link.address} is connected; there: {link.user}, Python {link.python}")]
    reason = link.reason or "it is just being connected"
    fix = link.hint or f"ssh {link.address}"
    return [problem(MACHINE, f"{link.address} is not reached: {reason}", fix, ExitCode.GUEST)]
