"""The judge is a walk as the kernel does it: of a tree of directories in which every symlink is shown as we would."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from host_agent.view.symlinks import shown, shown_in


@pytest.mark.parametrize(
    "target", [b"file", b"deep/file", b"../file", b"../../x", b"./file", b"a//b", b"dir/", b"..", b"."]
)
def test_a_target_inside_is_shown_as_it_is(target: bytes) -> None:
    assert shown(target, 2) == target


@pytest.mark.parametrize(
    ("target", "depth", "seen"),
    [
        (b"/etc/passwd", 0, b"etc/passwd"),
        (b"/etc/passwd", 2, b"../../etc/passwd"),
        (b"/", 0, b"."),
        (b"/", 3, b"../../.."),
        (b"/a/../../b", 1, b"../b"),
        (b"../x", 0, b"x"),
        (b"../../../etc/shadow", 1, b"../etc/shadow"),
        (b"a/../b", 0, b"b"),
        (b"a/../../../b", 1, b"../b"),
    ],
)
def test_what_leads_out_ends_at_the_root_of_the_place(target: bytes, depth: int, seen: bytes) -> None:
    assert shown(target, depth) == seen


def test_an_absolute_target_below_the_places_own_path_is_below_it() -> None:
    assert shown(b"/home/ann/bin/x", 1, (b"home", b"ann")) == b"../bin/x"
    assert shown(b"/home/bob/x", 0, (b"home", b"ann")) == b"home/bob/x"


def test_where_the_root_is_a_place_absolute_targets_lead_there() -> None:
    assert shown_in(b"/etc/../usr/x", 1, (b"home", b"ann"), (b"machine",)) == b"../../../machine/usr/x"
    assert shown_in(b"../../x", 1, (b"home", b"ann"), (b"machine",)) == b"../x"


def walk(links: dict[tuple[bytes, ...], bytes], path: tuple[bytes, ...], target: bytes) -> int:
    """How far above the place's root a walk comes (0: never), from the directory of the link at ``path``."""
    here, todo, followed, worst = list(path[:-1]), target.split(b"/"), 0, 0
    while todo and followed < 40:
        word = todo.pop(0)
        if word in (b"", b"."):
            continue
        if word == b"..":
            if not here:
                worst += 1
                return worst
            here.pop()
            continue
        below = (*here, word)
        if below in links:
            followed += 1
            todo = shown(links[below], len(below) - 1).split(b"/") + todo
            assert not shown(links[below], len(below) - 1).startswith(b"/")
        else:
            here.append(word)
    return worst


NAMES = st.sampled_from([b"a", b"b"])
PATHS = st.lists(NAMES, min_size=1, max_size=4).map(tuple)
TARGETS = st.lists(st.sampled_from([b"a", b"b", b"..", b".", b""]), min_size=1, max_size=8).map(b"/".join)


@settings(max_examples=400)
@given(st.dictionaries(PATHS, TARGETS.filter(bool), max_size=6), PATHS, TARGETS.filter(bool))
def test_no_chain_of_symlinks_climbs_out(
    links: dict[tuple[bytes, ...], bytes], path: tuple[bytes, ...], target: bytes
) -> None:
    seen = shown(target, len(path) - 1)
    assert not seen.startswith(b"/")
    assert walk(links, path, seen) == 0
