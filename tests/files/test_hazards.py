"""What once went wrong, or would without one of the rules of promises: each has a test that tries to bring it about."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.files import looker
from tests.files.changes import exchange, put
from tests.files.harness import Plane, eventually
from tests.files.sight import Sight, differences

LIMIT = 20.0

REMOUNT = "import ctypes, sys; assert ctypes.CDLL(None).mount(b'', sys.argv[1].encode(), b'', 32, None) == 0"
"""mount(2) with MS_REMOUNT: the kernel drops every dentry of the filesystem that nobody uses."""


@contextlib.contextmanager
def on_host(script: str, *arguments: str, cwd: Path) -> Iterator[None]:
    """Python that runs on the host meanwhile."""
    argv = [sys.executable, "-c", script, *arguments]
    with subprocess.Popen(argv, cwd=cwd, stdin=subprocess.DEVNULL) as process:
        try:
            yield
            assert process.wait(60) == 0
        finally:
            process.kill()


def made(plane: Plane, sight: Sight, name: str) -> Path:
    """A new directory of the host's that the guest knows of."""
    (plane.host / name).mkdir()
    eventually(f"{name} is there", lambda: sight.value(f"os.path.isdir({name!r})"), LIMIT)
    return plane.host / name


def agree(sight: Sight, host: Path, name: str) -> None:
    """Once nobody changes anything any more, the guest soon sees all that is there, and keeps to it."""
    end = time.monotonic() + LIMIT
    while found := differences(sight.tree(name), looker.tree(str(host / name))):
        assert time.monotonic() < end, "\n".join([f"not seen within {LIMIT:g} s:", *found[:30]])
        time.sleep(0.01)
    assert differences(sight.tree(name), looker.tree(str(host / name))) == []


# --- answers that are on their way -------------------------------------------------------------------

HOG = """
import os, time
os.sched_setaffinity(0, {0})
os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(50))
print(flush=True)
end = time.monotonic() + 0.7
while time.monotonic() < end:
    pass
"""
"""Nobody else runs on the first processor for so long; sched(7) leaves others 50 ms of each second."""


def keep_off_the_first_processor(pid: int) -> None:
    """A process with its threads and children, now and in future."""
    others = os.sched_getaffinity(0) - {0}
    for task in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(task.name), others)
        for child in (task / "children").read_text().split():
            keep_off_the_first_processor(int(child))


@contextlib.contextmanager
def held_back(plane: Plane, before: str, expression: str) -> Iterator[None]:
    """The guest looks, and the host's answer is written; meanwhile the process that asked has not got hold of it, since its
    processor is another's. ``before``: what it does earlier; of the directory ``way`` itself it asks nothing then."""
    for process in (plane.server, plane.agent):
        keep_off_the_first_processor(process.pid)
    with plane.sight() as pinned:
        pinned.run(f"os.sched_setaffinity(0, {{0}}); {before}")

        def costs() -> int:
            calls = plane.calls()
            pinned.value("os.stat('way').st_mode")
            return plane.calls() - calls

        eventually("the directory is promised", lambda: costs() == 0, LIMIT)
        calls = plane.calls()
        os.kill(plane.server.pid, signal.SIGSTOP)
        try:
            pinned.ask("value", expression)
            time.sleep(0.05)
            hog = subprocess.Popen([sys.executable, "-c", HOG], stdout=subprocess.PIPE)
            assert hog.stdout is not None
            assert hog.stdout.readline()
        finally:
            os.kill(plane.server.pid, signal.SIGCONT)
        try:
            eventually("the host has answered", lambda: plane.calls() > calls, LIMIT)
            time.sleep(0.1)
            yield
            time.sleep(0.15)
        finally:
            hog.kill()
            hog.wait()
            hog.stdout.close()
        pinned.answer()


ON_THEIR_WAY = {
    "a file": ("", "os.lstat('way/new').st_size", lambda top: os.truncate(top / "new", 1)),
    "a directory": ("", "os.lstat('way/directory').st_mode", lambda top: os.chmod(top / "directory", 0o700)),
    "nothing": ("", "os.path.lexists('way/missing')", lambda top: (top / "missing").touch()),
    "what goes": ("", "os.lstat('way/new').st_size", lambda top: (top / "new").unlink()),
    "what is replaced": (
        "",
        "os.lstat('way/new').st_size",
        lambda top: os.rename(top / "other", top / "new"),
    ),
    "a listing": ("", "os.listdir('way')", lambda top: (top / "missing").touch()),
    "a symlink": (
        "os.lstat('way/link')",
        "os.readlink('way/link')",
        lambda top: os.rename(top / "second", top / "link"),
    ),
    "data": (
        "kept = os.open('way/new', 0)",
        "os.read(kept, 99).decode()",
        lambda top: put(top / "new", b"other"),
    ),
}


def stat(sight: Sight, name: str) -> dict[str, object]:
    return sight.look(f"way/{name}", content=False)


@pytest.mark.skipif(os.cpu_count() == 1, reason="with one processor it cannot be another's")
@pytest.mark.parametrize("look", ON_THEIR_WAY)
def test_a_change_overtakes_the_answer(plane: Plane, sight: Sight, look: str) -> None:
    """An invalidation that finds nothing, because the answer that it is about is written and not stored yet, must wait."""
    top = made(plane, sight, "way")
    try:
        (top / "directory").mkdir()
        for name in ("new", "other"):
            (top / name).write_text(f"first {name}")
        (top / "link").symlink_to("first")
        (top / "second").symlink_to("second")
        time.sleep(0.2)  # nothing is promised of what has just changed
        before, expression, change = ON_THEIR_WAY[look]
        with held_back(plane, before, expression):
            change(top)
        for name in ("new", "directory", "missing", "link"):
            # By stat(2) alone: a listing would bring all of them anew, and so would a read.
            real = looker.look(str(top / name), content=False)
            eventually(f"{name} is {real}", lambda name=name, real=real: stat(sight, name) == real, 5)
        agree(sight, plane.host, "way")
    finally:
        shutil.rmtree(top)
        eventually("it is gone", lambda: not sight.value("os.path.lexists('way')"), LIMIT)


EDITS = """
import os, sys
for number in range(int(sys.argv[1])):
    fd = os.open(str(number), os.O_WRONLY)
    os.pwrite(fd, b"new", 0)
    os.close(fd)
"""


@pytest.mark.parametrize("order", ["forwards", "backwards", "again and again"])
def test_a_first_look_and_a_change_at_once(
    plane: Plane, sight: Sight, second: Sight, order: str, long: bool
) -> None:
    """An invalidation that finds nothing, because the answer that it is about is written and not stored yet: without a
    barrier 942 of 4,000 files were stale for ever."""
    count = 4000 if long else 800
    name = f"first {order}"
    made(plane, sight, name)
    for number in range(count):
        (plane.host / name / f"{number}").write_bytes(b"old, and longer")
    numbers = {"forwards": f"range({count})", "backwards": f"reversed(range({count}))"}.get(
        order, f"[*range({count})] * 3"
    )
    script = f"[(os.lstat(f'{name}/{{number}}').st_size, open(f'{name}/{{number}}').read()) for number in {numbers}]"
    with on_host(EDITS, f"{count}", cwd=plane.host / name):
        sight.ask("run", f"seen = {script}")
        second.ask("run", f"seen = {script}")
        sight.answer()
        second.answer()
    agree(sight, plane.host, name)


CREATIONS = """
import os, sys
for number in range(int(sys.argv[1])):
    with open(f"{number}", "w") as file:
        file.write("content")
    if number % 3 == 0:
        os.rename(f"{number}", f"moved {number}")
    elif number % 3 == 1:
        os.unlink(f"{number}")
        os.mkdir(f"{number}")
"""


def test_first_looks_at_names_that_come_and_go(plane: Plane, sight: Sight, second: Sight, long: bool) -> None:
    count = 4000 if long else 600
    made(plane, sight, "names")
    script = f"for number in range({count}): os.path.lexists(f'names/{{number}}'), os.path.lexists(f'names/moved {{number}}')"
    with on_host(CREATIONS, f"{count}", cwd=plane.host / "names"):
        sight.ask("run", script)
        second.ask("run", "for _ in range(20): os.listdir('names')")
        sight.answer()
        second.answer()
    agree(sight, plane.host, "names")


def test_directories_swapped_while_they_are_looked_up(plane: Plane, sight: Sight, long: bool) -> None:
    """Whose watch is it that was put on a path? Each directory's own."""
    top = made(plane, sight, "swapped")
    count = 400 if long else 60
    for number in range(count):
        for name in ("one", "two"):
            (top / f"{number}/{name}/below").mkdir(parents=True)
            (top / f"{number}/{name}/below/file").write_text(name)
    for number in range(count):
        sight.ask("tree", f"swapped/{number}", True)
        for _ in range(number % 7 + 1):
            exchange(top / f"{number}/one", top / f"{number}/two")
        sight.answer()
    agree(sight, plane.host, "swapped")
    for number in range(count):
        put(top / f"{number}/one/below/file", b"end")
        (top / f"{number}/two/below/new").touch()
    agree(sight, plane.host, "swapped")


def test_writes_of_both_within_one_tick(plane: Plane, sight: Sight, long: bool) -> None:
    """Of the same size, so that no signature tells them apart: an own write must not hide the other's."""
    top = made(plane, sight, "turns")
    (top / "file").write_bytes(b"-" * 6)
    agree(sight, plane.host, "turns")
    sight.run("import os; fd = os.open('turns/file', os.O_RDWR)")
    for number in range(2000 if long else 300):
        sight.run(f"os.pwrite(fd, b'g%05d' % {number}, 0)")
        put(top / "file", f"h{number:05}".encode())
        want = f"h{number:05}"
        eventually(
            f"the guest sees {want}",
            lambda want=want: sight.value("open('turns/file').read()") == want,
            LIMIT,
        )
    sight.run("os.close(fd)")


def test_no_acknowledged_write_is_lost(plane: Plane, sight: Sight, long: bool) -> None:
    """The host changes the mode and other bytes of a file all the time while the guest writes."""
    size, rounds = 64, 3000 if long else 600
    top = made(plane, sight, "both")
    (top / "file").write_bytes(bytes(2 * size * 16))
    agree(sight, plane.host, "both")
    host = """
import os, sys, time
fd = os.open("file", os.O_RDWR)
for number in range(int(sys.argv[1])):
    os.pwrite(fd, b"%016d" % number, 1024 + number % 64 * 16)
    os.chmod("file", 0o600 + number % 8)
    time.sleep(0.0005)
"""
    guest = f"""
fd = os.open("both/file", os.O_RDWR)
lost = []
for number in range({rounds}):
    place = number % {size} * 16
    os.pwrite(fd, b"%016d" % number, place)
    if os.pread(fd, 16, place) != b"%016d" % number:
        lost.append(number)
os.close(fd)
"""
    with on_host(host, f"{rounds}", cwd=top):
        sight.run(guest)
    assert sight.value("lost") == []
    data = (top / "file").read_bytes()
    last = [rounds - size + (index - rounds) % size for index in range(size)]
    assert data[: size * 16] == b"".join(b"%016d" % number for number in last)
    agree(sight, plane.host, "both")


def test_own_changes_of_a_directory_and_the_hosts(
    plane: Plane, sight: Sight, second: Sight, long: bool
) -> None:
    """Its own changes make the kernel forget the attributes of a directory, but not those that are on their way."""
    rounds = 2000 if long else 300
    made(plane, sight, "common")
    host = """
import os, sys
for number in range(int(sys.argv[1])):
    os.mkdir(f"host{number}")
    if number % 2:
        os.rmdir(f"host{number}")
"""
    own = f"""
for number in range({rounds}):
    os.mkdir(f"common/guest{{number}}")
    os.stat("common")
    if number % 2:
        os.rename(f"common/guest{{number}}", f"common/renamed{{number}}")
    if number % 3 == 0:
        os.listdir("common")
"""
    with on_host(host, f"{rounds}", cwd=plane.host / "common"):
        second.ask("run", f"for _ in range({rounds} * 3): os.stat('common'), os.path.lexists('common/host1')")
        sight.run(own)
        second.answer()
    agree(sight, plane.host, "common")


def test_a_name_that_was_missing_for_the_guest_only_for_a_moment(
    plane: Plane, sight: Sight, long: bool
) -> None:
    """A missing name is promised, and made at once; by rename and by link, from where nobody looks."""
    made(plane, sight, "missing")
    for number in range(1000 if long else 200):
        name = f"missing/{number}"
        sight.ask("value", f"os.path.lexists({name!r})")
        source = plane.directory / f"source{number}"
        source.write_text(name)
        match number % 3:
            case 0:
                os.rename(source, plane.host / name)
            case 1:
                os.link(source, plane.host / name)
            case _:
                os.symlink(source, plane.host / name)
        sight.answer()
    agree(sight, plane.host, "missing")


CHURN = """
import os, random, sys, time
seed, end = int(sys.argv[1]), time.monotonic() + float(sys.argv[2])
chosen = random.Random(seed)
count = 0
while time.monotonic() < end:
    count += 1
    place = f"{chosen.randrange(30)}/{chosen.randrange(2)}"
    path = f"{place}/{chosen.randrange(20)}"
    match chosen.randrange(5):
        case 0:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT)
            os.pwrite(fd, b"%020d" % count, 0)
            os.close(fd)
        case 1:
            with open(f"../draft{seed}", "w") as file:
                file.write("x" * chosen.randrange(30))
            os.rename(f"../draft{seed}", path)
        case 2:
            if os.path.exists(path):
                os.unlink(path)
        case 3:
            os.rename(place, f"{place}-")
            os.mkdir(place)
            for name in os.listdir(f"{place}-"):
                os.rename(f"{place}-/{name}", f"{place}/{name}")
            os.rmdir(f"{place}-")
        case 4:
            os.chmod(place, 0o700 + chosen.randrange(8))
    time.sleep(0.001)
"""


def test_walks_of_what_is_not_known_while_it_changes(
    plane: Plane, sight: Sight, second: Sight, long: bool
) -> None:
    """Listings and data that are fetched ahead of who walks a tree are no older than what he would have asked for."""
    top = made(plane, sight, "churned")
    for directory in range(30):
        for below in range(2):
            (top / f"{directory}/{below}").mkdir(parents=True)
            for file in range(20):
                (top / f"{directory}/{below}/{file}").write_text("first")
    for number in range(40 if long else 6):
        plane.run([sys.executable, "-c", REMOUNT, str(plane.guest)], cwd=Path("/"))
        with on_host(CHURN, f"{number}", "1.0", cwd=top):
            sight.ask("tree", "churned", True)
            second.ask("tree", "churned", number % 2 == 0)
            sight.answer()
            second.answer()
            sight.tree("churned")
        agree(sight, plane.host, "churned")


AS_ANOTHER = """
import os, sys
os.setgid(65534)
os.setuid(65534)
with open("setuid", "r+") as file:
    file.write("changed")
"""


def test_a_write_that_takes_setuid_away(plane: Plane, sight: Sight) -> None:
    """The host does it, on behalf of the guest, so that it is no change of somebody else's."""
    (plane.host / "setuid").write_text("content")
    os.chmod(plane.host / "setuid", 0o6777)
    eventually("it is seen", lambda: sight.look("setuid").get("mode") == 0o106777, LIMIT)
    sight.look("setuid")
    plane.python(AS_ANOTHER)
    assert (plane.host / "setuid").stat().st_mode == 0o100777
    eventually("it is gone", lambda: sight.look("setuid", content=False)["mode"] == 0o100777, LIMIT)
