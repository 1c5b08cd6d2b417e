from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from guest_agent.fuse import fusermount, mountinfo
from guest_agent.fuse.mountinfo import Mount

if TYPE_CHECKING:
    from tests.guest_agent.fuse.conftest import UsersPlace

# --- what is in the way ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "may"),
    [
        ("user_allow_other\n", True),
        ("mount_max = 5\n  user_allow_other  # for docker\n", True),
        ("#user_allow_other\n", False),
        ("user_allow_others\n", False),
        ("", False),
    ],
)
def test_who_may_show_a_mount_to_others(tmp_path: Path, text: str, may: bool) -> None:
    (tmp_path / "fuse.conf").write_text(text)
    assert fusermount.may_allow_other(tmp_path / "fuse.conf") is may


def test_nobody_may_where_nothing_is_said(tmp_path: Path) -> None:
    assert not fusermount.may_allow_other(tmp_path / "missing")
    assert not fusermount.may_allow_other(tmp_path)


def test_each_obstacle_has_its_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device, status = tmp_path / "fuse", tmp_path / "status"
    status.write_text("Name:\tpython3\nNoNewPrivs:\t0\nSeccomp:\t0\n")
    monkeypatch.setattr(fusermount, "PLACES", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))

    def fix() -> str:
        found = fusermount.obstacle(device, status)
        return "" if found is None else found.fix

    assert "apt-get install fuse3" in fix()
    program = tmp_path / "fusermount"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert fusermount.find() == str(program)
    assert "modprobe fuse" in fix()
    device.touch()
    assert f"chmod u+s {program}" in fix()
    monkeypatch.setattr(fusermount, "_is_privileged", lambda program: True)
    assert fix() == ""
    monkeypatch.setattr(fusermount, "_has_name", lambda: False)
    assert "log in as another" in fix()
    monkeypatch.setattr(fusermount, "_has_name", lambda: True)
    status.write_text("Name:\tpython3\nNoNewPrivs:\t1\nSeccomp:\t0\n")
    assert "log in as root" in fix()
    if os.geteuid():
        device.chmod(0)
        assert f"chmod 666 {device}" in fix()


def test_a_program_that_is_setuid_root_is_told_from_others(tmp_path: Path) -> None:
    assert not fusermount._is_privileged(str(tmp_path))
    assert not fusermount._is_privileged(str(tmp_path / "missing"))


def test_others_see_a_mount_only_together_with_its_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusermount, "may_allow_other", lambda: True)
    said = fusermount.options("agentctl-7", "fuse.agentctl", read_only=True).split(",")
    assert {"allow_other", "default_permissions", "ro", "nosuid", "nodev"} < set(said)
    assert {"fsname=agentctl-7", "subtype=agentctl"} < set(said)
    monkeypatch.setattr(fusermount, "may_allow_other", lambda: False)
    said = fusermount.options("agentctl-7", "fuse.agentctl", read_only=False).split(",")
    assert not {"allow_other", "ro"} & set(said)


# --- real mounts -----------------------------------------------------------------------------------------

MOUNT = """
import sys
from guest_agent.fuse import mounting
share, path = sys.argv[1:]
try: mounting.mount_afresh(mounting.MountSpec(int(share), path))
except mounting.MountError as error: print(error)
"""

UNMOUNT = """
import sys
from guest_agent.fuse import mounting
try: mounting.unmount(sys.argv[1], force=sys.argv[2] == "force")
except mounting.MountError as error: print(error)
"""

CHANGE = """
import sys
from guest_agent.fuse import mounting
for change in (mounting.detach, lambda path: mounting.set_read_only(path, True)):
    try: change(sys.argv[1])
    except mounting.MountError as error: print(error)
"""


def parsed(place: UsersPlace) -> dict[str, Mount]:
    return {mount.path: mount for mount in mountinfo.parse_mountinfo("\n".join(place.mounts()).encode())}


def test_a_users_mount_is_what_it_should_be(users_place: UsersPlace) -> None:
    place = users_place
    server = place.serve(f"7:{place.path}/with blank")
    (line,) = place.mounts()
    for word in ("nosuid", "nodev", "default_permissions", "fuse.agentctl agentctl-7"):
        assert word in line
    mount = parsed(place)[f"{place.path}/with blank"]
    assert (mount.share, mount.read_only) == (7, False)
    server.order(f"mount 8 {place.path}/other")
    assert server.expect("mounted")["device"] == parsed(place)[f"{place.path}/other"].device
    script = f"cd '{place.path}/with blank' && cat hello && echo more >>hello && mkdir d && cat hello"
    assert place.shell(script) == "hello\nhello\nmore\n"
    assert server.ask("unmount 7", "ended") == {"ended": 7}
    assert list(parsed(place)) == [f"{place.path}/other"]


def test_a_read_only_share_is_read_only_for_its_user(users_place: UsersPlace) -> None:
    place = users_place
    place.serve(f"1:{place.path}/m:ro")
    with pytest.raises(subprocess.CalledProcessError):
        place.shell(f"echo x >{place.path}/m/new 2>/dev/null")
    assert place.shell(f"cat {place.path}/m/hello") == "hello\n"
    assert parsed(place)[f"{place.path}/m"].read_only


def test_a_mode_that_forbids_something_forbids_it(users_place: UsersPlace) -> None:
    """The kernel judges by mode and owner; the host relies on that."""
    place = users_place
    place.serve(f"1:{place.path}/m")
    place.shell(f"chmod 444 {place.path}/m/hello")
    with pytest.raises(subprocess.CalledProcessError):
        place.shell(f"echo x >>{place.path}/m/hello 2>/dev/null")


@pytest.mark.parametrize("how", ["lazy", "force"])
def test_what_a_server_left_that_was_killed_is_taken_off(users_place: UsersPlace, how: str) -> None:
    place = users_place
    server = place.serve(f"1:{place.path}/m")
    server.kill()
    assert place.python(UNMOUNT, f"{place.path}/m", how) == ""
    assert place.mounts() == []
    place.serve(f"1:{place.path}/m")
    assert place.shell(f"cat {place.path}/m/hello") == "hello\n"


def test_force_ends_what_somebody_waits_for(users_place: UsersPlace) -> None:
    place = users_place
    if not place.connections():
        pytest.skip("the kernel's control filesystem is not mounted here")
    server = place.serve("--hold", f"1:{place.path}/m")
    reader = place.popen("cat", f"{place.path}/m/held")
    server.expect("held")
    assert place.python(UNMOUNT, f"{place.path}/m", "force") == ""
    assert server.expect("ended") == {"ended": 1}
    assert reader.wait(20) != 0
    assert place.mounts() == []


def test_what_is_not_ours_is_left_alone(users_place: UsersPlace) -> None:
    place = users_place
    assert place.python(UNMOUNT, str(place.path), "lazy") == ""
    assert place.python(UNMOUNT, "/proc", "force") == ""


def test_what_the_program_refuses_is_a_sentence(users_place: UsersPlace) -> None:
    place = users_place
    said = place.python(MOUNT, "1", "/usr")
    assert said == "/usr cannot be mounted: user has no write access to mountpoint /usr\n"
    said = place.python(MOUNT, "1", "/usr/agentctl-share")
    assert said.startswith(
        "/usr/agentctl-share cannot be made in the guest: Permission denied; mount it elsewhere"
    )
    assert place.mounts() == []


def test_a_share_inside_of_another_is_a_sentence_and_no_hang(users_place: UsersPlace) -> None:
    place = users_place
    place.serve(f"1:{place.path}/m")
    said = place.python(MOUNT, "2", f"{place.path}/m/inner")
    assert "is inside of another share: without root that takes user_allow_other in /etc/fuse.conf" in said
    assert len(place.mounts()) == 1


@pytest.mark.parametrize("users_place", ["user_allow_other\n"], indirect=True)
def test_where_others_may_see_it_a_share_may_be_inside_of_another(users_place: UsersPlace) -> None:
    place = users_place
    server = place.serve(f"1:{place.path}/m")
    assert "allow_other" in place.mounts()[0]
    server.order(f"mount 2 {place.path}/m/d/inner")
    server.expect("mounted")
    assert place.shell(f"cat {place.path}/m/d/inner/hello") == "hello\n"
    seen = subprocess.run(place.as_root("cat", f"{place.path}/m/hello"), stdout=subprocess.PIPE, check=True)
    assert seen.stdout == b"hello\n"
    assert server.ask("unmount 2", "ended") == {"ended": 2}
    assert server.ask("unmount 1", "ended") == {"ended": 1}


def test_only_its_user_sees_it(users_place: UsersPlace) -> None:
    place = users_place
    if os.geteuid():
        pytest.skip("there is nobody else here to look")
    place.serve(f"1:{place.path}/m")
    seen = subprocess.run(place.as_root("cat", f"{place.path}/m/hello"), capture_output=True, check=False)
    assert b"Permission denied" in seen.stderr


def test_a_users_mount_cannot_be_changed_in_its_place(users_place: UsersPlace) -> None:
    place = users_place
    place.serve(f"1:{place.path}/m")
    said = place.python(CHANGE, f"{place.path}/m")
    assert said == (
        f"{place.path}/m cannot be detached: only root changes a mount\n"
        f"{place.path}/m cannot be made ro: only root changes a mount\n"
    )
    assert place.shell(f"cat {place.path}/m/hello") == "hello\n"
