"""Promises that nobody can keep any more: servers that end or stand still, events that are lost, files that nobody watches.

Afterwards nothing of before is believed, and what is promised then is kept again.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.files import looker
from tests.files.changes import exchange, put
from tests.files.harness import Folder, Plane, eventually, loose_directory
from tests.files.sight import Sight, differences

LIMIT = 20.0
DIRECTORIES, FILES = 12, 10

QUEUE = 16_384
"""Events that the kernel keeps for who does not read them (fs.fanotify.max_queued_events)."""

REMOUNT = "import ctypes, sys; assert ctypes.CDLL(None).mount(b'', sys.argv[1].encode(), b'', 32, None) == 0"
"""mount(2) with MS_REMOUNT: the kernel drops every dentry of the filesystem that nobody uses."""


@pytest.fixture
def plane() -> Iterator[Plane]:
    with Plane() as plane:
        yield plane


@pytest.fixture
def sight(plane: Plane) -> Iterator[Sight]:
    with plane.sight() as sight:
        yield sight


def make_tree(top: Path) -> None:
    for directory in range(DIRECTORIES):
        (top / f"{directory}/below").mkdir(parents=True)
        for file in range(FILES):
            (top / f"{directory}/{file}").write_text(f"first {directory} {file}")
        (top / f"{directory}/link").symlink_to("0")
        (top / f"{directory}/below/file").write_text("first")


def change_tree(top: Path, word: str) -> None:
    """In each directory of ``make_tree`` something else; ``word`` has five letters, and is another each time."""
    for directory in range(DIRECTORIES):
        own = top / f"{directory}"
        match directory % 6:
            case 0:  # of the same size, and the time stamp as it was
                status = (own / "1").stat()
                put(own / "1", word.encode())
                os.utime(own / "1", ns=(status.st_atime_ns, status.st_mtime_ns))
                os.chmod(own / "2", 0o600 | ord(word[0]) & 0o77)
            case 1:
                (own / f"new {word}").write_text(word)
                (own / "missing").write_text(word)
                (own / "3").unlink(missing_ok=True)
            case 2:
                os.rename(own / "below", own / f"below {word}")
                (own / "below").mkdir()
                (own / "below/file").write_text(word)
            case 3:
                (own / "link").unlink()
                (own / "link").symlink_to(word)
                (own / "draft").write_text(word)
                os.rename(own / "draft", own / "4")
            case 4:
                exchange(own, top / f"{directory + 1}")
                put(top / f"{directory + 1}/5", word.encode())
            case _:
                shutil.rmtree(own / "below", ignore_errors=True)


def know(plane: Plane, sight: Sight) -> None:
    """Everything, and some names that are not there, without asking."""

    def look() -> None:
        sight.tree(".")
        sight.value(f"[os.path.lexists(f'{{number}}/missing') for number in range({DIRECTORIES})]")

    def costs() -> int:
        before = plane.calls()
        look()
        return plane.calls() - before

    look()
    eventually("looks cost nothing", lambda: costs() == 0, LIMIT)


def agree(plane: Plane, sight: Sight, *, but: str = "") -> None:
    """Soon the guest sees what is there, and goes on doing so. ``but``: a field that nobody looks at."""
    end = time.monotonic() + LIMIT

    def compare() -> list[str]:
        return differences(sight.tree("."), looker.tree(str(plane.host)), but)

    while found := compare():
        assert time.monotonic() < end, "\n".join([f"not seen within {LIMIT:g} s:", *found])
        time.sleep(0.01)
    time.sleep(0.3)
    assert compare() == []


def test_a_mount_made_anew_is_as_cheap_as_the_first(plane: Plane) -> None:
    """Nothing is left in the guest of what was promised before, so nothing of it is in doubt."""
    make_tree(plane.host)
    costs = []
    for word in ("other", "third"):
        plane.sh("find . -type f -exec cat {} + >/dev/null")
        costs.append(plane.state().calls)
        plane.agent.kill(signal.SIGTERM)
        plane.namespace.force_unmount()
        plane.agent.store.clear()
        change_tree(plane.host, word)
        plane.agent.start()
        plane.wait_mounted()
    first, second = costs
    assert second <= first + 5
    with plane.sight() as sight:
        agree(plane, sight)


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def server_killed(plane: Plane) -> Iterator[None]:
    plane.server.kill()
    yield
    plane.start_server()


@contextlib.contextmanager
def agent_killed(plane: Plane) -> Iterator[None]:
    plane.agent.kill()
    yield
    plane.agent.start()


@contextlib.contextmanager
def both_killed(plane: Plane) -> Iterator[None]:
    plane.server.kill()
    plane.agent.kill()
    yield
    plane.agent.start(ready=None)
    plane.start_server()
    plane.wait_mounted()


@contextlib.contextmanager
def server_stopped(plane: Plane) -> Iterator[None]:
    with stopped(plane.server.pid):
        yield


@contextlib.contextmanager
def agent_stopped(plane: Plane) -> Iterator[None]:
    with stopped(plane.agent.pid):
        yield


@contextlib.contextmanager
def link_cut(plane: Plane) -> Iterator[None]:
    """Both are there, and do not hear of each other; what was under way is lost."""
    with plane.port.cut():
        yield


@contextlib.contextmanager
def queue_overflowed(plane: Plane) -> Iterator[None]:
    """What happens after the queue is full nobody is told."""
    with stopped(plane.server.pid):
        fill_queue(plane.host / "0")
        yield


def fill_queue(directory: Path) -> None:
    """More events than it holds, of a directory that the guest knows."""
    for number in range(QUEUE // 2 + 500):
        path = directory / f"filler{number}"
        path.touch()
        path.unlink()


BREAKS = (server_killed, agent_killed, both_killed, server_stopped, agent_stopped, link_cut, queue_overflowed)


@pytest.mark.parametrize("broken", BREAKS)
def test_nothing_stale_is_left(
    plane: Plane, sight: Sight, broken: Callable[[Plane], contextlib.AbstractContextManager[None]]
) -> None:
    make_tree(plane.host)
    know(plane, sight)
    for word in ("other", "third"):
        with broken(plane):
            change_tree(plane.host, word)
        agree(plane, sight)
        know(plane, sight)
    change_tree(plane.host, "final")
    agree(plane, sight)


def test_what_a_program_has_open_is_fresh_again(plane: Plane, sight: Sight) -> None:
    """It is looked at by its descriptor, its mapping and as the current directory, never by its path."""
    (plane.host / "directory").mkdir()
    (plane.host / "directory/file").write_text("0" * 10)
    (plane.host / "gone").write_text("still here")
    with plane.sight(plane.guest / "directory") as inside:
        inside.run("import mmap; kept = os.open('file', os.O_RDONLY); gone = os.open('../gone', os.O_RDONLY)")
        inside.run("view = mmap.mmap(kept, 0, prot=mmap.PROT_READ)")
        looks = ("os.pread(kept, 10, 0).decode()", "view[:10].decode()", "open('file').read()")
        assert [inside.value(look) for look in looks] == ["0" * 10] * 3
        assert inside.value("os.fstat(gone).st_nlink") == 1
        os.unlink(plane.host / "gone")
        eventually("it has no name", lambda: inside.value("os.fstat(gone).st_nlink") == 0, LIMIT)
        assert inside.value("os.pread(gone, 100, 0).decode()") == "still here"
        for number, broken in enumerate(
            (contextlib.nullcontext, server_killed, agent_killed, both_killed), 1
        ):
            with broken(plane):
                put(plane.host / "directory/file", f"{number}".encode() * 10)
            want = f"{number}" * 10
            for look in looks:
                eventually(
                    f"{look} shows {want}", lambda look=look, want=want: inside.value(look) == want, LIMIT
                )
            changed = (plane.host / "directory/file").stat().st_ctime_ns
            assert inside.value("os.fstat(kept).st_ctime_ns") == changed


def test_an_agent_is_killed_while_the_kernel_waits_for_the_host(plane: Plane, sight: Sight) -> None:
    """Names that are to be taken back stand behind a LOOKUP that nobody answers."""
    make_tree(plane.host)
    know(plane, sight)
    os.kill(plane.server.pid, signal.SIGSTOP)
    with plane.start(["stat", "0/never looked at"]) as waiting, plane.start(["ls", "0", "1/nor this"]):
        time.sleep(0.3)
        plane.server.kill()
        change_tree(plane.host, "other")
        time.sleep(0.3)
        plane.agent.kill()
        plane.agent.start(ready=None)
        plane.start_server()
        plane.wait_mounted()
        assert waiting.wait(LIMIT).status == 1
    agree(plane, sight)
    know(plane, sight)


# --- what is given back ----------------------------------------------------------------------------


def marks(plane: Plane) -> int:
    """How many the file server has: its groups say so in fdinfo (proc_pid_fdinfo(5))."""
    found = 0
    for entry in Path(f"/proc/{plane.server.pid}/fdinfo").iterdir():
        with contextlib.suppress(OSError):
            found += entry.read_text().count("fanotify ino:")
    return found


def test_what_is_forgotten_is_not_watched(plane: Plane, sight: Sight) -> None:
    base = marks(plane)
    make_tree(plane.host)
    know(plane, sight)
    assert marks(plane) > base + DIRECTORIES * FILES
    plane.run([os.sys.executable, "-c", REMOUNT, str(plane.guest)], cwd=Path("/"))
    eventually("nothing is watched but the root", lambda: marks(plane) <= base + 1, LIMIT)
    assert plane.state().nodes <= 2
    know(plane, sight)
    for path in plane.host.iterdir():
        shutil.rmtree(path)
    eventually("nothing is watched but the root", lambda: marks(plane) <= base + 1, LIMIT)
    assert plane.state().unwatched == 0


def test_a_walk_again_and_again_needs_no_more_marks(plane: Plane, sight: Sight) -> None:
    make_tree(plane.host)
    seen = []
    for word in ("other", "third", "final"):
        know(plane, sight)
        seen.append(marks(plane))
        change_tree(plane.host, word)
        agree(plane, sight)
    files = len(looker.tree(str(plane.host), content=False))
    eventually("what went is not watched", lambda: marks(plane) <= files + 5, LIMIT)
    assert max(seen) <= files + 50


FEW = 60


@pytest.fixture
def few() -> Iterator[Plane]:
    """A file server in a user namespace that may have few marks."""
    with Plane(with_memory=False, marks=FEW) as plane:
        yield plane


def test_without_marks_nothing_is_promised_and_all_is_right(few: Plane) -> None:
    make_tree(few.host)
    with few.sight() as sight:
        sight.tree(".")
        assert marks(few) <= FEW
        state = few.state()
        assert state.unwatched > 0
        assert "max_user_marks" in state.hint
        for word in ("other", "third"):
            sight.tree(".")
            change_tree(few.host, word)
            agree(few, sight)
        before = few.calls()
        sight.tree(".")
        assert few.calls() > before
        for path in few.host.iterdir():
            shutil.rmtree(path)
        agree(few, sight)
        eventually("all are watched", lambda: few.state().unwatched == 0, LIMIT)
        (few.host / "directory").mkdir()
        (few.host / "directory/file").write_text("x")
        know(few, sight)


def test_a_stat_of_what_is_not_promised_is_one_message_and_right(few: Plane) -> None:
    for number in range(10 * FEW):
        (few.host / f"{number}").touch()
    with few.sight() as sight:
        sight.run("files = os.listdir('.'); [os.stat(name) for name in files]")
        unwatched, before = few.state().unwatched, few.calls()
        assert unwatched > 8 * FEW
        sight.run("[os.stat(name) for name in files]")
        calls = few.calls() - before
        # On a busy machine a tick may be over before the kernel asks.
        assert unwatched <= calls < 1.5 * unwatched
        not_promised = []
        for number in range(2 * FEW):
            before = few.calls()
            sight.value(f"os.stat('{number}').st_size")
            if few.calls() > before:
                not_promised.append(str(number))
        assert len(not_promised) > FEW // 2
        for name in not_promised[:FEW]:
            (few.host / name).write_text("x")
            assert sight.value(f"os.stat('{name}').st_size") == 1
        for name in not_promised:
            sight.run(f"fd = os.open('{name}', os.O_WRONLY | os.O_TRUNC); found = [os.write(fd, b'x' * 10)]")
            sight.run(f"found += [os.fstat(fd).st_size, os.stat('{name}').st_nlink]")
            sight.run(f"os.unlink('{name}'); found += [os.fstat(fd).st_nlink]; os.close(fd)")
            assert sight.value("found") == [10, 10, 1, 0]


# --- other filesystems, whose numbers of inodes are not the share's ------------------------------------


@contextlib.contextmanager
def mounted(*arguments: str, at: Path) -> Iterator[None]:
    subprocess.run(["mount", *arguments, str(at)], check=True, timeout=20)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(at)], check=True, timeout=20)


def test_what_comes_and_goes_below_the_root(plane: Plane, sight: Sight) -> None:
    make_tree(plane.host)
    know(plane, sight)
    for at in (plane.host / "1/below", plane.host / "2"):
        with mounted("-t", "tmpfs", "none", at=at):
            (at / "file").write_text("in memory")
            agree(plane, sight, but="ino")
            put(at / "file", b"and still")
            (at / "new").mkdir()
            agree(plane, sight, but="ino")
        agree(plane, sight, but="ino")
    know(plane, sight)
    change_tree(plane.host, "other")
    agree(plane, sight, but="ino")


def test_a_mount_moved_and_one_over_another(plane: Plane, sight: Sight) -> None:
    make_tree(plane.host)
    one, other = plane.host / "1/below", plane.host / "2/below"
    with mounted("-t", "tmpfs", "none", at=one):
        (one / "file").write_text("lower")
        know(plane, sight)
        with mounted("-t", "tmpfs", "none", at=one):
            (one / "file").write_text("upper")
            agree(plane, sight, but="ino")
        agree(plane, sight, but="ino")
        with mounted("--bind", str(plane.host / "3"), at=other):
            agree(plane, sight, but="ino")
            put(plane.host / "3/1", b"other")
            agree(plane, sight, but="ino")
        agree(plane, sight, but="ino")


def test_a_filesystem_that_tells_nothing_is_not_believed() -> None:
    """An overlay, whose layers change behind its back; its watches are accepted, and silent."""
    with loose_directory() as layers, contextlib.ExitStack() as stack:
        for name in ("lower", "upper", "work", "merged"):
            (layers / name).mkdir()
        (layers / "lower/directory").mkdir()
        (layers / "lower/directory/file").write_text("lower")
        (layers / "upper/directory").mkdir()
        (layers / "upper/directory/file").write_text("upper")
        options = f"lowerdir={layers}/lower,upperdir={layers}/upper,workdir={layers}/work"
        stack.enter_context(mounted("-t", "overlay", "overlay", "-o", options, at=layers / "merged"))
        with Plane(Folder(), host=layers / "merged") as plane, plane.sight() as sight:
            for _ in range(3):
                sight.tree(".")
            before = plane.calls()
            sight.tree(".")
            assert plane.calls() > before
            put(layers / "upper/directory/file", b"newer")
            agree(plane, sight)
            (layers / "upper/directory/new").write_text("new")
            agree(plane, sight)


# --- what containers mount -------------------------------------------------------------------------


@pytest.fixture
def box(plane: Plane) -> Iterator[Callable[[], str]]:
    """A directory of the share with something mounted on a directory and on a file in it, as a container's volumes are;
    says what is seen there."""
    (plane.host / "box/volume").mkdir(parents=True)
    (plane.host / "box/volume/hidden").touch()
    (plane.host / "box/file").write_text("hidden")
    outside = plane.directory / "outside"
    outside.mkdir()
    (outside / "inside").touch()
    (outside / "file").write_text("mounted")
    plane.sh(f"mount --bind {outside} box/volume; mount --bind {outside}/file box/file")
    yield lambda: plane.sh("ls box/volume; cat box/file")
    plane.run(["umount", "-l", "box/volume", "box/file"], status=None)


def test_mounts_of_containers_survive_all_but_another_identity(
    plane: Plane, sight: Sight, box: Callable[[], str]
) -> None:
    shown = box()
    assert shown == "file\ninside\nmounted"
    (plane.host / "other").mkdir()
    changes: list[Callable[[], object]] = [
        lambda: (plane.host / "box/new").touch(),
        lambda: (plane.host / "box/new").unlink(),
        lambda: os.chmod(plane.host / "box", 0o700),
        lambda: os.chmod(plane.host / "box/volume", 0o700),
        lambda: os.utime(plane.host / "box/volume", ns=(0, 0)),
        lambda: (plane.host / "box/volume/new").mkdir(),
        lambda: put(plane.host / "box/file", b"newer"),
        lambda: os.chmod(plane.host / "box/file", 0o600),
        lambda: os.link(plane.host / "box/file", plane.host / "other/link"),
        lambda: os.rename(plane.host / "box/volume/hidden", plane.host / "other/hidden"),
        plane.restart_server,
        plane.restart_agent,
    ]
    for change in changes:
        sight.tree("box")
        change()
        eventually(
            "the change is seen", lambda: sight.look("other") == looker.look(str(plane.host / "other")), LIMIT
        )
        eventually(
            "and the box",
            lambda: sight.look("box", content=False) == looker.look(str(plane.host / "box"), content=False),
            LIMIT,
        )
        time.sleep(0.1)
        assert box() == shown, f"after change {changes.index(change)}"
    with stopped(plane.server.pid):
        fill_queue(plane.host / "other")
    eventually("all is quiet", lambda: not plane.state().revalidating, LIMIT)
    time.sleep(0.5)
    assert box() == shown
    os.rename(plane.host / "box/volume", plane.host / "box/moved")
    (plane.host / "box/volume").mkdir()
    (plane.host / "box/volume/fresh").touch()
    eventually("another directory is there", lambda: box() == "fresh\nmounted", LIMIT)
