"""An instance that does not run, told from what it left behind."""

from __future__ import annotations

from dataclasses import replace

from host_agent import docker_context, state
from host_agent.configuration import config as configuration
from host_agent.disk_room import allocated
from host_agent.paths import InstancePaths
from host_agent.remote import record
from protocol import build
from protocol.api import Attachment, InstanceStatus, LinkState, Stage
from provision.recipe import CONTAINERD


def status(paths: InstancePaths) -> InstanceStatus:
    """How it is: stopped, or failed and why. One that was never started is stopped."""
    if (attached := record.load(paths)) is not None:
        return _machine(paths, attached)
    config = configuration.load(paths, configuration.Host.measure())
    last = state.load(paths.state)
    stage, detail, hint = Stage.STOPPED, "start it: agentctl up", ""
    if last.failure:
        stage, detail, hint = Stage.FAILED, last.failure, last.hint
    elif last.wanted:
        from host_agent.process import ProcessIdentity  # which imports trio, and `status` is to be quick

        stage, detail, hint = Stage.FAILED, "the host agent was killed", "start it again: agentctl up"
        if ProcessIdentity.read(paths.qemu_identity):
            detail, hint = "the host agent was killed, and the VM runs on", "take it over again: agentctl up"
    containerd = config.runtime == CONTAINERD
    return replace(
        without_agent(paths, stage, detail, hint),
        accelerator=last.accelerator or config.accelerator,
        cpus=config.cpus,
        memory=config.memory,
        disk=config.disk,
        started_at=last.started_at,
        restarts=last.boot_restarts,
        docker_socket="" if containerd else str(paths.docker_socket),
        docker_context="" if containerd else docker_context.context_name(paths.name),
        disk_allocated=allocated(paths.data_disk),
        runtime=config.runtime,
        containerd_socket=str(paths.containerd_socket) if containerd else "",
    )


def _machine(paths: InstancePaths, attached: record.Attached) -> InstanceStatus:
    """One that is not attached now."""
    last = state.load(paths.state)
    stage, detail, hint = Stage.STOPPED, f"attach it: agentctl attach {paths.name}", ""
    if last.failure:
        stage, detail, hint = Stage.FAILED, last.failure, last.hint
    elif last.wanted:
        stage, detail = Stage.FAILED, "the host agent was killed"
        hint = f"attach it again: agentctl attach {paths.name}"
    return replace(
        without_agent(paths, stage, detail, hint),
        started_at=last.started_at,
        runtime="",
        attached=Attachment(attached.address, LinkState.LOST, keep=attached.keep),
    )


def without_agent(paths: InstancePaths, stage: Stage, detail: str, hint: str) -> InstanceStatus:
    """What can be said of an instance of which no host agent tells anything."""
    return InstanceStatus(
        name=paths.name,
        stage=stage,
        detail=detail,
        hint=hint,
        accelerator="",
        cpus=0,
        memory=0,
        disk=0,
        image="",
        qemu_pid=0,
        agent_pid=0,
        started_at=0.0,
        restarts=0,
        guest_connected=False,
        guest_digest="",
        host_digest=build.digest(),
        docker_socket="",
        docker_context="",
    )
