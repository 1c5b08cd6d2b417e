"""What a user is told of a mount."""

from __future__ import annotations

import pytest

from fileserver.control import GuestStage, ShareStage, ShareState
from host_agent.mount_rows import MAX_WORDS, row
from protocol.api import Mount, MountSpec, MountState

HOME = MountSpec("/home/me", "/home/me", real_path="/home/me")
DATA = MountSpec("/srv/data", "/data", read_only=True, host_locks=True, real_path="/disk/data")


@pytest.mark.parametrize(
    ("stage", "guest", "state", "reason", "hint"),
    [
        (ShareStage.SERVING, GuestStage.MOUNTED, MountState.MOUNTED, "", ""),
        (ShareStage.SERVING, GuestStage.WAITING, MountState.WAITING, "the VM has not mounted it yet", ""),
        (ShareStage.SERVING, GuestStage.FAILED, MountState.FAILED, "the VM could not mount it", "guest"),
        (
            ShareStage.MISSING,
            GuestStage.MOUNTED,
            MountState.MISSING,
            "/home/{} is missing on the host",
            "again",
        ),
        (
            ShareStage.DENIED,
            GuestStage.MOUNTED,
            MountState.DENIED,
            "does not let you into",
            "ls -ld /home/{}",
        ),
        (ShareStage.NOT_A_DIRECTORY, GuestStage.WAITING, MountState.NOT_A_DIRECTORY, "not a folder", "ls"),
        (ShareStage.FULL, GuestStage.MOUNTED, MountState.FULL, "disk is full", "df -h /home/{}"),
    ],
)
def test_every_state_is_explained(
    stage: ShareStage, guest: GuestStage, state: MountState, reason: str, hint: str
) -> None:
    shown = row(MountSpec("/home/{}", "/home/x"), ShareState(1, stage, guest))
    assert shown.state is state
    assert reason in shown.reason
    assert bool(shown.reason) == bool(reason)
    assert hint in shown.hint


def test_who_knows_better_is_believed_and_cut() -> None:
    known = ShareState(
        1, ShareStage.DENIED, GuestStage.MOUNTED, "r" * 9999, "h" * 9999, 1, 2, 3, 4, -5, True, 6
    )
    assert row(HOME, known) == Mount(
        HOME, MountState.DENIED, "r" * MAX_WORDS, "h" * MAX_WORDS, 1, 2, 3, 4, -5, True, 6
    )
    late = ShareState(1, ShareStage.SERVING, GuestStage.MOUNTED, "The clock is off.", "Beware.")
    assert row(HOME, late) == Mount(HOME, MountState.MOUNTED, "The clock is off", "Beware")


@pytest.mark.parametrize("stage", [ShareStage.SERVING, ShareStage.MISSING, ShareStage.NOT_A_DIRECTORY])
def test_a_path_that_means_another_folder_now_is_said(stage: ShareStage) -> None:
    known = ShareState(1, stage, GuestStage.MOUNTED, "Something else.", "Do it.")
    shown = row(DATA, known, strayed="/new")
    assert shown.reason == "/srv/data has come to mean /new; what the VM was given is /disk/data"
    assert shown.hint == (
        "if the VM is to see /new: agentctl up --mount /srv/data:/data:ro,locks=host (and the others)"
    )
    full = ShareState(1, ShareStage.FULL, GuestStage.MOUNTED)
    assert row(DATA, full, strayed="/new") == row(DATA, full)


def test_without_a_session_nothing_is_mounted() -> None:
    known = ShareState(1, ShareStage.SERVING, GuestStage.MOUNTED)
    assert row(HOME, known, connected=False).state is MountState.WAITING
    gone = ShareState(1, ShareStage.MISSING, GuestStage.MOUNTED)
    assert row(HOME, gone, connected=False).state is MountState.MISSING
