"""Names of extended attributes of several files in one answer, and what of it is promised."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from protocol.files import ATTRIBUTES, MAX_MANY, ROOT, ListXattr, SetXattr, XattrNames
from tests.fileserver.served import refused, serving
from tests.fileserver.test_contents import Scene


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    with ExitStack() as stack:
        yield Scene(tmp_path, stack)


def ask(scene: Scene, node: int, others: list[int]) -> Any:
    return scene.share.tree.perform(scene.share.call(ListXattr, node, others))


def said(scene: Scene, outcome: Any) -> XattrNames:
    """In an answer that is sent now."""
    scene.lane.turn()
    names: XattrNames = outcome.promise.settled(
        outcome.value, partial(scene.share.tree.promised, outcome.value)
    )
    return names


def test_who_has_none_is_said(scene: Scene) -> None:
    a, b, c = scene.make("a", "b", "c")
    (scene.place / "d").mkdir()
    directory = scene.share.node("d")
    scene.share.ask(SetXattr, b, b"user.x", b"value")
    assert said(scene, ask(scene, a, [b, c, 4711, directory, ROOT])) == XattrNames(
        b"", ATTRIBUTES, [c, directory, ROOT]
    )
    assert said(scene, ask(scene, b, [])) == XattrNames(b"user.x\0", ATTRIBUTES, [])


@pytest.mark.parametrize("commands", ["chmod 600 {}", "mv {} z", "rm {}"])
def test_what_changes_before_the_answer_is_sent_is_not(scene: Scene, commands: str) -> None:
    a, b, c = scene.make("a", "b", "c")
    outcome = ask(scene, a, [b, c])
    scene.stranger(commands.format("b"))
    assert said(scene, outcome) == XattrNames(b"", ATTRIBUTES, [c])
    outcome = ask(scene, a, [c])
    scene.stranger(commands.format("a"))
    assert said(scene, outcome) == XattrNames(b"", 0, [c])


def test_without_watches_nothing_is_promised(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    (tmp_path / "b").touch()
    os.setxattr(tmp_path / "a", "user.x", b"")
    with serving(tmp_path) as share:
        assert share.ask(ListXattr, share.node("a"), [share.node("b")]) == XattrNames(b"user.x\0")


def test_more_than_can_be_asked_for(scene: Scene) -> None:
    assert refused(lambda: ask(scene, ROOT, [2] * (MAX_MANY + 1))) == "EINVAL"
