from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from fileserver import devices, linux
from host_agent.doctor import folders
from host_agent.doctor.finding import Finding, Level
from host_agent.doctor.folders import Mounted, mounted, silent
from protocol.api import Mount, MountSpec, MountState

MOUNTINFO = r"""22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
23 22 0:21 / /proc rw - proc proc rw
24 22 0:40 / /home/me/nas rw shared:2 master:1 - nfs4 server:/x rw
25 22 0:41 / /home/me/a\040b\134c rw - fuse.sshfs host: rw
26 22 0:42 / /home/me/tmp rw - tmpfs tmpfs rw
27 22 0:43 / /srv rw - ext4 /dev/sdb rw
28 22 0:44 / /srv rw - cifs //x/y rw
29 22 0:45 / /home/me/x/proc rw - proc proc rw
half a line
"""
MOUNTS = mounted(MOUNTINFO)


def spec(path: str | Path) -> MountSpec:
    return MountSpec(str(path), str(path), real_path=str(path))


def test_mountinfo_is_read() -> None:
    assert Mounted("/", "ext4") in MOUNTS
    assert Mounted("/home/me/a b\\c", "fuse.sshfs") in MOUNTS
    assert len(MOUNTS) == 8


@pytest.mark.parametrize(
    ("path", "kinds"),
    [
        ("/home/me", ["nfs4", "fuse.sshfs"]),
        ("/home/me/tmp", []),
        ("/home/me/tmp/below", []),
        ("/home/me/nas", ["nfs4"]),
        ("/home/me/nas/below", ["nfs4"]),
        ("/home/me/nasal", []),
        ("/home/me/x", []),
        ("/srv/below", ["cifs"]),
        ("/var", []),
    ],
)
def test_filesystems_that_tell_of_nothing(path: str, kinds: list[str]) -> None:
    assert [mount.kind for mount in silent(path, MOUNTS)] == kinds


def test_names_and_numbers_of_filesystems_agree() -> None:
    """Of those that are mounted here, at least."""
    seen = set()
    for mount in mounted(folders.MOUNTINFO.read_text(errors="surrogateescape")):
        if mount.kind in folders.KERNELS:
            continue
        try:
            descriptor = os.open(mount.point, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            number = linux.filesystem_type(descriptor)
        finally:
            os.close(descriptor)
        if os.path.ismount(mount.point):
            seen.add((mount.kind, devices.tells(number)))
    # Of two mounts at one place only the later is seen, by its number.
    clear = {kind: tells for kind, tells in seen if (kind, not tells) not in seen}
    assert clear
    assert {kind: kind in folders.TELLING for kind in clear} == clear


# --- at rest ---------------------------------------------------------------------------------------


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on a filesystem that tells, whatever it really is on."""
    table = folder / "mountinfo"
    table.write_text("22 1 8:1 / / rw - ext4 /dev/sda1 rw\n")
    monkeypatch.setattr(folders, "MOUNTINFO", table)
    (folder / "shared").mkdir()
    return folder


async def test_folders_that_can_be_used(here: Path) -> None:
    shared = here / "shared"
    (finding,) = await folders.at_rest([spec(shared)])
    assert finding == Finding("folders", Level.OK, str(shared))
    (finding,) = await folders.at_rest([])
    assert (finding.level, finding.message) == (Level.OK, "the VM sees none")


async def test_folders_that_cannot(here: Path) -> None:
    (here / "file").touch()
    missing = here / "it is gone"
    gone, file = await folders.at_rest([spec(missing), spec(here / "shared"), spec(here / "file")])
    assert (gone.level, gone.message) == (Level.PROBLEM, f"{missing} does not exist")
    assert gone.fix == f"mkdir -p '{missing}'"
    assert (file.level, file.message) == (Level.PROBLEM, f"{here / 'file'} is not a folder")
    assert gone.exit_code == file.exit_code == 1


async def test_a_folder_that_may_not_be_read(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    (finding,) = await folders.at_rest([spec(here / "shared")])
    assert finding.level is Level.PROBLEM
    assert "you may not read it" in finding.message


async def test_a_folder_of_somebody_else(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = (here / "shared").stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    (finding,) = await folders.at_rest([spec(here / "shared")])
    assert finding.level is Level.ADVICE
    assert "keeps no contents of files that are not yours" in finding.message
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    (finding,) = await folders.at_rest([spec(here / "shared")])
    assert finding.level is Level.OK, "root may ask about any file"


async def test_folders_that_cannot_be_promised(here: Path) -> None:
    lines = [f"{n} 22 0:4{n} / {here}/shared/{n} rw - nfs4 s:/ rw\n" for n in range(5)]
    folders.MOUNTINFO.write_text(folders.MOUNTINFO.read_text() + "".join(lines))
    (finding,) = await folders.at_rest([spec(here / "shared")])
    assert finding.level is Level.ADVICE
    named = ", ".join(f"{here}/shared/{n} (nfs4)" for n in range(3))
    assert f"of changes in {named} and 2 more;" in finding.message
    assert "ext4" in finding.fix


async def test_a_disk_that_does_not_answer_holds_nothing_up(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered = threading.Event()
    monkeypatch.setattr(folders, "ANSWER_TIME", 0.05)
    monkeypatch.setattr(os, "access", lambda path, mode: "hangs" not in path or answered.wait(20))
    for number in range(8):
        (here / f"hangs{number}").mkdir()
    started = time.monotonic()
    found = await folders.at_rest([spec(here / f"hangs{number}") for number in range(8)])
    answered.set()
    assert [finding.message for finding in found] == [
        f"{here}/hangs{number}: its disk does not answer" for number in range(8)
    ]
    assert time.monotonic() - started < 5
    assert {finding.level for finding in found} == {Level.PROBLEM}


# --- of an instance that runs ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "level"),
    [
        ({"state": MountState.MOUNTED}, Level.OK),
        ({"state": MountState.MOUNTED, "revalidating": True, "reason": "so"}, Level.OK),
        ({"state": MountState.MOUNTED, "reason": "slower here.", "hint": "sudo sysctl x=1."}, Level.ADVICE),
        ({"state": MountState.MOUNTED, "lost": 3}, Level.ADVICE),
        ({"state": MountState.WAITING, "reason": "the VM has not mounted it yet"}, Level.ADVICE),
        ({"state": MountState.FULL, "reason": "full", "hint": "make room"}, Level.PROBLEM),
        ({"state": MountState.MISSING}, Level.PROBLEM),
    ],
)
async def test_what_the_host_agent_says_of_a_folder(here: Path, row: dict[str, object], level: Level) -> None:
    mount = Mount(spec(here / "shared"), **row)  # type: ignore[arg-type]
    (finding,) = await folders.running([mount])
    assert finding.level is level
    assert str(here / "shared") in finding.message
    if level is not Level.OK:
        assert finding.fix == mount.hint.removesuffix(".")
