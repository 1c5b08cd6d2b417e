from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from guest_agent.fuse import mountinfo, mounting
from guest_agent.fuse.mountinfo import Mount
from guest_agent.fuse.mounting import MountError, MountSpec

if TYPE_CHECKING:
    from pathlib import Path

    from tests.guest_agent.fuse.conftest import Place

# --- pure rules ----------------------------------------------------------------------------------------


def test_what_is_around_is_mounted_first() -> None:
    paths = ["/home/u/src/deep", "/srv", "/home/u", "/home/u/src"]
    ordered = mounting.outermost_first([MountSpec(i, path) for i, path in enumerate(paths)])
    assert [spec.path for spec in ordered] == ["/srv", "/home/u", "/home/u/src", "/home/u/src/deep"]


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
    return {mount.path: mount for mount in mountinfo.parse_mountinfo("\n".join(place.mounts()).encode())}


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


CALL = """
import os, sys
from guest_agent.fuse import mounting
from guest_agent.fuse.mounting import MountSpec
try: {}
except mounting.MountError as error: print(error)
"""


@pytest.mark.parametrize("inside", [False, True])
def test_a_mount_that_is_detached_is_kept_until_it_is_attached(place: Place, inside: bool) -> None:
    """Inside of another share both are a child's work."""
    path = f"{place.path}/outer/dir/m" if inside else f"{place.path}/m"
    server = place.serve(f"1:{place.path}/outer", f"2:{path}")
    before = parsed(place)[path]
    code = CALL.format(
        """
    tree = mounting.detach(sys.argv[1])
    print(os.path.exists(sys.argv[1] + "/hello"))
    mounting.attach(tree, MountSpec(2, sys.argv[1], read_only=True))
    os.close(tree)"""
    )
    assert place.python(code, path) == "False\n"
    after = parsed(place)[path]
    assert (after.device, after.read_only, before.read_only) == (before.device, True, False)
    assert place.shell(f"cat {path}/hello") == "hello\n"
    detach = CALL.format("os.close(mounting.detach(sys.argv[1]))")
    assert place.python(detach, path) == ""
    assert server.expect("ended") == {"ended": 2}
    assert place.python(detach, path) == f"{path} was unmounted by somebody else\n"


def test_what_others_mounted_in_a_share_comes_along(place: Place) -> None:
    place.serve(f"1:{place.path}/m")
    path = f"{place.path}/m"
    place.shell(f"mkdir {path}/sub; mount -t tmpfs other {path}/sub; touch {path}/sub/theirs")
    code = CALL.format("mounting.attach(mounting.detach(sys.argv[1]), MountSpec(1, sys.argv[1]))")
    assert place.python(code, path) == ""
    assert place.shell(f"ls {path}/sub") == "theirs\n"
    place.shell(f"umount {path}/sub")


def test_what_cannot_be_attached_is_a_clear_error(place: Place) -> None:
    path = f"{place.path}/m"
    server = place.serve(f"1:{path}")
    code = CALL.format(
        """
    tree = mounting.detach(sys.argv[1])
    os.rmdir(sys.argv[1])
    open(sys.argv[1], "w").close()
    mounting.attach(tree, MountSpec(1, sys.argv[1]))"""
    )
    assert place.python(code, path) == f"{path} exists in the guest and is not a directory\n"
    assert server.expect("ended") == {"ended": 1}


@pytest.mark.parametrize("inside", [False, True])
def test_the_mode_of_a_mount_changes_unless_somebody_writes(place: Place, inside: bool) -> None:
    path = f"{place.path}/outer/dir/m" if inside else f"{place.path}/m"
    place.serve(f"1:{place.path}/outer", f"2:{path}")
    code = CALL.format("print(mounting.set_read_only(sys.argv[1], sys.argv[2] == 'ro'))")
    place.shell(f"echo 1 >{path}/f")
    writer = place.popen("sh", "-euc", f"exec 5>>{path}/f; echo; read go; echo 2 >&5")
    assert writer.stdout is not None
    writer.stdout.read(1)
    assert place.python(code, path, "ro") == "False\n"
    assert not parsed(place)[path].read_only
    writer.communicate("go\n", timeout=20)
    assert place.python(code, path, "ro") == "True\n"
    line = next(line for line in place.mounts() if f" {path} " in line)
    assert " ro,nosuid,nodev" in line
    assert place.python(code, path, "rw") == "True\n"
    assert place.shell(f"echo 3 >>{path}/f; cat {path}/f") == "1\n2\n3\n"
    assert place.python(code, f"{path}/nothing", "rw") == f"{path}/nothing was unmounted by somebody else\n"


def test_the_child_explains_what_it_does_not_understand() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "guest_agent.fuse.mounting", "dance"],
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == "unknown arguments ['dance']\n"
