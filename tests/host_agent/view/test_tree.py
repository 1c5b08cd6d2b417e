from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from host_agent.view.tree import Directory, Place, Tree, components
from protocol.files import Share


def tree(*paths: str) -> Tree:
    return Tree(Share(number, path) for number, path in enumerate(paths, 1))


def names(directory: Directory | Place) -> list[bytes]:
    assert isinstance(directory, Directory)
    return list(directory.entries)


def test_places_are_below_the_directories_of_their_paths() -> None:
    made = tree("/volumes/db", "/volumes/cache", "/images/ghcr.io/team/app:1", "/data")
    assert names(made.root) == [b"volumes", b"images", b"data"]
    found = made.find(b"/volumes")
    assert found is not None
    assert names(found[0]) == [b"db", b"cache"]
    assert made.find(b"/images/ghcr.io/team/app:1/etc/passwd") == (made.places[2], (b"etc", b"passwd"))
    assert made.find(b"/data") == (made.places[3], ())
    assert made.find(b"/volumes/other") is None


@pytest.mark.parametrize(
    "path",
    ["", "/", "volumes/x", "//x", "/..", "/a/../b", "/a/.", "/a//b", "/a/\0", "/" + "x" * 256, "/a" * 17],
)
def test_a_path_that_is_none_is_not_there(path: str) -> None:
    assert tree(path, "/fine").places == [Place(2, (b"fine",), False)]


def test_no_place_lies_in_another_one_or_hides_it() -> None:
    assert [place.path for place in tree("/a", "/a/b", "/c/d", "/c", "/c/d").places] == [
        (b"a",),
        (b"c", b"d"),
    ]


def test_a_refused_path_leaves_no_directories_behind() -> None:
    assert names(tree("/a", "/a/b/c/d").root) == [b"a"]


def test_a_number_is_one_places() -> None:
    shares = [Share(7, "/a"), Share(7, "/b"), Share(0, "/c"), Share(-1, "/d")]
    assert [place.path for place in Tree(shares).places] == [(b"a",)]


@given(st.lists(st.text(alphabet="/.ab\0", max_size=12), max_size=12))
def test_whatever_the_guest_says_each_place_is_found_by_its_path_and_no_other(paths: list[str]) -> None:
    made = tree(*paths)
    for place in made.places:
        assert made.find(b"/" + b"/".join(place.path)) == (place, ())
        assert components("/" + b"/".join(place.path).decode()) == place.path
        assert not {b"", b".", b".."} & set(place.path)


def test_all_paths_together_fit_into_a_message() -> None:
    long = ["/" + "/".join([f"{number:03}", *["n" * 255] * 15]) for number in range(70)]
    tree = Tree([Share(number + 1, path) for number, path in enumerate(long)])
    assert 40 < len(tree.places) < 60
