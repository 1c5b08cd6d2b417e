"""What the guest keeps without asking, and that it learns of every change on the host."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.files import looker
from tests.files.changes import CHANGES, Change, Hands
from tests.files.harness import Plane, eventually, loose_directory
from tests.files.sight import Sight, differences

LIMIT = 10.0
"""Seconds for a change to be seen; some milliseconds are usual, but this machine may have other work."""

AFTERWARDS = 0.15
"""Seconds for which what was seen is looked at again, lest it comes back."""

_numbers = itertools.count()


@pytest.fixture
def here(plane: Plane, sight: Sight) -> Iterator[Path]:
    """A directory of the share, as the host has it; the guest has heard of it."""
    path = plane.host / f"test{next(_numbers)}"
    path.mkdir()
    eventually("it is there", lambda: sight.value(f"{path.name!r} in os.listdir()"), LIMIT)
    yield path
    shutil.rmtree(path)


def cost(plane: Plane, look: object) -> int:
    """What ``look()`` asks the host."""
    before = plane.calls()
    look()  # type: ignore[operator]
    return plane.calls() - before


def free_in_the_end(plane: Plane, sight: Sight, name: str) -> None:
    """After looks at the directory ``name`` one costs nothing."""
    eventually(f"looks at {name} cost nothing", lambda: cost(plane, lambda: sight.tree(name)) == 0, LIMIT)


def agree(sight: Sight, host: Path, name: str) -> None:
    """Within the time limit, the guest's ``name`` is the host's."""
    end = time.monotonic() + LIMIT
    while found := differences(sight.tree(name), looker.tree(str(host / name))):
        if time.monotonic() > end:
            raise AssertionError("\n".join([f"not seen within {LIMIT:g} s:", *found]))
        time.sleep(0.005)


# --- what costs nothing ----------------------------------------------------------------------------

FREE = {
    "stat": "os.stat('directory/file').st_size",
    "stat of a directory": "os.stat('directory').st_mode",
    "stat of the root": "os.stat('.').st_mode",
    "a missing name": "os.path.lexists('directory/missing')",
    "a path through a missing name": "os.path.lexists('missing/below/that')",
    "open and close": "os.close(os.open('directory/file', os.O_RDONLY))",
    "open and read": "open('directory/file').read()",
    "read of what is open": "os.pread(kept, 100, 0).decode()",
    "fstat of what is open": "os.fstat(kept).st_mtime_ns",
    "an empty file": "open('directory/empty').read()",
    "listing": "sorted(os.listdir('directory'))",
    "listing with types": "sorted((entry.name, entry.is_dir()) for entry in os.scandir('directory'))",
    "listing of nothing": "os.listdir('directory/below')",
    "long listing": "sorted((entry.name, entry.stat().st_size) for entry in os.scandir('directory'))",
    "a large listing": "len(os.listdir('large'))",
    "a walk": "sum(len(names) for _, _, names in os.walk('.'))",
    "readlink": "os.readlink('directory/link')",
    "through a symlink": "open('directory/link').read()",
    "access": "os.access('directory/file', os.R_OK)",
    "extended attributes": "[os.listxattr(one) for one in ('directory', 'directory/file', 'directory/link')]",
    "one that is not there": "'user.x' in os.listxattr('large/00001') or os.path.exists('large/00001')",
}


@pytest.fixture(scope="module")
def known(plane: Plane) -> Iterator[Sight]:
    top = plane.host / "known"
    (top / "directory/below").mkdir(parents=True)
    (top / "large").mkdir()
    (top / "directory/file").write_text("content " * 3000)
    (top / "directory/empty").touch()
    (top / "directory/link").symlink_to("file")
    for number in range(3000):
        (top / "large" / f"{number:05}").touch()
    with plane.sight(plane.guest / "known") as sight:
        sight.run("kept = os.open('directory/file', os.O_RDONLY)")
        yield sight
    shutil.rmtree(top)


@pytest.mark.parametrize("expression", FREE.values(), ids=FREE)
def test_a_second_look_asks_nobody(plane: Plane, known: Sight, expression: str) -> None:
    first = known.value(expression)
    known.value(
        expression
    )  # a READ that has reached the host has made atime unknown; who asks for it asks once more
    assert cost(plane, lambda: known.value(expression)) == 0
    assert known.value(expression) == first


def test_after_a_walk_nothing_is_asked(plane: Plane, sight: Sight, here: Path) -> None:
    for number in range(300):
        (here / f"{number % 10}").mkdir(exist_ok=True)
        (here / f"{number % 10}/{number}").write_text(f"{number}")
    assert cost(plane, lambda: sight.tree(here.name)) > 0
    sight.tree(here.name)
    assert cost(plane, lambda: sight.tree(here.name)) == 0
    assert differences(sight.tree(here.name), looker.tree(str(here))) == []


def test_extended_attributes_of_a_whole_directory(plane: Plane, sight: Sight, here: Path) -> None:
    for number in range(100):
        (here / f"{number}").touch()
    os.setxattr(here / "7", "user.mine", b"yes")
    look = (
        f"[os.listxattr({here.name!r} + '/' + name) for name in sorted(os.listdir({here.name!r}))].count([])"
    )
    sight.tree(here.name)
    assert cost(plane, lambda: sight.value(look)) < 20
    assert sight.value(look) == 99
    assert cost(plane, lambda: sight.value(look)) == 0
    host_program("import os, sys; os.setxattr(sys.argv[1], 'user.new', b'')", here / "8")
    eventually("what a program of the host has set is there", lambda: sight.value(look) == 98, LIMIT)
    sight.run(f"os.removexattr({here.name!r} + '/7', 'user.mine')")
    assert sight.value(look) == 99
    sight.run(f"os.setxattr({here.name!r} + '/9', 'user.own', b'')")
    assert sight.value(look) == 98


def host_program(code: str, *arguments: Path) -> None:
    subprocess.run([sys.executable, "-Sc", code, *map(str, arguments)], check=True)


def test_what_others_put_into_a_new_directory_is_seen(plane: Plane, sight: Sight, here: Path) -> None:
    """It is known to be empty, and so nothing that is looked for in it is asked for."""
    costs = []
    for number in range(20):
        name = f"{here.name}/{number}"
        looks = f"os.path.lexists({name!r} + '/x')"
        sight.run(f"os.mkdir({name!r})")
        calls = plane.calls()
        assert not sight.value(looks)
        costs.append(plane.calls() - calls)
        host_program("import sys; open(sys.argv[1], 'x')", plane.host / name / "x")
        end = time.monotonic() + LIMIT
        while not sight.value(looks):
            assert time.monotonic() < end
        assert sight.value(f"os.listdir({name!r})") == ["x"]
    assert costs.count(0) >= 15, costs  # of the directories above something may be asked now and then


def test_what_the_guest_made_it_knows(plane: Plane, sight: Sight, here: Path) -> None:
    sight.run(
        f"""
os.mkdir({here.name!r} + "/made")
for number in range(20):
    with open({here.name!r} + f"/made/{{number}}", "w") as file:
        file.write("content")
os.rename({here.name!r} + "/made/1", {here.name!r} + "/made/renamed")
os.symlink("2", {here.name!r} + "/made/link")
os.unlink({here.name!r} + "/made/3")
"""
    )
    agree(sight, plane.host, here.name)
    time.sleep(1.1)  # for a while after its own changes it does not trust what it knows of a directory
    free_in_the_end(plane, sight, here.name)


def test_what_was_written_beside_a_file_and_renamed_over_it(plane: Plane, sight: Sight, here: Path) -> None:
    """As git writes its index: to read it back and to look for the lock file again costs nothing, and what a program
    of the host writes to its end afterwards is seen all the same."""
    file, lock = f"{here.name}/file", f"{here.name}/file.lock"
    write = f"""
with open({lock!r}, "xb") as new:
    new.write(b"x" * 5000)
    new.write(b"end")
os.rename({lock!r}, {file!r})
"""
    look = f"[open({file!r}).read()[4999:], os.stat({file!r}).st_nlink, os.path.lexists({lock!r})]"
    costs = []
    for _ in range(20):
        sight.run(write)
        calls = plane.calls()
        assert sight.value(look) == ["xend", 1, False]
        costs.append(plane.calls() - calls)
    assert sum(costs) < 1.5 * len(costs), costs  # of the directories above it may ask now and then
    overwrite = "import os, sys; os.pwrite(os.open(sys.argv[1], os.O_WRONLY), b'END', 5000)"
    for _ in range(5):
        sight.run(write)
        host_program(overwrite, here / "file")
        eventually("it is seen", lambda: sight.value(look) == ["xEND", 1, False], LIMIT)
    sight.run(write)
    host_program("import sys; open(sys.argv[1], 'x')", here / "file.lock")
    eventually("the lock is seen", lambda: sight.value(look) == ["xend", 1, True], LIMIT)


def test_a_file_that_loses_a_name_is_known_by_the_other(plane: Plane, sight: Sight, here: Path) -> None:
    """Its attributes are kept after it was read, and the host says whose name it was."""
    name = here.name
    look = f"[open({name!r} + '/kept').read(), os.stat({name!r} + '/kept').st_nlink]"
    for number in range(10):
        (here / "kept").write_text(f"{number}")
        os.link(here / "kept", here / "other")
        (here / "third").write_text("third")
        eventually("both are seen", lambda number=number: sight.value(look) == [f"{number}", 2], LIMIT)  # type: ignore[misc]
        if number % 2:
            sight.value(f"os.stat({name!r} + '/other').st_size")
        if number % 3:
            sight.run(f"os.unlink({name!r} + '/other')")
        else:
            sight.run(f"os.rename({name!r} + '/third', {name!r} + '/other')")
        assert sight.value(look) == [f"{number}", 1]
        sight.run(f"[os.unlink({name!r} + '/' + each) for each in os.listdir({name!r})]")


@pytest.mark.parametrize("replaces", [False, True], ids=["in place", "as editors do"])
def test_an_edit_on_the_host_is_there_before_anybody_asks(
    plane: Plane, sight: Sight, here: Path, replaces: bool
) -> None:
    look = f"(os.stat({here.name!r}).st_mtime_ns, open({here.name + '/file'!r}).read())"
    file, draft = here / "file", here / "draft"
    numbers = itertools.count()

    def edit() -> bool:
        """Whether the guest has seen it, and asked for nothing."""
        (draft if replaces else file).write_text(content := f"edit {next(numbers)}")
        if replaces:
            draft.rename(file)
        time.sleep(0.1)
        before = plane.calls()
        _, seen = sight.value(look)
        free = plane.calls() == before
        sight.value(look)
        return free and seen == content

    edit()
    eventually("an edit costs nothing", edit, LIMIT)


# --- what changes ----------------------------------------------------------------------------------


@contextlib.contextmanager
def hands(here: Path) -> Iterator[Hands]:
    with loose_directory() as away, contextlib.ExitStack() as kept:
        assert away.stat().st_dev == here.stat().st_dev
        yield Hands(here, away, kept)


@contextlib.contextmanager
def recorded(plane: Plane, second: Sight, paths: list[str]) -> Iterator[None]:
    """Meanwhile another process of the guest's looks at ``paths`` all the time: what it once saw to be over never comes back."""
    stop = plane.directory / f"stop{next(_numbers)}"
    second.ask("record", paths, str(stop))
    try:
        yield
    finally:
        stop.touch()
        seen = second.answer()
    for path, views in zip(paths, seen, strict=True):
        for index, view in enumerate(views):
            assert view not in views[:index], f"{path}: seen again after {views[index - 1]}: {view}"


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_seen_and_stays_seen(
    plane: Plane, sight: Sight, second: Sight, here: Path, change: Change
) -> None:
    names = [
        "",
        "/file",
        "/link",
        "/directory",
        "/renamed",
        "/new",
        "/one",
        "/directory/file",
        "/directory/below/file",
    ]
    paths = [here.name + name for name in names]
    with hands(here) as both:
        steps = change.row(both)
        next(steps)
        agree(sight, plane.host, here.name)
        for path in paths:  # also of those that are not there something is known
            sight.look(path)
        if change.promised:
            free_in_the_end(plane, sight, here.name)
        over = False
        while not over:
            with recorded(plane, second, paths):
                over = next(steps, "over") == "over"
                agree(sight, plane.host, here.name)
                time.sleep(AFTERWARDS)
            assert differences(sight.tree(here.name), looker.tree(str(here))) == []
