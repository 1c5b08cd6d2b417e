"""The instance: whether it runs, and what it knows of itself that its user might not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import trio

from host_agent import state
from host_agent.client import RESTART_TIME, all_forwards, connected
from host_agent.doctor.finding import Finding, advice, of_error, ok, problem
from host_agent.errors import ExitCode, UserError
from host_agent.paths import InstancePaths
from host_agent.state import InstanceState
from protocol.api import (
    ControlLink,
    Forward,
    ForwardState,
    GetMounts,
    GetStatus,
    InstanceStatus,
    Mount,
    Stage,
    Transport,
)
from protocol.errors import RpcError

TOPIC: Final = "instance"
PORTS: Final = "ports"
CONTROL: Final = "control link"
ANSWER_TIME: Final = 20.0
"""Seconds for a host agent that is there."""

_NAMED: Final = 5
"""Ports that are named one by one."""


@dataclass(frozen=True, slots=True)
class Told:
    """What a host agent has said."""

    status: InstanceStatus
    mounts: tuple[Mount, ...]
    forwards: tuple[Forward, ...]


async def ask(paths: InstancePaths) -> Told | Finding | None:
    """None: the instance does not run. A ``Finding``: its host agent does not answer as it should."""
    if not state.is_locked(paths.lock):
        return None
    try:
        with trio.fail_after(ANSWER_TIME):
            async with connected(paths, patience=RESTART_TIME) as link:
                status = await link.request(GetStatus())
                mounts = await link.request(GetMounts())
                return Told(status, tuple(mounts.mounts), tuple(await all_forwards(link)))
    except UserError as error:
        return of_error(TOPIC, error)
    except (RpcError, trio.TooSlowError) as error:
        return problem(
            TOPIC,
            f"its host agent does not answer as it should{f': {error}' if str(error) else ''}",
            "agentctl stop --force, then agentctl up",
        )


def at_rest(last: InstanceState) -> Finding:
    """How it ended is told; it says nothing of the next time."""
    if last.failure:
        return advice(
            TOPIC, f"it does not run, and ended by itself: {last.failure}", last.hint or "agentctl up"
        )
    return ok(TOPIC, "it does not run")


def running(told: Told) -> list[Finding]:
    status = told.status
    bulk = f"no memory is shared with the VM: {status.bulk_reason}"
    of_bulk = [advice("bulk data", bulk)] if status.bulk_reason and status.qemu_pid else []
    return [*of_bulk, *_control(status.control), _health(status), *ports(told.forwards)]


def _control(control: ControlLink | None) -> list[Finding]:
    """A link that is not what a VM has."""
    if control is None or control.transport is Transport.VIRTIO_SERIAL:
        return []
    if control.transport is Transport.SSH:
        said = f"it goes over SSH: {control.reason}"
        return [advice(CONTROL, said, "it returns by itself; if it does not: agentctl restart")]
    if not control.problem:  # away for a moment
        return []
    said = f"{control.reason}; nor over SSH: {control.problem}"
    return [advice(CONTROL, said, control.hint or "agentctl restart")]


def _health(status: InstanceStatus) -> Finding:
    said = status.detail or status.stage.value
    if status.hint or status.stage in (Stage.FAILED, Stage.STOPPED):
        code = ExitCode.DOCKER if status.stage is Stage.DOCKER else ExitCode.GENERAL
        return problem(TOPIC, said, status.hint, code)
    if status.stage is not Stage.RUNNING:
        return ok(TOPIC, said)
    if not status.guest_connected:
        return problem(TOPIC, "the VM does not answer", "agentctl logs --component console", ExitCode.GUEST)
    if status.guest_digest != status.host_digest:
        return advice(TOPIC, "the VM is of another version of agentctl", "agentctl stop && agentctl up")
    return ok(TOPIC, "it runs, and the VM answers")


def ports(forwards: Sequence[Forward]) -> list[Finding]:
    """Those that are not where they should be, each with its reason, which says what to do."""
    wrong = [row for row in forwards if row.state in (ForwardState.CONFLICT, ForwardState.DENIED)]
    found = [advice(PORTS, *_reason(row)) for row in wrong[:_NAMED]]
    if len(wrong) > _NAMED:
        found.append(advice(PORTS, f"and {len(wrong) - _NAMED} more", "see: agentctl ports"))
    return found


def _reason(row: Forward) -> tuple[str, str]:
    """The reason's own words: a sentence, and what comes behind its first semicolon."""
    sentence, _, rest = row.reason.partition("; ")
    return sentence or row.state.value, rest or "see: agentctl ports"
