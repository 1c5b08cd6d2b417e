"""The host's network as the guest finds it: names, proxies and trusted certificates.

The law: nothing here keeps a VM from starting. What cannot be had is said, and the guest does without.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping

import trio

from host_agent import proxies, trust
from host_agent.dns_server import DnsServer
from host_agent.network_settings import NONE, NetworkSettings
from host_agent.proxies import Proxies
from host_agent.resolver import HOST_NAMES, Resolver
from protocol.api import UseHostNetwork
from protocol.errors import LinkError, RpcError
from protocol.link import Link
from protocol.messages import clip
from provision.machine import GUEST_ADDRESS, HOST_ADDRESS, NAME_SERVER_ADDRESS

logger = logging.getLogger(__name__)

#: Seconds for the guest to take it all: some processes, each of which takes a second there when all else starts, too.
APPLY_TIME = 30.0

NOT_USED = "the VM does not use this machine's network settings"

#: Sentences of a guest's that are passed on.
MAX_PROBLEMS = 8


class HostNetwork:
    """Serves the guest's DNS, and tells each session's guest what it is to use.

    ``environment`` is that of ``agentctl up``, which the host agent has inherited; ``say`` publishes an event.
    ``own``, which may be replaced, are variables of the guest's besides those of the network; they win.
    """

    def __init__(
        self,
        settings: NetworkSettings,
        guest_name: str,
        say: Callable[[str, str], None],
        environment: Mapping[str, str] = os.environ,
    ) -> None:
        self._settings = settings
        self._guest_name = guest_name
        self._say = say
        self._environment = environment
        self.own: Mapping[str, str] = {}
        self._resolver = Resolver(settings, HOST_ADDRESS)
        self._port = 0
        self._nursery: trio.Nursery | None = None

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Answer DNS queries until cancelled. Started once that can be said to the guest, or is given up."""
        async with trio.open_nursery() as self._nursery:
            await self._nursery.start(self._resolver.run)
            try:
                self._port = await self._nursery.start(DnsServer(self._resolver.answer).run)
            except OSError as error:
                self._say(
                    "network", f"the VM asks QEMU for names: no port for a DNS server: {error.strerror}"
                )
            task_status.started()
            await trio.sleep_forever()

    def link_up(self, link: Link) -> None:
        """Tell a new session's guest, beside whatever else it is told, and say what of it could not be done."""
        assert self._nursery is not None
        self._nursery.start_soon(self._tell, link)

    async def _tell(self, link: Link) -> None:
        try:
            problems = await self.told(link)
        except LinkError:
            return  # the next session's guest is told
        except Exception:  # a bug here is no reason to end a VM that is well
            logger.exception("the guest was not told of the network")
            problems = [f"{NOT_USED}: an error of agentctl's, see: agentctl logs"]
        for problem in problems:
            self._say("network", problem)

    async def told(self, link: Link) -> list[str]:
        """Tell the guest; what could not be done, in sentences. Raises ``LinkError``."""
        variables = self._variables()
        trusted = await trio.to_thread.run_sync(trust.collect, self._settings.certificates, self._environment)
        request = UseHostNetwork(
            name_server=NAME_SERVER_ADDRESS,
            host=HOST_ADDRESS,
            dns_port=self._port,
            environment={**variables.environment, **self.own},
            certificates=list(trusted.certificates),
        )
        problems = [*variables.problems, *trusted.problems]
        try:
            answer = await link.request(request, timeout=APPLY_TIME)
            problems += [clip(problem) for problem in answer.problems[:MAX_PROBLEMS]]
        except RpcError as error:
            problems.append(f"{NOT_USED}: {clip(error.message)}")
        return problems

    def _variables(self) -> Proxies:
        wanted = self._settings.proxies
        if wanted == NONE:
            return Proxies({})
        chosen = self._environment if isinstance(wanted, str) else dict(wanted)
        direct = ("localhost", "127.0.0.1", "::1", self._guest_name, GUEST_ADDRESS, *HOST_NAMES, HOST_ADDRESS)
        return proxies.of(chosen, HOST_ADDRESS, direct)
