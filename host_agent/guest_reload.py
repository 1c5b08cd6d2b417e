"""What ``up`` does for what is to run in the guest of an instance that runs already."""

from __future__ import annotations

from host_agent.client import RESTART_TIME, connected
from host_agent.configuration import config as configuration
from host_agent.configuration.config import InstanceConfig
from host_agent.errors import UserError
from host_agent.paths import InstancePaths
from protocol.api import GetStatus, ReloadSettings
from protocol.errors import ErrorCode, RemoteFailure

OLDER = (
    "the running instance is of an older agentctl: stop it, and start it again, to change what runs in the VM"
)


async def apply(paths: InstancePaths, config: InstanceConfig) -> tuple[str, ...]:
    """Have ``config``, which is in the file, in an instance that runs.

    Returns what that did, and what of the guest is not as it was asked for, in sentences. Raises ``UserError``.
    """
    kept = configuration.load_kept(paths.running_config)
    notes: list[str] = []
    async with connected(paths, patience=RESTART_TIME) as link:
        if kept is not None and config.guest != kept.guest:
            try:
                notes += (await link.request(ReloadSettings(), timeout=None)).notes
            except RemoteFailure as error:
                if error.code is not ErrorCode.UNSUPPORTED:
                    raise UserError(error.message, error.hint) from None
                notes.append(OLDER)
        notes += (await link.request(GetStatus())).warnings
    return tuple(dict.fromkeys(notes))
