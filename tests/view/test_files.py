"""What programs do in a view, and what the guest then has: real processes, a real kernel."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from guest_agent.view.places import Place
from tests.files.harness import eventually
from tests.view.harness import View

DATABASE = 999, 998
"""Whose the volume is, in the guest."""


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The guest's own folders."""
    top = tmp_path_factory.mktemp("guest")
    for name in ("db", "image/bin", "image/layer", "upper", "lower/sub", "home"):
        (top / name).mkdir(parents=True)
    os.chown(top / "db", *DATABASE)
    (top / "image/bin/tool").write_text("tool\n")
    (top / "upper/new").write_text("upper\n")
    (top / "lower/sub/old").write_text("lower\n")
    (top / "secret").write_text("not to be reached\n")
    return top


def places(guest: Path) -> list[Place]:
    return [
        Place("/volumes/db", str(guest / "db"), read_only=False, inherit=True),
        Place("/home/ann", str(guest / "home"), read_only=False, inherit=True),
        Place("/images/registry.test/app:1", str(guest / "image")),
        Place("/images/layered:1", layers=(str(guest / "upper"), str(guest / "lower"))),
    ]


@pytest.fixture(scope="module")
def view(guest: Path) -> Iterator[View]:
    with View(*places(guest)) as view:
        yield view


@pytest.fixture
def volume(guest: Path) -> Path:
    """The guest's side of it, empty."""
    path = guest / "db"
    assert not list(path.iterdir())
    return path


IN_VOLUME = "cd volumes/db; "


def test_what_there_is_and_which_of_it_may_be_changed(view: View) -> None:
    assert view.sh("find . -maxdepth 1 | sort").split() == [".", "./home", "./images", "./volumes"]
    assert view.sh("ls images images/registry.test").split() == [
        *("images:", "layered:1", "registry.test"),
        *("images/registry.test:", "app:1"),
    ]
    assert [(place.path, place.read_only) for place in view.state().places] == [
        ("volumes/db", False),
        ("home/ann", False),
        ("images/registry.test/app:1", True),
        ("images/layered:1", True),
    ]


def test_layers_are_seen_as_one(view: View) -> None:
    assert view.sh("cat images/layered:1/new images/layered:1/sub/old") == "upper\nlower\n"


def test_what_is_read_only_says_so(view: View) -> None:
    for script in (
        "echo x >images/registry.test/app:1/bin/tool",
        "rm images/registry.test/app:1/bin/tool",
        "mkdir images/layered:1/x",
        "mkdir volumes/x",
        "touch x",
        "chmod 777 images/layered:1/new",
    ):
        finished = view.run(["sh", "-c", script], status=None)
        assert finished.status != 0
        assert "Read-only file system" in finished.errors, finished.errors
    assert view.run(["test", "-w", "images/layered:1/new"], status=None).status == 1
    assert view.run(["test", "-w", "volumes/db"], status=None).status == 0


def test_an_edit_here_is_there_and_the_reverse(view: View, volume: Path) -> None:
    (volume / "conf").write_text("one\n")
    view.sh(IN_VOLUME + "cat conf; echo two >>conf")
    assert (volume / "conf").read_text() == "one\ntwo\n"
    (volume / "conf").write_text("three, by the guest\n")
    eventually("it is seen", lambda: view.sh(IN_VOLUME + "cat conf") == "three, by the guest\n")
    view.sh(IN_VOLUME + "echo four >new && mv new conf")
    assert (volume / "conf").read_text() == "four\n"
    (volume / "conf").unlink()
    eventually("it is gone", lambda: view.sh(IN_VOLUME + "ls") == "")


def test_what_is_made_belongs_to_the_volumes_owner(view: View, volume: Path) -> None:
    view.sh(IN_VOLUME + "umask 027; mkdir -p d; echo x >d/f; ln -s f d/s; mkfifo d/p; ln d/f d/hard")
    made = [volume / "d", *(volume / "d").iterdir()]
    assert len(made) == 5
    assert {(path.lstat().st_uid, path.lstat().st_gid) for path in made} == {DATABASE}
    assert stat.S_IMODE((volume / "d/f").stat().st_mode) == 0o640
    assert view.sh(IN_VOLUME + "stat -c %u:%g d d/f") == f"{os.geteuid()}:{os.getegid()}\n" * 2
    view.sh(IN_VOLUME + "rm -r d")


def test_a_file_with_other_names_is_not_given_away(view: View, guest: Path, volume: Path) -> None:
    """Who writes to the volume may put a link of a file of root's where a new one was just made; that is no new file."""
    (guest / "roots").write_text("root's\n")
    os.link(guest / "roots", volume / "roots")
    assert view.run(["sh", "-c", IN_VOLUME + "mkdir roots"], status=None).status != 0
    view.sh(IN_VOLUME + "echo more >>roots; rm roots")
    assert (guest / "roots").stat().st_uid == 0
    (guest / "roots").unlink()


def test_trees_are_copied_and_removed(view: View, volume: Path) -> None:
    view.python(
        "import os; [os.makedirs(f'volumes/db/t/{i}') or open(f'volumes/db/t/{i}/{j}', 'w').write(f'{i} {j}')"
        " for i in range(12) for j in range(1)]; [open(f'volumes/db/t/0/n{j}', 'w').close() for j in range(300)]"
    )
    view.sh(IN_VOLUME + "cp -r t u && diff -r t u && rm -rf t && mv u w && ls w/0 | wc -l")
    assert len(list((volume / "w/0").iterdir())) == 301
    assert (volume / "w/7/0").read_text() == "7 0"
    view.sh(IN_VOLUME + "rm -rf w")


def test_git(view: View, volume: Path) -> None:
    git = "git -c user.name=a -c user.email=b "
    view.sh(IN_VOLUME + f"git init -q g && cd g && echo one >f && git add f && {git} commit -qm one")
    assert view.sh(IN_VOLUME + "git -C g status --porcelain") == ""
    (volume / "g/f").write_text("two, by the guest\n")
    eventually("git sees it", lambda: view.sh(IN_VOLUME + "git -C g status --porcelain") == " M f\n")
    view.sh(IN_VOLUME + "git -C g fsck && rm -rf g")


def test_large_files_read_and_written_in_any_order(view: View, volume: Path) -> None:
    noise = os.urandom(5_000_000)
    (volume / "noise").write_bytes(noise)
    view.sh(IN_VOLUME + "cp noise copy; cmp noise copy", timeout=90)
    assert (volume / "copy").read_bytes() == noise
    view.python(
        "import os; fd = os.open('volumes/db/copy', os.O_RDWR); os.pwrite(fd, b'middle', 2_500_000);"
        "assert os.pread(fd, 6, 2_500_000) == b'middle'; assert len(os.pread(fd, 100, 4_999_990)) == 10;"
        "os.ftruncate(fd, 3_000_000); assert os.fstat(fd).st_size == 3_000_000; os.posix_fallocate(fd, 0, 3_100_000)"
    )
    expected = noise[:2_500_000] + b"middle" + noise[2_500_006:3_000_000] + bytes(100_000)
    assert (volume / "copy").read_bytes() == expected
    view.sh(IN_VOLUME + "rm noise copy")


def test_an_appending_program_and_one_of_the_guests(view: View, volume: Path) -> None:
    """The end of the file is where it is in the guest, whatever this kernel has last heard of its size."""
    (volume / "log").write_text("")
    with view.start(
        ["sh", "-ec", IN_VOLUME + "exec >>log; for i in 1 2 3 4 5 6; do echo here $i; sleep 0.1; done"]
    ) as program:
        for number in range(6):
            with (volume / "log").open("a") as log:
                log.write(f"there {number}\n")
            eventually("it goes on", lambda n=number: (volume / "log").read_text().count("here") > n)  # type: ignore[misc]
        assert program.wait(30).status == 0
    assert sorted((volume / "log").read_text().split("\n")) == sorted(
        ["", *(f"here {i}" for i in range(1, 7)), *(f"there {i}" for i in range(6))]
    )
    (volume / "log").unlink()


def test_times_are_exact(view: View, volume: Path) -> None:
    (volume / "f").write_text("")
    view.python(
        "import os; p = 'volumes/db/f'; os.utime(p, ns=(1_600_000_000_123_456_789, 1_500_000_000_987_654_321));"
        "s = os.stat(p); assert (s.st_atime_ns, s.st_mtime_ns) == (1_600_000_000_123_456_789, 1_500_000_000_987_654_321)"
    )
    assert (volume / "f").stat().st_mtime_ns == 1_500_000_000_987_654_321
    view.sh(IN_VOLUME + "touch -a f")
    assert (volume / "f").stat().st_mtime_ns == 1_500_000_000_987_654_321
    assert (volume / "f").stat().st_atime_ns > 1_600_000_000_123_456_789
    (volume / "f").unlink()


def test_a_rename_that_must_not_replace_does_not(view: View, volume: Path) -> None:
    (volume / "a").write_text("a")
    (volume / "b").write_text("b")
    script = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
os.chdir("volumes/db")
def rename(old, new, flags):
    done = libc.renameat2(-100, old, -100, new, flags)
    return ctypes.get_errno() if done else 0
print([rename(b"a", b"b", 1), rename(b"a", b"b", 2), rename(b"a", b"c", 1), rename(b"c", b"none", 2)])
print([rename(b"b", b"c", flags) for flags in (3, 4, 5, 8)])
"""
    first, second = map(json.loads, view.python(script).splitlines())
    assert first == [17, 0, 0, 2]  # EEXIST, exchanged, renamed, ENOENT
    assert set(second) <= {1, 17, 22}  # EPERM, EEXIST, EINVAL: whatever there is besides
    assert {path.name: path.read_text() for path in volume.iterdir()} == {"c": "b", "b": "a"}
    view.sh(IN_VOLUME + "rm b c")
    assert (
        "Invalid cross-device link"
        in view.run(
            ["python3", "-c", "import os; os.link('images/layered:1/new', 'volumes/db/x')"], status=None
        ).errors
    )


def test_a_file_that_is_removed_while_it_is_open_goes_on(view: View, volume: Path) -> None:
    script = """
import errno, os
os.chdir("volumes/db")
f = open("f", "w+")
f.write("data")
f.flush()
os.unlink("f")
assert os.listdir(".") == []
f.write(" more")
f.flush()
assert os.pread(f.fileno(), 20, 0) == b"data more"
os.ftruncate(f.fileno(), 4)
f.seek(0)
assert f.read() == "data"
try:  # the kernel asks this of the file, without saying by which handle
    os.fstat(f.fileno())
except OSError as error:
    assert error.errno in (errno.ESTALE, errno.ENOENT), error
"""
    view.python(script)
    assert list(volume.iterdir()) == []


def test_a_file_that_is_replaced_while_it_is_open_is_never_absent(view: View, volume: Path) -> None:
    """libfuse's other way would be a rename to another name (.fuse_hidden) before the one that replaces it."""
    (volume / "f").write_text("old")
    script = """
import os
os.chdir("volumes/db")
f = open("f")
with open("new", "w") as new:
    new.write("new")
os.rename("new", "f")
assert f.read() == "old"
assert os.listdir(".") == ["f"]
os.mkdir("d")
g = open("d/g", "w")
os.unlink("d/g")
os.rmdir("d")
"""
    view.python(script)
    assert [path.read_text() for path in volume.iterdir()] == ["new"]
    (volume / "f").unlink()


def test_extended_attributes_of_users(view: View, volume: Path) -> None:
    (volume / "f").write_text("")
    script = """
import os
p = "volumes/db/f"
os.setxattr(p, "user.a", b"value")
assert os.getxattr(p, "user.a") == b"value"
assert os.listxattr(p) == ["user.a"]
os.removexattr(p, "user.a")
for name in ("user.a", "security.capability"):
    try:
        os.getxattr(p, name)
    except OSError as error:
        assert error.errno == 61, error
    else:
        raise AssertionError(name)
"""
    view.python(script)
    (volume / "f").unlink()


def test_a_program_that_is_not_root_here_does_not_get_setuid_from_there(view: View, volume: Path) -> None:
    """The mount is nosuid and nodev, and a write takes setuid away in the guest."""
    options = next(options for _, options in view.namespace.mounts())
    assert {"nosuid", "nodev"} <= set(options.split(","))
    (volume / "s").write_text("#!/bin/sh\n")
    (volume / "s").chmod(0o4755)
    view.sh(IN_VOLUME + "echo true >>s")
    assert stat.S_IMODE((volume / "s").stat().st_mode) == 0o755
    (volume / "s").unlink()


def test_chown_cannot_make_mine_anybody_elses(view: View, volume: Path) -> None:
    (volume / "f").write_text("")
    assert view.run(["chown", "1234", "volumes/db/f"], status=None).status != 0
    view.sh(IN_VOLUME + f"chown {os.geteuid()}:{os.getegid()} f; cp -p f g")
    assert (volume / "f").stat().st_uid == 0
    view.sh(IN_VOLUME + "rm f g")


def test_a_directory_with_many_names(view: View, volume: Path) -> None:
    """More than a piece of a listing has, and more than the kernel takes at once."""
    for number in range(3000):
        (volume / f"name-{number:05d}-{'x' * (number % 50)}").touch()
    assert view.sh(IN_VOLUME + "ls | wc -l; ls -l | wc -l; find . -type f | wc -l").split() == [
        "3000",
        "3001",
        "3000",
    ]
    view.sh(IN_VOLUME + "rm -f name-*; ls", timeout=120)
    assert list(volume.iterdir()) == []


def test_places_come_and_go(view: View, guest: Path) -> None:
    (guest / "new").mkdir(exist_ok=True)
    (guest / "new/file").write_text("new\n")
    view.tell(*places(guest), Place("/volumes/new", str(guest / "new"), read_only=False))
    eventually("it is there", lambda: view.run(["test", "-e", "volumes/new/file"], status=None).status == 0)
    # Of the same name, and another one.
    (guest / "other").mkdir(exist_ok=True)
    (guest / "other/file").write_text("other\n")
    view.tell(*places(guest), Place("/volumes/new", str(guest / "other")))
    eventually(
        "it is another", lambda: view.run(["cat", "volumes/new/file"], status=None).output == "other\n"
    )
    view.tell(*places(guest))
    eventually("it is gone", lambda: view.run(["test", "-e", "volumes/new"], status=None).status == 1)
    assert view.sh("ls volumes") == "db\n"


def test_shown_as_the_guests(guest: Path, volume: Path) -> None:
    with View(*places(guest), owner="guest") as view:
        assert view.sh("stat -c %u:%g volumes/db") == "999:998\n"
        view.sh(IN_VOLUME + "echo x >f; chown 4:5 f")
        assert ((volume / "f").stat().st_uid, (volume / "f").stat().st_gid) == (4, 5)
        view.sh(IN_VOLUME + "rm f")
