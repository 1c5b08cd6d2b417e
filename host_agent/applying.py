"""A configuration, made so in an instance that runs, as far as that can be: by ``up``, and by who changes the file.

The law: what can be had at once is had at once, what needs a restart is said, and nothing is taken away from under
containers that may be using it.
"""

from __future__ import annotations

from dataclasses import replace

from host_agent import groups, guest_reload, host_side, mounts
from host_agent.bulk_memory import NOT_WANTED
from host_agent.client import RESTART_TIME, connected
from host_agent.configuration import config as configuration
from host_agent.configuration import keys as config_keys
from host_agent.configuration.config import Host, InstanceConfig
from host_agent.disk_requests import grow_while_running
from host_agent.errors import UserError
from host_agent.paths import InstancePaths
from protocol.api import (
    AddMounts,
    ChangePorts,
    ChangeSocketForwards,
    GetMounts,
    GetPortSettings,
    GetSocketForwards,
    InstanceStatus,
    Mounts,
    MountState,
    PortSettings,
)
from protocol.errors import AgentctlProtocolError, ErrorCode, RemoteFailure

#: What has an instance begin anew with what is in its file.
RESTART = "agentctl restart"


def apply(
    paths: InstancePaths, running: InstanceStatus, config: InstanceConfig, restart: str = RESTART
) -> tuple[str, ...]:
    """Make of ``config`` what can be made of it in an instance that runs; the rest, which waits for a restart, and what
    went wrong are sentences. ``restart`` is what to type for it.
    """
    warnings = (
        *host_side.arrange(paths, config),
        *groups.run(guest_reload.apply, paths, config),
        *groups.run(mount_more, paths, config, restart),
        *groups.run(change_ports, paths, config),
        *groups.run(change_sockets, paths, config),
        *(groups.run(grow_while_running, paths, config.disk) if _is_to_grow(config, running) else ()),
    )
    if waiting := waiting_for_restart(paths, running, config):
        warnings = (
            *warnings,
            f"the instance is already running; {', '.join(waiting)} stay as they are until you restart it:"
            f" {restart}",
        )
    return warnings


def _is_to_grow(config: InstanceConfig, running: InstanceStatus) -> bool:
    return running.attached is None and config.disk != running.disk


def waiting_for_restart(
    paths: InstancePaths, running: InstanceStatus, config: InstanceConfig
) -> tuple[str, ...]:
    """The keys of ``config`` that are not yet as they are in the instance that runs."""
    if running.attached is not None:
        return ()  # these are of VMs
    kept = configuration.load_kept(paths.running_config) or config
    # An agent that came after a killed one has read the file again; the VM still is as it was started.
    current = replace(
        kept,
        cpus=running.cpus,
        memory=running.memory,
        # Not whether it has any: that is not always for the asking.
        bulk=running.bulk_reason != NOT_WANTED,
    )
    return tuple(
        key.name
        for name, key in config_keys.keys().items()
        if key.restart and getattr(config, name) != getattr(current, name)
    )


async def change_ports(paths: InstancePaths, config: InstanceConfig) -> tuple[str, ...]:
    """Apply what flags said of ports, and the rules of the file, to an instance that runs."""
    wanted = config.ports
    try:
        async with connected(paths, patience=RESTART_TIME) as link:
            current = await link.request(GetPortSettings())
            # Of the file as it is now: another command may have added a rule since we read it.
            there = paths.config.exists() or paths.old_config.exists()
            rules = configuration.load(paths, Host.measure()).ports.rules if there else current.rules
            wanted = replace(wanted, rules=rules)
            if current != wanted:
                await link.request(
                    ChangePorts(
                        add=wanted.rules,
                        remove=[rule for rule in current.rules if rule not in wanted.rules],
                        lan=wanted.lan,
                        privileged_offset=wanted.privileged_offset,
                    )
                )
    except RemoteFailure as error:
        if error.code is not ErrorCode.UNSUPPORTED:
            raise UserError(error.message, error.hint) from None
        if wanted != PortSettings():
            return (
                "the running instance is of an older agentctl: stop it, and start it again, to move ports",
            )
    return ()


async def change_sockets(paths: InstancePaths, config: InstanceConfig) -> tuple[str, ...]:
    """Apply the sockets of the file to an instance that runs."""
    if not paths.config.exists():
        return ()
    try:
        async with connected(paths, patience=RESTART_TIME) as link:
            current = [row.forward for row in (await link.request(GetSocketForwards())).rows]
            # Of the file as it is now: another command may have added one since we read it.
            wanted = list(configuration.load(paths, Host.measure()).sockets)
            add = [forward for forward in wanted if forward not in current]
            remove = [forward for forward in current if forward not in wanted]
            if add or remove:
                await link.request(ChangeSocketForwards(add, remove))
    except RemoteFailure as error:
        if error.code is not ErrorCode.UNSUPPORTED:
            raise UserError(error.message, error.hint) from None
        if config.sockets:
            return (
                "the running instance is of an older agentctl: stop it, and start it again, to forward sockets",
            )
    return ()


async def mount_more(paths: InstancePaths, config: InstanceConfig, restart: str = RESTART) -> tuple[str, ...]:
    """Mount what is not mounted yet in an instance that runs; what only a restart changes is a warning."""
    try:
        async with connected(paths, patience=RESTART_TIME) as link:
            current = await link.request(GetMounts())
            change = mounts.compare((mount.spec for mount in current.mounts), config.mounts)
            if change.added:
                current = await link.request(AddMounts(list(change.added)))
    except RemoteFailure as error:
        if error.code is not ErrorCode.UNSUPPORTED:
            raise UserError(error.message, error.hint) from None
        return (
            "the running instance is of an older agentctl: stop it, and start it again, to mount folders",
        )
    later = (
        (f"{', '.join(change.later)}: unchanged until you restart the instance: {restart}",)
        if change.later
        else ()
    )
    return (*later, *_mount_warnings(current))


def _mount_warnings(current: Mounts) -> tuple[str, ...]:
    """One for each folder that the VM was to see and does not, or of which it sees another one."""
    strayed = mounts.strayed([mount.spec for mount in current.mounts])
    return tuple(
        f"{mount.spec.guest_path}{'' if mount.state is MountState.MOUNTED else ' is not mounted'}: {mount.reason}"
        + (f" ({mount.hint})" if mount.hint else "")
        for mount in current.mounts
        if mount.state is not MountState.MOUNTED or (mount.reason and mount.spec.guest_path in strayed)
    )


async def mounts_after_start(paths: InstancePaths) -> tuple[str, ...]:
    """The warnings about the mounts of an instance that has just been started."""
    try:
        async with connected(paths, patience=RESTART_TIME) as link:
            return _mount_warnings(await link.request(GetMounts()))
    except (UserError, AgentctlProtocolError):
        return ()  # whoever ended it in this moment knows more than we do
