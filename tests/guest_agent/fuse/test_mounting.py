from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from guest_agent.fuse import mounting
from guest_agent.fuse.mounting import Mount, MountError, MountSpec

if TYPE_CHECKING:
    from pathlib import Path

    from tests.guest_agent.fuse.conftest import Place

MOUNTINFO = rb"""22 1 254:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw,errors=remount-ro
60 22 0:51 / /home/a\040b\134c rw,nosuid,nodev,relatime shared:9 master:3 - fuse.agentctl agentctl-77 rw,user_id=0
61 60 0:52 / /home/a\040b\134c/inner ro,nosuid,nodev - fuse.agentctl agentctl-78 rw,user_id=0,allow_other
62 22 0:51 /src /var/lib/docker/x rw - fuse.agentctl agentctl-77 rw
63 22 0:53 / /mnt/\377 rw - fuse.sshfs agentctl-79 rw
64 22 0:54 / /odd rw - fuse.agentctl agentctl-x rw
"""


# --- mountinfo -----------------------------------------------------------------------------------------


def test_mountinfo_is_read_with_its_escapes_and_optional_fields() -> None:
    mounts = mounting.parse_mountinfo(MOUNTINFO)
    assert mounts[0] == Mount(1, "/", "/", False, "ext4", "/dev/vda1")
    assert mounts[1] == Mount(51, "/", "/home/a b\\c", False, "fuse.agentctl", "agentctl-77")
    assert mounts[2].read_only
    assert os.fsencode(mounts[4].path) == b"/mnt/\xff"


def test_ours_are_the_mounts_we_made_and_no_bind_mounts_of_them() -> None:
    ours = mounting.mounted_shares(mounting.parse_mountinfo(MOUNTINFO))
    assert [(mount.share, mount.device) for mount in ours] == [(77, 51), (78, 52)]


def test_this_machines_mountinfo_can_be_read() -> None:
    """In a chroot there need be none at the root."""
    assert any(mount.path == "/proc" for mount in mounting.read_mounts())


# --- pure rules ----------------------------------------------------------------------------------------


def test_what_is_around_is_mounted_first() -> None:
    paths = ["/home/u/src/deep", "/srv", "/home/u", "/home/u/src"]
    ordered = mounting.outermost_first([MountSpec(i, path) for i, path in enumerate(paths)])
    assert [spec.path for spec in ordered] == ["/srv", "/home/u", "/home/u/src", "/home/u/src/deep"]


@pytest.mark.parametrize(
    ("path", "expected"),
    [("/home/u/x", True), ("/home/u", False), ("/home/user", False), ("/home", False), ("/home/u/", False)],
)
def test_below_goes_by_whole_components(path: str, expected: bool) -> None:
    assert mounting.is_below(path, "/home/u") is expected
    share = Mount(1, "/", "/home/u", False, "fuse.agentctl", "agentctl-1")
    assert mounting.leads_through_a_share(path, [share]) is expected


@pytest.mark.parametrize("path", ["relative", "/a/../b", "/a//b", "/a/", "/", "//", "/a\0b", ""])
def test_a_path_that_cannot_be_is_refused(path: str) -> None:
    with pytest.raises(MountError):
        mounting.check_path(path)


def test_missing_directories_are_made(tmp_path: Path) -> None:
    mounting.make_mountpoint(str(tmp_path / "a/b/c"))
    mounting.make_mountpoint(str(tmp_path / "a/b/c"))
    assert (tmp_path / "a/b/c").is_dir()


def test_a_file_in_the_way_is_a_clear_error_and_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(MountError, match="exists in the guest and is not a directory"):
            mounting.make_mountpoint(str(path))
    assert (tmp_path / "file").read_text() == "mine"


def test_what_is_not_mounted_is_unmounted_already(tmp_path: Path) -> None:
    mounting.unmount(str(tmp_path))


def test_a_bad_device_is_a_clear_error_and_leaves_no_mount(place: Place) -> None:
    code = (
        "import os, sys\n"
        "from guest_agent.fuse import mounting\n"
        "try: mounting.mount(os.open('/dev/null', os.O_RDWR), mounting.MountSpec(1, sys.argv[1]))\n"
        "except mounting.MountError as error: print(error)\n"
    )
    assert place.python(code, f"{place.path}/m") == f"{place.path}/m cannot be mounted: Invalid argument\n"
    assert place.mounts() == []


def test_the_device_is_that_of_the_path_else_of_the_newest() -> None:
    def made(device: int, path: str) -> Mount:
        return Mount(device, "/", path, False, "fuse.agentctl", "agentctl-7")

    mounts = [made(50, "/old"), made(51, "/m"), made(52, "/elsewhere")]
    assert mounting._device(MountSpec(7, "/m"), mounts) == 51
    assert mounting._device(MountSpec(7, "/link/m"), mounts) == 52
    with pytest.raises(MountError, match="unmounted at once"):
        mounting._device(MountSpec(8, "/m"), mounts)


# --- real mounts ---------------------------------------------------------------------------------------


def parsed(place: Place) -> dict[str, Mount]:
    return {mount.path: mount for mount in mounting.parse_mountinfo("\n".join(place.mounts()).encode())}


def test_a_mount_is_what_it_should_be(place: Place) -> None:
    server = place.serve(f"7:{place.path}/with blank")
    (line,) = place.mounts()
    for word in ("nosuid", "nodev", "default_permissions", "allow_other", "fuse.agentctl agentctl-7"):
        assert word in line
    mount = parsed(place)[f"{place.path}/with blank"]
    assert mount.share == 7
    server.order(f"mount 8 {place.path}/other")
    assert server.expect("mounted")["device"] == parsed(place)[f"{place.path}/other"].device


def test_read_only_is_a_property_of_the_mount_not_of_the_file_system(place: Place) -> None:
    place.serve(f"1:{place.path}/m:ro")
    with pytest.raises(subprocess.CalledProcessError):
        place.shell(f"echo x > {place.path}/m/new 2>/dev/null")
    assert place.shell(f"cat {place.path}/m/hello") == "hello\n"
    (line,) = place.mounts()
    options, _, super_options = line.partition(" - ")
    assert " ro,nosuid,nodev" in options
    assert super_options.split()[2].startswith("rw,")
    place.shell(f"mkdir {place.path}/b && mount --bind {place.path}/m {place.path}/b")
    assert parsed(place)[f"{place.path}/m"].read_only


def test_nested_shares_are_mounted_outermost_first_whatever_the_order(place: Place) -> None:
    place.serve(f"2:{place.path}/m/in/inner", f"1:{place.path}/m")
    assert place.shell(f"cat {place.path}/m/hello {place.path}/m/in/inner/hello") == "hello\nhello\n"


def test_what_others_mounted_over_a_share_is_not_unmounted(place: Place) -> None:
    server = place.serve(f"1:{place.path}/m")
    place.shell(f"mount -t tmpfs over {place.path}/m")
    code = (
        "import sys\n"
        "from guest_agent.fuse import mounting\n"
        "try: mounting.unmount(sys.argv[1])\n"
        "except mounting.MountError as error: print(error)\n"
    )
    said = place.python(code, f"{place.path}/m")
    assert said == f"over (tmpfs) is mounted over {place.path}/m\n"
    place.shell(f"umount {place.path}/m")
    assert place.python(code, f"{place.path}/m") == ""
    assert server.expect("ended") == {"ended": 1}


def test_an_inner_mount_in_a_dead_share_is_an_error_and_not_a_hang(place: Place) -> None:
    server = place.serve(f"1:{place.path}/m")
    server.kill()
    code = (
        "import os, sys\n"
        "from guest_agent.fuse import mounting\n"
        "try: mounting.mount(os.open('/dev/fuse', os.O_RDWR), mounting.MountSpec(2, sys.argv[1]))\n"
        "except mounting.MountError as error: print(error)\n"
    )
    said = place.python(code, f"{place.path}/m/inner")
    assert said == f"{place.path}/m/inner cannot be made in the guest: Transport endpoint is not connected\n"


def test_a_walk_that_hangs_is_given_up(place: Place) -> None:
    server = place.serve("--hold", f"1:{place.path}/m")
    code = (
        "import os, sys\n"
        "from guest_agent.fuse import mounting\n"
        "mounting.CHILD_TIMEOUT = 0.5\n"
        "fd = os.open('/dev/fuse', os.O_RDWR)\n"
        "try: mounting.mount(fd, mounting.MountSpec(2, sys.argv[1]))\n"
        "except mounting.MountError as error: print(error, flush=True)\n"
        "os._exit(0)\n"
    )
    said = place.python(code, f"{place.path}/m/held.dir/inner")
    assert said == f"{place.path}/m/held.dir/inner: the share around it does not answer\n"
    server.order("release 1")


def test_the_child_explains_what_it_does_not_understand() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "guest_agent.fuse.mounting", "dance"],
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == "unknown arguments ['dance']\n"
