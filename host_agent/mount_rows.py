"""A mount as the user is told of it: one row of ``agentctl mounts``, from what the host and the guest say of it.

The law: the host's word (missing, denied, full) comes before the guest's, and whoever says it better than this page is
believed; but in every row the words are few enough for all rows to fit into one frame.
"""

from __future__ import annotations

import shlex

from fileserver.control import GuestStage, ShareStage, ShareState
from protocol.api import Mount, MountSpec, MountState

#: Characters of an explanation in a row: MAX_MOUNTS rows with their paths fit into one frame.
MAX_WORDS = 512

LOGS_HINT = "see: agentctl logs --component files"

_OF_HOST = {
    ShareStage.MISSING: MountState.MISSING,
    ShareStage.DENIED: MountState.DENIED,
    ShareStage.NOT_A_DIRECTORY: MountState.NOT_A_DIRECTORY,
    ShareStage.FULL: MountState.FULL,
}
_OF_GUEST = {
    GuestStage.WAITING: MountState.WAITING,
    GuestStage.MOUNTED: MountState.MOUNTED,
    GuestStage.FAILED: MountState.FAILED,
}

#: Of these it matters more that it is not the folder which the user thinks of.
_OF_THE_FOLDER = (MountState.MOUNTED, MountState.MISSING, MountState.DENIED, MountState.NOT_A_DIRECTORY)

#: What a state means where nobody says it better; {} is the folder on the host.
_MEANING = {
    MountState.MOUNTED: ("", ""),
    MountState.WAITING: ("the VM has not mounted it yet", ""),
    MountState.MISSING: ("{} is missing on the host", "once it is there again, so is the mount"),
    MountState.DENIED: ("the host does not let you into {}", "see: ls -ld {}"),
    MountState.NOT_A_DIRECTORY: ("{} is not a folder any more", "see: ls -ld {}"),
    MountState.FULL: ("the host's disk is full at {}", "make room: df -h {}"),
    MountState.FAILED: ("the VM could not mount it", "see: agentctl logs --component guest"),
}


def row(
    spec: MountSpec,
    known: ShareState | None,
    trouble: str = "",
    *,
    connected: bool = True,
    strayed: str = "",
) -> Mount:
    """A mount as the user is told of it. ``known`` is None while there is no file server to ask; ``strayed`` is the
    folder that its path on the host means now if that is not the one which is mounted.
    """
    if known is None:
        if trouble:
            return Mount(spec, MountState.FAILED, trouble[:MAX_WORDS], LOGS_HINT)
        return Mount(spec, MountState.WAITING, "the file server is being started")
    state = _OF_HOST.get(known.stage) or _OF_GUEST[known.guest]
    reason, hint = (words.replace("{}", spec.host_path) for words in _MEANING[state])
    if known.reason:
        reason, hint = known.reason.removesuffix("."), known.hint.removesuffix(".")
    if state is MountState.MOUNTED and not connected:
        state, reason, hint = MountState.WAITING, "the VM's files agent does not answer just now", ""
    if strayed and state in _OF_THE_FOLDER:
        reason = f"{spec.host_path} has come to mean {strayed}; what the VM was given is {spec.real_path}"
        hint = f"if the VM is to see {strayed}: agentctl up {_flag(spec)} (and the others)"
    return Mount(
        spec,
        state,
        reason[:MAX_WORDS],
        hint[:MAX_WORDS],
        nodes=known.nodes,
        descriptors=known.descriptors,
        lost=known.lost,
        calls=known.calls,
        clock_skew_ms=known.clock_skew_ms,
        revalidating=known.revalidating,
        unwatched=known.unwatched,
        bytes_read=known.bytes_read,
        bytes_written=known.bytes_written,
    )


def _flag(spec: MountSpec) -> str:
    """What asks for this mount again."""
    options = (":ro" if spec.read_only else "") + (",locks=host" if spec.host_locks else "")
    return f"--mount {shlex.quote(f'{spec.host_path}:{spec.guest_path}{options}')}"
