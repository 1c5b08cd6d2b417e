"""What goes wrong around a share: each time a clear state, the right errno, and no hang."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fileserver.confinement import VALID
from fileserver.control import GuestStage
from tests.files.harness import Folder, Plane, ShareStage, eventually, loose_directory


@pytest.fixture
def plane() -> Iterator[Plane]:
    with Plane() as plane:
        yield plane


def errno_of(plane: Plane, expression: str, **options: object) -> str:
    """The name of the errno that a Python expression fails with on the mount; "none" if it does not."""
    script = f"""
import errno, os
try:
    {expression}
except OSError as error:
    print(errno.errorcode[error.errno])
else:
    print("none")
"""
    return plane.python(script, **options).strip()


def becomes(plane: Plane, stage: ShareStage) -> None:
    eventually(f"the share is {stage.value}", lambda: plane.state().stage is stage, 15)


# --- the root --------------------------------------------------------------------------------------


def test_the_root_is_deleted_and_made_again(plane: Plane) -> None:
    plane.sh("mkdir d; echo old >d/file; cat d/file")
    shutil.rmtree(plane.host)
    becomes(plane, ShareStage.MISSING)
    state = plane.state()
    assert str(plane.host) in state.reason + state.hint
    assert errno_of(plane, f"os.stat({str(plane.guest / 'd')!r})", cwd=Path("/")) in ("ENOENT", "ESTALE")
    assert errno_of(plane, f"os.listdir({str(plane.guest)!r})", cwd=Path("/")) in ("ENOENT", "ESTALE", "none")
    assert errno_of(plane, f"open({str(plane.guest / 'new')!r}, 'w')", cwd=Path("/")) in ("ENOENT", "ESTALE")
    plane.host.mkdir()
    (plane.host / "file").write_text("new")
    becomes(plane, ShareStage.SERVING)
    assert plane.sh("cat file; echo back >again") == "new"
    assert (plane.host / "again").read_text() == "back\n"


def test_the_root_is_replaced_at_once(plane: Plane) -> None:
    (plane.host / "file").write_text("old")
    assert plane.sh("cat file") == "old"
    other = plane.directory / "other"
    other.mkdir()
    (other / "file").write_text("new, and longer")
    plane.host.rename(plane.directory / "away")
    other.rename(plane.host)

    def seen() -> bool:
        return (
            plane.run(["cat", str(plane.guest / "file")], cwd=Path("/"), status=None).output
            == "new, and longer"
        )

    eventually("the new root is served", seen, 15)
    becomes(plane, ShareStage.SERVING)
    plane.sh("echo x >made")
    assert (plane.host / "made").exists()
    assert not (plane.directory / "away/made").exists()


def test_the_root_becomes_a_file(plane: Plane) -> None:
    plane.host.rename(plane.directory / "away")
    plane.host.write_text("a file")
    becomes(plane, ShareStage.NOT_A_DIRECTORY)
    assert errno_of(plane, f"os.stat({str(plane.guest / 'x')!r})", cwd=Path("/")) in (
        "ENOENT",
        "ENOTDIR",
        "ESTALE",
    )
    plane.host.unlink()
    (plane.directory / "away").rename(plane.host)
    becomes(plane, ShareStage.SERVING)
    plane.sh("echo x >made")


def test_a_share_of_a_path_that_does_not_exist() -> None:
    with Plane() as plane:
        missing = Folder("not/yet", "later")
        plane.serve(plane.with_folder(), missing)
        eventually("it is said", lambda: plane.state(1).stage is ShareStage.MISSING, 15)
        assert str(plane.host_path(missing)) in plane.state(1).reason + plane.state(1).hint
        plane.host_path(missing).mkdir(parents=True)
        (plane.host_path(missing) / "file").write_text("here")
        eventually("it is served", lambda: plane.state(1).stage is ShareStage.SERVING, 15)


def test_permission_is_taken_from_a_file_and_given_back(plane: Plane) -> None:
    """On the host; the guest's kernel judges by the mode, which is told when it changes."""
    (plane.host / "file").write_text("content")
    user = [sys.executable, "-c", "import os; os.setuid(65534); print(open('file').read())"]
    assert plane.run(user).output == "content\n"
    (plane.host / "file").chmod(0o600)
    plane.heard()
    assert "PermissionError" in plane.run(user, status=1).errors
    (plane.host / "file").chmod(0o644)
    plane.heard()
    assert plane.run(user).output == "content\n"


# --- files -----------------------------------------------------------------------------------------


def test_a_file_that_becomes_a_directory_and_back(plane: Plane) -> None:
    path = plane.host / "thing"
    for _ in range(3):
        path.write_text("a file")
        plane.heard()
        assert plane.sh("cat thing; test -f thing") == "a file"
        path.unlink()
        path.mkdir()
        (path / "inside").write_text("a directory")
        plane.heard()
        assert plane.sh("cat thing/inside; ls thing") == "a directoryinside\n"
        assert errno_of(plane, "open('thing')") == "EISDIR"
        shutil.rmtree(path)
        plane.heard()
        assert errno_of(plane, "os.stat('thing')") == "ENOENT"
        path.symlink_to("elsewhere")
        plane.heard()
        assert plane.sh("readlink thing") == "elsewhere\n"
        path.unlink()


def test_a_file_that_the_host_deletes_while_it_is_open(plane: Plane) -> None:
    (plane.host / "file").write_text("content")
    script = """
import os, sys, time
fd = os.open("file", os.O_RDWR)
print(os.fstat(fd).st_size, flush=True)
while not os.path.exists(sys.argv[1]): time.sleep(0.01)
print(os.pread(fd, 100, 0).decode(), os.pwrite(fd, b"C", 0), os.fstat(fd).st_nlink, os.path.exists("file"))
"""
    flag = plane.directory / "go"
    with plane.start([sys.executable, "-u", "-c", script, str(flag)]) as running:
        eventually("it is open", lambda: running.said()[0] == "7\n")
        (plane.host / "file").unlink()
        plane.heard()
        flag.touch()
        finished = running.wait(20)
    assert finished.output == "7\ncontent 1 0 False\n", finished.errors


def test_a_directory_that_the_host_moves_while_it_is_current(plane: Plane) -> None:
    (plane.host / "a/b").mkdir(parents=True)
    script = """
import os, sys, time
os.chdir("a/b")
print("there", flush=True)
while not os.path.exists(sys.argv[1]): time.sleep(0.01)
open("file", "w").write("x")
print(os.listdir("."))
"""
    flag = plane.directory / "go"
    with plane.start([sys.executable, "-u", "-c", script, str(flag)]) as running:
        eventually("it is there", lambda: running.said()[0] == "there\n")
        (plane.host / "a").rename(plane.host / "c")
        plane.heard()
        flag.touch()
        finished = running.wait(20)
    assert finished.output == "there\n['file']\n", finished.errors
    assert (plane.host / "c/b/file").read_text() == "x"


def test_a_directory_that_the_host_moves_out_of_the_share_while_it_is_current(plane: Plane) -> None:
    """What a program has open, or its kernel knows, it keeps; what it does not have yet it does not get."""
    (plane.host / "a/b").mkdir(parents=True)
    (plane.host / "a/b/file").write_text("open")
    script = """
import errno, os, sys, time
os.chdir("a/b")
fd = os.open("file", os.O_RDWR)
print("there", flush=True)
while not os.path.exists(sys.argv[1]): time.sleep(0.01)
print(os.write(fd, b"more"), os.pread(fd, 9, 0))
for name in "file", "never", "new":
    try:
        os.close(os.open(name, os.O_RDWR | os.O_CREAT * (name == "new")))
        print("opened")
    except OSError as error:
        print(errno.errorcode[error.errno])
"""
    flag = plane.directory / "go"
    with plane.start([sys.executable, "-u", "-c", script, str(flag)]) as running:
        eventually("it is there", lambda: running.said()[0] == "there\n")
        (plane.host / "a").rename(plane.directory / "outside")
        time.sleep(2 * VALID)
        flag.touch()
        finished = running.wait(20)
    said = finished.output.splitlines()
    assert said[:2] == ["there", "4 b'more'"], finished.errors
    known, *others = said[2:]
    assert known in ("opened", "ENOENT", "ESTALE")
    assert len(others) == 2
    assert set(others) <= {"ENOENT", "ESTALE"}, finished.output
    assert os.listdir(plane.directory / "outside/b") == ["file"]
    (plane.directory / "outside").rename(plane.host / "a")
    plane.heard()
    assert plane.sh("cat a/b/file") == "more"


# --- space -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_filesystem() -> Iterator[Path]:
    """8 MiB, mounted where the file server sees it."""
    with loose_directory() as directory:
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=8m,mode=755", "small", str(directory)], check=True
        )
        try:
            yield directory
        finally:
            subprocess.run(["umount", "--lazy", str(directory)], check=True)


FILL = """
import errno, mmap, os
fd = os.open("file", os.O_RDWR | os.O_CREAT)
written = 0
try:
    while written < 1 << 26:
        written += os.write(fd, bytes(100_000))
except OSError as error:
    print(errno.errorcode[error.errno], written > 6_000_000, os.fstat(fd).st_size >= written)
try:
    print(os.mkdir("directory"))
except OSError as error:
    print(errno.errorcode[error.errno])
"""

STORE = """
import errno, mmap, os
fd = os.open("sparse", os.O_RDWR | os.O_CREAT)
os.ftruncate(fd, 16 << 20)
view = mmap.mmap(fd, 16 << 20)
try:
    for offset in range(0, 16 << 20, 4096):
        view[offset] = 1
    view.flush()
except OSError as error:
    print("msync", errno.errorcode[error.errno])
else:
    print("msync said nothing")
"""


@pytest.mark.parametrize("with_memory", [True, False])
def test_a_full_disk_reaches_the_writer(with_memory: bool) -> None:
    with small_filesystem() as small, Plane(host=small, with_memory=with_memory) as plane:
        lines = plane.python(FILL).splitlines()
        assert lines[0] == "ENOSPC True True"
        plane.sh("rm file")
        eventually(
            "there is room again",
            lambda: plane.run(["sh", "-c", "echo x >small"], status=None).status == 0,
            5,
        )
        assert plane.sh("cat small") == "x\n"
        assert (
            errno_of(plane, "os.posix_fallocate(os.open('big', os.O_CREAT | os.O_RDWR), 0, 1 << 26)")
            == "ENOSPC"
        )
        plane.sh("rm -f big file")


@pytest.mark.parametrize("with_memory", [True, False])
def test_a_full_disk_reaches_who_syncs_a_mapping(with_memory: bool) -> None:
    with small_filesystem() as small, Plane(host=small, with_memory=with_memory) as plane:
        finished = plane.run([sys.executable, "-c", STORE], status=None)
        # Linux may find out at the store already (SIGBUS), but never says that all is well.
        assert finished.output in ("msync ENOSPC\n", "msync EIO\n") or finished.status < 0, finished
        plane.sh("rm sparse")
        eventually(
            "there is room again",
            lambda: plane.run(["sh", "-c", "echo x >small"], status=None).status == 0,
            5,
        )


@pytest.mark.parametrize("with_memory", [True, False])
def test_fsync_says_what_a_write_did_not(with_memory: bool) -> None:
    with small_filesystem() as small, Plane(host=small, with_memory=with_memory) as plane:
        (small / "filler").write_bytes(bytes(7 << 20))
        assert (
            errno_of(
                plane, "f = open('file', 'wb', 0); [f.write(bytes(1 << 20)) for _ in range(4)]; os.fsync(f)"
            )
            == "ENOSPC"
        )
        (small / "filler").unlink()
        assert errno_of(plane, "f = open('file', 'wb', 0); f.write(bytes(1 << 20)); os.fsync(f)") == "none"


# --- the host is away ------------------------------------------------------------------------------


def test_a_host_that_is_away_for_longer_than_anybody_waits() -> None:
    with Plane(patience=5) as plane:
        (plane.host / "file").write_text("content")
        plane.sh("cat file")
        plane.server.kill()
        begun = time.monotonic()
        absolute = str(plane.guest / "file")
        # Only who changes something has to have an answer: until the guest knows, what was promised stands.
        assert errno_of(plane, f"open({absolute!r}, 'w')", cwd=Path("/")) == "EIO"
        assert 4 < time.monotonic() - begun < 30
        begun = time.monotonic()
        assert errno_of(plane, f"os.stat({absolute!r})", cwd=Path("/")) == "EIO"
        assert time.monotonic() - begun < 5  # by now it is known
        plane.start_server()
        plane.wait_mounted()
        assert plane.sh("cat file; echo x >>file") == "content"
        assert (plane.host / "file").read_text() == "contentx\n"


def test_a_host_that_is_away_for_less_is_waited_for(plane: Plane) -> None:
    plane.sh("echo x >file")
    plane.server.kill()
    with plane.namespace.start(
        ["sh", "-ec", f"cat {plane.guest}/file; echo y >{plane.guest}/file"], cwd=Path("/")
    ) as running:
        time.sleep(1)
        assert running.process.poll() is None
        plane.start_server()
        assert running.wait(20).output == "x\n"
    assert (plane.host / "file").read_text() == "y\n"


def test_who_waits_for_an_absent_host_can_be_killed() -> None:
    with Plane(patience=60) as plane:
        plane.sh("echo x >file")
        plane.server.kill()
        time.sleep(2)  # that the host is gone, the guest knows by its silence
        for script in (f"cat {plane.guest}/file", f"echo y >>{plane.guest}/file", f"mkdir {plane.guest}/new"):
            with plane.namespace.start(["sh", "-c", script], cwd=Path("/")) as running:
                time.sleep(0.3)
                assert running.process.poll() is None
                assert running.kill(), script
        plane.start_server()
        plane.wait_mounted()
        assert plane.sh("head -n 1 file") == "x\n"


def test_a_stopped_server_is_a_slow_one(plane: Plane) -> None:
    import signal

    plane.sh("echo x >file")
    os.kill(plane.server.pid, signal.SIGSTOP)
    with plane.namespace.start(["cat", str(plane.guest / "file")], cwd=Path("/")) as running:
        time.sleep(1)
        assert running.process.poll() is None
        os.kill(plane.server.pid, signal.SIGCONT)
        assert running.wait(20).output == "x\n"


# --- more than one share ---------------------------------------------------------------------------


def test_a_share_that_is_read_only() -> None:
    with Plane(Folder(read_only=True)) as plane:
        (plane.host / "file").write_text("content")
        (plane.host / "directory").mkdir()
        assert plane.sh("cat file; ls") == "contentdirectory\nfile\n"
        for expression in (
            "open('file', 'a')", "open('new', 'w')", "os.mkdir('new')", "os.unlink('file')", "os.rmdir('directory')",
            "os.rename('file', 'new')", "os.symlink('x', 'new')", "os.link('file', 'new')", "os.chmod('file', 0o600)",
            "os.utime('file')", "os.truncate('file', 0)", "os.setxattr('file', 'user.x', b'x')", "os.mkfifo('new')",
        ):  # fmt: skip
            assert errno_of(plane, expression) == "EROFS", expression
        (plane.host / "file").write_text("changed on the host")
        plane.heard()
        assert plane.sh("cat file") == "changed on the host"
        ((_, options),) = plane.namespace.mounts()
        assert options.split(",")[0] == "ro"


def test_shares_within_shares() -> None:
    """In whatever order they are named, the inner one is seen where it belongs."""
    outer, inner = Folder("outer", "."), Folder("inner", "below/here", read_only=True)
    with Plane(inner, outer) as plane:
        (plane.host_path(outer) / "below/here").mkdir(parents=True, exist_ok=True)
        (plane.host_path(outer) / "file").write_text("outer")
        (plane.host_path(inner) / "file").write_text("inner")
        eventually("both are mounted", lambda: len(plane.namespace.mounts()) == 2, 20)
        top = plane.guest_path(outer)
        assert plane.sh("cat file below/here/file", cwd=top) == "outerinner"
        assert errno_of(plane, "open('below/here/new', 'w')", cwd=top) == "EROFS"
        plane.restart_agent()
        plane.restart_server()
        plane.wait_mounted()
        assert plane.sh("cat file below/here/file", cwd=top) == "outerinner"


def test_the_same_folder_twice() -> None:
    one, two = Folder("same", "one"), Folder("same", "two", read_only=True)
    with Plane(one, two) as plane:
        plane.sh("echo first >one/file; cat two/file", cwd=plane.guest_root)
        for number in range(5):
            # To each of them what the other one writes is the host's, of which it hears some ms later.
            plane.sh(f"echo {number} >one/file", cwd=plane.guest_root)
            eventually(
                "it is seen in the other",
                lambda seen=f"{number}\n": plane.sh("cat two/file", cwd=plane.guest_root) == seen,
                20,
            )
        assert errno_of(plane, "open('two/file', 'w')", cwd=plane.guest_root) == "EROFS"


def test_shares_that_come_and_go() -> None:
    one, two = Folder("one", "one"), Folder("two", "two")
    with Plane(one) as plane:
        (plane.host_root / "two").mkdir()
        plane.serve(one, two)
        eventually("both are mounted", lambda: len(plane.namespace.mounts()) == 2, 20)
        plane.sh("echo x >one/file; echo y >two/file", cwd=plane.guest_root)
        with plane.namespace.start(["sleep", "100"], cwd=plane.guest_path(one)):  # in use
            plane.serve(two)
            eventually("one is left", lambda: len(plane.namespace.mounts()) == 1, 20)
            assert plane.sh("cat two/file; ls one", cwd=plane.guest_root) == "y\n"
        eventually("the other's descriptor is given back", lambda: len(plane.agent.store.names()) == 1, 20)
        plane.serve(one, two)
        eventually("both are mounted again", lambda: len(plane.namespace.mounts()) == 2, 20)
        assert plane.sh("cat one/file two/file", cwd=plane.guest_root) == "x\ny\n"


def test_a_mount_that_cannot_be_is_said_to_have_failed() -> None:
    """The guest has a file where the folder should be; the other share is none the worse."""
    good, bad = Folder("good", "good"), Folder("bad", "file/below")
    with Plane(good) as plane:
        (plane.guest_root / "file").write_text("in the way")
        (plane.host_root / "bad").mkdir()
        plane.serve(good, bad)
        eventually("it is said", lambda: plane.state(1).guest is GuestStage.FAILED, 20)
        assert plane.state(1).reason
        plane.sh("echo x >file", cwd=plane.guest_path(good))


def test_a_mount_point_is_busy_below(plane: Plane) -> None:
    """What the guest mounts inside of a share is its own business, and outlives a restart of the agent."""
    plane.sh("mkdir below; mount -t tmpfs small below; echo x >below/file")
    plane.restart_agent()
    assert plane.sh("cat below/file; umount below; ls below") == "x\n"
    assert list((plane.host / "below").iterdir()) == []
