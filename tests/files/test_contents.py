"""Files whose contents come before they are asked for: fewer messages, and never what is not so any more."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.files.harness import Plane, eventually

FILES = 100

_numbers = itertools.count()


@pytest.fixture
def here(plane: Plane) -> Iterator[Path]:
    """A directory of small files."""
    path = plane.host / f"contents{next(_numbers)}"
    path.mkdir()
    for number in range(FILES):
        (path / f"{number:03}").write_text(f"{number} as it was\n")
    yield path
    shutil.rmtree(path)


def cost(plane: Plane, script: str) -> tuple[int, str]:
    """Messages, and what was said."""
    before = plane.calls()
    said = plane.sh(script)
    return plane.calls() - before, said


def whole(path: Path) -> str:
    return "".join(sorted(file.read_text() for file in path.iterdir()))


@pytest.mark.parametrize("order", ["", "| sort", "| sort -r"])
def test_who_reads_a_directory_does_not_wait_for_each_file(plane: Plane, here: Path, order: str) -> None:
    script = f"ls -U {here.name} {order} | while read f; do cat {here.name}/$f; done | LC_ALL=C sort"
    calls, said = cost(plane, script)
    assert said == whole(here)
    assert calls < (FILES if order else FILES // 4)


def test_in_the_order_of_inode_numbers_as_well(plane: Plane, here: Path) -> None:
    script = f"find {here.name} -type f -printf '%i %p\\n' | sort -n | while read i f; do cat $f; done | LC_ALL=C sort"
    calls, said = cost(plane, script)
    assert said == whole(here)
    assert calls < FILES // 2


def test_what_the_host_changes_is_read_as_it_is(plane: Plane, here: Path) -> None:
    read = f"cd {here.name}; cat * | LC_ALL=C sort"
    names = plane.sh(f"ls -U {here.name}").split()
    plane.sh(f"cat {here.name}/{names[0]}")  # others have come with it
    for name in names:
        (here / name).write_text(f"{name} as it is now, and longer\n")
    eventually("the new content is read", lambda: plane.sh(read) == whole(here))
    assert plane.sh(read) == whole(here)


def test_what_the_guest_writes_is_read_as_it_is(plane: Plane, here: Path) -> None:
    names = plane.sh(f"ls -U {here.name}").split()
    said = plane.sh(
        f"cd {here.name}; cat {names[0]} >/dev/null\n"
        f"echo new >{names[1]}; echo more >>{names[2]}; truncate -s 2 {names[3]}; mv {names[0]} {names[4]}\n"
        f"cat {names[1]} {names[2]} {names[3]} {names[4]}"
    )
    assert said == "".join((here / names[number]).read_text() for number in (1, 2, 3, 4))


@pytest.mark.parametrize("side", ["server", "agent"])
def test_what_came_ahead_ends_with_the_session(plane: Plane, here: Path, side: str) -> None:
    names = plane.sh(f"ls -U {here.name}").split()
    plane.sh(f"cat {here.name}/{names[0]}")
    if side == "server":
        plane.server.kill()
        for name in names:
            (here / name).write_text(f"{name} as it is now\n")
        plane.start_server()
    else:
        plane.agent.kill()
        for name in names:
            (here / name).write_text(f"{name} as it is now\n")
        plane.agent.start()
    read = f"cd {here.name}; cat * | LC_ALL=C sort"
    eventually("the new content is read", lambda: plane.sh(read) == whole(here))
