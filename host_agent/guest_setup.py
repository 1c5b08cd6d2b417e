"""What the configuration wants to run in the VM, brought there: dockerd's settings, variables, the SSH agent.

The law: nothing here keeps a VM from starting. Each session's guest is told all of it, which costs nothing where
nothing has changed; what cannot be done is said, kept for ``status``, and the rest is done all the same.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

import trio

from host_agent import ssh_agent
from host_agent.guest_settings import GuestSettings
from host_agent.host_network import HostNetwork
from protocol.api import Effect, SocketForward, UseArchitectures, UseDockerSettings
from protocol.errors import LinkError, RpcError
from protocol.link import Link
from protocol.messages import clip

logger = logging.getLogger(__name__)

#: Seconds for the guest to judge dockerd's settings, and to restart it twice where it does not come back with them.
DOCKER_TIME = 450.0

DOCKER_NOTES = {
    Effect.RELOADED: "Docker has taken up its settings; containers run on",
    Effect.RESTARTED: "Docker was restarted for its settings; containers come back as their restart policies say",
}

#: Seconds for the guest to fetch emulators from Debian.
FOREIGN_TIME = 2000.0

#: How often it is asked for, if agents die under it.
ATTEMPTS = 3

LATER = "the VM is not there just now; it is told as soon as it is"

#: Changes what there is of agentctl's sockets in the guest.
UseSockets = Callable[[Sequence[SocketForward]], Awaitable[None]]


class GuestSetup:
    """Tells each session's guest. ``say`` publishes an event: a kind and a sentence."""

    def __init__(
        self,
        settings: GuestSettings,
        ssh_agent_link: Path,
        network: HostNetwork,
        say: Callable[[str, str], None],
    ) -> None:
        self._settings = settings
        self._ssh_agent_link = ssh_agent_link
        self._network = network
        self._say = say
        self._docker_problem = ""
        self._foreign_problems: list[str] = []
        self._nursery: trio.Nursery | None = None
        network.own = self._variables()

    @property
    def problems(self) -> list[str]:
        """What is not as it was asked for, in sentences."""
        return [*filter(None, [self._docker_problem]), *self._foreign_problems]

    @property
    def sockets(self) -> list[SocketForward]:
        """Those that the guest is to have of agentctl's own."""
        return [ssh_agent.forward(self._ssh_agent_link)] if self._settings.ssh_agent else []

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Tell those who come, until cancelled."""
        async with trio.open_nursery() as self._nursery:
            task_status.started()
            await trio.sleep_forever()

    def link_up(self, link: Link) -> None:
        """Tell a new session's guest, beside whatever else it is told."""
        assert self._nursery is not None
        self._nursery.start_soon(self._tell, link)

    async def change(self, settings: GuestSettings, link: Link | None, use_sockets: UseSockets) -> list[str]:
        """Have ``settings`` instead, now; what that did, and what it did not, in sentences."""
        before, self._settings = self._settings, settings
        self._network.own = self._variables()
        notes = []
        if before.ssh_agent != settings.ssh_agent:
            await use_sockets(self.sockets)
        if before.provision != settings.provision:
            notes.append("provision scripts run at the next start of the VM")
        try:
            if before.docker != settings.docker:
                notes += [LATER] if link is None else await self._told_docker(link)
            if before.architectures != settings.architectures:
                notes += [LATER] if link is None else await self._told_architectures(link)
            if (before.environment, before.ssh_agent) != (settings.environment, settings.ssh_agent):
                notes += [LATER] if link is None else await self._told_variables(link)
        except LinkError:
            notes.append(LATER)
        return list(dict.fromkeys(notes))

    async def use_architectures(self, session: Callable[[], Awaitable[Link]]) -> None:
        """Have the guest run programs of other architectures, if that is wanted; what it cannot is said.

        Needed once a boot. ``session`` waits for one.
        """
        if not self._settings.architectures:
            return
        names = ", ".join(self._settings.architectures)
        self._say(
            "foreign", f"preparing the VM for programs of {names}, which takes a download the first time"
        )
        for attempt in range(ATTEMPTS):
            try:
                for problem in await self._told_architectures(await session()):
                    self._say("foreign-failed", problem)
                return
            except LinkError as error:
                logger.warning("the guest was not told of architectures, attempt %d: %s", attempt + 1, error)
        self._foreign_problems = [
            f"the VM may not run programs of {names}: its agent was cut off {ATTEMPTS} times"
        ]

    async def _told_architectures(self, link: Link) -> list[str]:
        """What cannot be done, in sentences. Raises ``LinkError``."""
        try:
            used = await link.request(
                UseArchitectures(list(self._settings.architectures)), timeout=FOREIGN_TIME
            )
            self._foreign_problems = [clip(problem) for problem in used.problems]
        except RpcError as error:
            self._foreign_problems = [
                f"the VM runs no programs of other architectures: {clip(error.message)}"
            ]
        return self._foreign_problems

    async def _told_variables(self, link: Link) -> list[str]:
        problems = await self._network.told(link)
        return [*problems, "new shells have the variables; Docker has them after the next start of the VM"]

    async def _tell(self, link: Link) -> None:
        try:
            for note in await self._told_docker(link):
                self._say("docker-settings", note)
        except LinkError:
            return  # the next session's guest is told
        except Exception:  # a bug here is no reason to end a VM that is well
            logger.exception("the guest was not told of dockerd's settings")

    async def _told_docker(self, link: Link) -> list[str]:
        """What dockerd's settings did, in sentences. Raises ``LinkError``."""
        try:
            used = await link.request(UseDockerSettings(self._settings.docker), timeout=DOCKER_TIME)
        except RpcError as error:
            self._docker_problem = f"Docker's settings are not used: {clip(error.message)}"
        else:
            said = "; ".join(line.strip() for line in clip(used.details).splitlines() if line.strip())
            self._docker_problem = clip(f"{used.problem}: {said}" if said else used.problem)
            if used.effect in DOCKER_NOTES:
                return [DOCKER_NOTES[used.effect]]
        return [*filter(None, [self._docker_problem])]

    def _variables(self) -> Mapping[str, str]:
        of_agent = {ssh_agent.VARIABLE: ssh_agent.GUEST_SOCKET} if self._settings.ssh_agent else {}
        return {**of_agent, **dict(self._settings.environment)}
