"""Symlinks: their targets are the kernel's once they were read (CACHE_SYMLINKS), and a target never changes in place.

So a cold link costs its READLINK, a warm one nothing, and what a program of the host puts in its place is another file,
which is told by its name, whatever number its inode has.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.files.harness import Plane, eventually
from tests.files.sight import Sight

LINKS = 100
LIMIT = 10.0

READ = "sorted((name, os.readlink(f'{here}/{name}')) for name in os.listdir(here))"
FOLLOW = "sorted((name, os.stat(f'{here}/{name}').st_size) for name in os.listdir(here))"

_numbers = itertools.count()


@pytest.fixture
def here(plane: Plane, sight: Sight) -> Iterator[Path]:
    """A directory of links, and beside it what they lead to."""
    path = plane.host / f"links{next(_numbers)}"
    path.mkdir()
    targets = path.with_name(f"{path.name}.targets")
    targets.mkdir()
    for number in range(LINKS):
        (targets / f"{number}").write_text("x" * number)
        (path / f"{number:03}").symlink_to(f"../{targets.name}/{number}")
    sight.run(f"here = {path.name!r}")
    yield path
    shutil.rmtree(path)
    shutil.rmtree(targets)


def cost(plane: Plane, sight: Sight, look: str) -> int:
    before = plane.calls()
    sight.value(look)
    return plane.calls() - before


def free_in_the_end(plane: Plane, sight: Sight, look: str) -> None:
    """What was read has made times of access unknown, which are asked for once."""
    eventually(f"{look} costs nothing", lambda: cost(plane, sight, look) == 0, LIMIT)


def targets(here: Path) -> list[list[str]]:
    """As JSON brings them."""
    return sorted([name, os.readlink(here / name)] for name in os.listdir(here))


def test_a_target_is_asked_for_once(plane: Plane, sight: Sight, here: Path) -> None:
    assert LINKS <= cost(plane, sight, READ) < LINKS + 10, "the names come together, the targets do not"
    free_in_the_end(plane, sight, READ)
    assert sight.value(READ) == targets(here)


def test_who_follows_links_asks_nobody_either(plane: Plane, sight: Sight, here: Path) -> None:
    free_in_the_end(plane, sight, FOLLOW)
    assert cost(plane, sight, READ) == 0, "the targets were read on the way"
    assert sight.value(FOLLOW) == [[f"{number:03}", number] for number in range(LINKS)]


def unlink_first(link: Path, target: str) -> None:
    """Most filesystems give the number of the inode out again."""
    link.unlink()
    link.symlink_to(target)


def rename_over(link: Path, target: str) -> None:
    draft = link.with_name("draft")
    draft.symlink_to(target)
    draft.rename(link)


@pytest.mark.parametrize("change", [unlink_first, rename_over])
def test_a_link_that_leads_elsewhere_is_seen(plane: Plane, sight: Sight, here: Path, change: object) -> None:
    sight.value(READ)
    sight.value(FOLLOW)
    changed = [f"{number:03}" for number in range(0, LINKS, 10)]
    for name in changed:
        change(here / name, f"../{here.name}.targets/99")  # type: ignore[operator]
    eventually("the new targets are seen", lambda: sight.value(READ) == targets(here), LIMIT)
    sizes = dict(sight.value(FOLLOW))
    assert all(sizes[name] == 99 for name in changed)
    free_in_the_end(plane, sight, READ)


def test_one_change_costs_the_others_nothing(plane: Plane, sight: Sight, here: Path) -> None:
    free_in_the_end(plane, sight, READ)
    rename_over(here / "050", "elsewhere")
    look = f"os.readlink('{here.name}/050')"
    eventually("it is seen", lambda: sight.value(look) == "elsewhere", LIMIT)
    assert cost(plane, sight, READ) < 10, "the directory and one link, not all of them"


def test_links_of_the_guest_itself(plane: Plane, sight: Sight, here: Path) -> None:
    sight.run("os.symlink('one', here + '/own')")
    assert sight.value("os.readlink(here + '/own')") == "one"
    sight.run("os.symlink('two', here + '/draft'); os.rename(here + '/draft', here + '/own')")
    assert sight.value("os.readlink(here + '/own')") == "two" == os.readlink(here / "own")
    free_in_the_end(plane, sight, "os.readlink(here + '/own')")
