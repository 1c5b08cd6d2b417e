"""Which of the guest's units that Docker needs have failed, so that nobody waits for what will not come."""

from __future__ import annotations

import logging

import trio

from host_agent import guest_process
from host_agent.forwarders import Dial
from protocol.api import Exec
from protocol.errors import AgentctlProtocolError

logger = logging.getLogger(__name__)

#: How often the guest is asked while Docker is waited for, seconds: each answer costs a process there.
CHECK_INTERVAL = 10.0

#: More than the names of all its units would take; a guest that says more is not listened to.
MAX_ANSWER = 64 * 1024

#: What a failed unit means to the user: a sentence and a hint, the first cause first.
NEEDED = {
    "agentctl-data.service": (
        "the VM could not mount its data disk",
        "see: agentctl logs --component guest",
    ),
    "containerd.service": ("containerd did not start in the VM", "see: agentctl logs --component docker"),
    "docker.service": ("Docker did not start in the VM", "see: agentctl logs --component docker"),
    "podman.service": ("podman did not start in the VM", "see: agentctl logs --component docker"),
}

_COMMAND = ["systemctl", "list-units", "--state=failed", "--plain", "--no-legend", "--no-pager"]


async def wait_for_failure(dial: Dial) -> tuple[str, str]:
    """Return the sentence and the hint of the first unit that fails; wait while none does."""
    while True:
        failed = await _failed(dial)
        for unit, explanation in NEEDED.items():
            if unit in failed:
                return explanation
        await trio.sleep(CHECK_INTERVAL)


async def _failed(dial: Dial) -> set[str]:
    try:
        output = await run_in_guest(dial, _COMMAND)
    except (AgentctlProtocolError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
        logger.info("the guest's units could not be asked for: %s", error)
        return set()
    return {line.split()[0] for line in output.decode(errors="replace").splitlines() if line.strip()}


async def run_in_guest(dial: Dial, argv: list[str]) -> bytes:
    """What a command, run as root, writes to its standard output; its status does not matter.

    Raises what ``dial`` raises, ``trio.BrokenResourceError``, or ``DecodeError`` for nonsense.
    """
    output = bytearray()

    def keep(data: bytes, is_error: bool) -> None:
        if not is_error:
            output.extend(data[: MAX_ANSWER - len(output)])

    await guest_process.run(dial, Exec(argv=argv, user="root"), keep)
    return bytes(output)
