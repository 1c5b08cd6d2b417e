"""Where folders of this machine are on another one."""

from __future__ import annotations

from pathlib import Path

import pytest

from host_agent.errors import UserError
from host_agent.remote.folders import chosen, together
from protocol.api import MountSpec

PRIVATE = Path("/nowhere/private")


def places(words: list[str], own: str, home: str = "/home/me") -> list[str]:
    return [spec.guest_path for spec in chosen(words, PRIVATE, home, own)]


def test_a_folder_of_the_home_is_in_the_home_there_and_any_other_at_the_same_path(tmp_path: Path) -> None:
    own, other = tmp_path / "own", tmp_path / "other"
    for folder in (own / "src", other):
        folder.mkdir(parents=True)
    assert places([f"{own}/src", str(other)], str(own)) == ["/home/me/src", str(other)]
    assert places([f"{own}/src:/srv/src:ro", f"{other}:~/there"], str(own)) == ["/srv/src", "/home/me/there"]
    assert places([f"{own}/src"], str(own), home="") == [f"{own}/src"], "whose home there is not known"


def test_nothing_hides_the_home_there(tmp_path: Path) -> None:
    for place in ("~", "/srv", "/srv/me"):
        with pytest.raises(UserError, match="it would hide your home"):
            chosen([f"{tmp_path}:{place}"], PRIVATE, "/srv/me")
    assert places([f"{tmp_path}:~/below"], "/", home="/srv/me") == ["/srv/me/below"]


def test_of_one_place_the_last_wish_counts() -> None:
    old, new, other = MountSpec("/a", "/srv/x"), MountSpec("/b", "/srv/x"), MountSpec("/c", "/srv/y")
    assert together([old, other], [new]) == (other, new)
