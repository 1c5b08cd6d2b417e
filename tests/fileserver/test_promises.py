"""What is promised, what breaks a promise before it is made, and that whatever others do is told."""

from __future__ import annotations

import os
import stat
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fileserver import linux
from fileserver.nodes import Node
from fileserver.promises import UNCERTAIN, Promise, fingerprint, remembered
from fileserver.retractions import Retraction
from fileserver.tree import Tree
from protocol.files import (
    ATTR,
    ATTRIBUTES,
    EMPTY,
    NAME,
    ROOT,
    SET_MODE,
    Changed,
    Create,
    Entry,
    GetAttributes,
    List,
    Lookup,
    MakeDirectory,
    MakeLink,
    MakeNode,
    MakeSymlink,
    Read,
    RemoveDirectory,
    Rename,
    Renamed,
    SetAttributes,
    Unlink,
    Write,
)
from tests.fileserver.peers import SHARE, until
from tests.fileserver.scene import Connected, Gate, connected
from tests.fileserver.served import Served, serving
from tests.fileserver.watched import Watched, answer, promised

BOTH = NAME | ATTRIBUTES
EXCHANGE = 2


@pytest.fixture
def watched() -> Watched:
    return Watched()


@pytest.fixture
def share(tmp_path: Path, watched: Watched) -> Iterator[Served]:
    (tmp_path / "f").write_text("f")
    (tmp_path / "d").mkdir()
    with serving(tmp_path, watches=watched) as served:
        yield served


def node(share: Served, number: int) -> Node:
    found = share.tree._core.reach.peek(number)
    assert found is not None
    return found


# --- what is promised --------------------------------------------------------------------------------


def test_what_is_looked_up(share: Served) -> None:
    for name in (b"f", b"d"):
        for _ in range(2):
            assert promised(share, answer(share, Lookup, ROOT, name)) == BOTH
    absent = answer(share, Lookup, ROOT, b"absent")
    assert absent.value == Entry(0, b"")
    assert promised(share, absent) == NAME
    assert promised(share, answer(share, GetAttributes, ROOT)) == ATTRIBUTES
    assert promised(share, answer(share, GetAttributes, share.node("f"))) == ATTRIBUTES
    assert promised(share, answer(share, List, ROOT, 0, 0)) == NAME


def test_the_directory_in_which_the_guest_has_changed_a_name(share: Served) -> None:
    """Its attributes come with that, since they are asked for next. They are in no answer that is remembered."""
    root = node(share, ROOT)
    file = share.node("f")
    for kind, fields in [
        (Create, (ROOT, b"new", 0o644, os.O_EXCL)),
        (MakeDirectory, (ROOT, b"directory", 0o755)),
        (MakeNode, (ROOT, b"fifo", stat.S_IFIFO | 0o644)),
        (MakeSymlink, (ROOT, b"link", b"f")),
        (MakeLink, (file, ROOT, b"hard")),
        (Unlink, (ROOT, b"new")),
        (RemoveDirectory, (ROOT, b"directory")),
        (Rename, (ROOT, b"f", ROOT, b"g")),
    ]:
        root.given = 0
        outcome = answer(share, kind, *fields)
        assert isinstance(outcome.promise, Promise)
        now: Any = share.ask(GetAttributes, ROOT)
        assert outcome.promise.above == now.attr
        assert outcome.value.above == b""  # type: ignore[union-attr]
        assert promised(share, outcome) & NAME, kind
        assert root.given, "what the agent has is looked at again when nothing stands any more"
    taken = answer(share, Create, ROOT, b"g", 0o644, 0)
    assert isinstance(taken.promise, Promise)
    assert taken.promise.above == b""


def test_what_the_guest_makes(share: Served) -> None:
    file = share.node("f")
    for kind, fields in [
        (Create, (ROOT, b"new", 0o644, os.O_EXCL)),
        (Create, (ROOT, b"f", 0o644, 0)),
        (MakeSymlink, (ROOT, b"link", b"f")),
        (MakeLink, (file, ROOT, b"hard")),
    ]:
        assert promised(share, answer(share, kind, *fields)) == BOTH, kind
    moved = answer(share, Rename, ROOT, b"f", share.node("d"), b"g")
    assert promised(share, moved) == BOTH
    assert moved.value.node == file  # type: ignore[union-attr]
    assert moved.value.attr == share.ask(GetAttributes, file).attr  # type: ignore[union-attr]
    assert not moved.value.gone, "another directory vouches for that name"  # type: ignore[union-attr]
    swapped = answer(share, Rename, ROOT, b"new", ROOT, b"hard", EXCHANGE)
    assert promised(share, swapped) == NAME


def renamed(share: Served, name: bytes, new: bytes) -> Renamed:
    outcome = answer(share, Rename, ROOT, name, ROOT, new)
    assert isinstance(outcome.value, Renamed)
    bits = promised(share, outcome)
    return replace(
        outcome.value, promise=bits, above=b"" if outcome.promise is None else outcome.promise.above
    )


def test_what_was_written_and_renamed_is_as_the_guest_has_it(share: Served) -> None:
    """Who has written a lock file over another reads that, and makes the lock file again."""
    made = answer(share, Create, ROOT, b"f.lock", 0o644, os.O_EXCL).value.node  # type: ignore[union-attr]
    share.tree.perform(share.call(Write, made, 0), b"content")
    moved = renamed(share, b"f.lock", b"f")
    assert (moved.node, moved.promise, moved.gone) == (made, BOTH, True)
    assert moved.attr == share.ask(GetAttributes, made).attr
    assert moved.above == share.ask(GetAttributes, ROOT).attr


def test_what_somebody_else_has_made_again_is_not_gone(
    share: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = linux.renameat2

    def rename_and_more(*arguments: Any) -> None:
        rename(*arguments)
        (share.path / "f").touch()

    share.node("f")
    monkeypatch.setattr(linux, "renameat2", rename_and_more)
    moved = renamed(share, b"f", b"g")
    assert not moved.gone
    assert moved.above == b""


def test_of_what_is_open_for_writing_a_rename_promises_no_attributes(share: Served) -> None:
    file = share.node("f")
    with (share.path / "f").open("r+b"):
        share.ask(Read, file, 0, 1)  # it has the file open, says the lease
        moved = renamed(share, b"f", b"g")
    assert (moved.promise, moved.gone) == (NAME, True)


def test_what_the_guest_has_other_data_of_is_not_promised_by_a_rename(
    share: Served, watched: Watched
) -> None:
    """The next question is to be answered with the alarm."""
    file = share.node("f")
    share.ask(Read, file, 0, 1)
    (share.path / "f").write_text("longer")
    assert renamed(share, b"f", b"g").promise == NAME


def test_a_directory_that_was_just_made_is_empty(share: Served) -> None:
    assert promised(share, answer(share, MakeDirectory, ROOT, b"made", 0o755)) == BOTH | EMPTY
    made = answer(share, MakeDirectory, ROOT, b"another", 0o755)
    assert isinstance(made.promise, Promise)
    assert made.promise.node is not None
    share.tree.promises.changed(None, made.promise.node)  # as what happens in it moves it
    assert promised(share, made) == NAME
    assert promised(share, answer(share, Lookup, ROOT, b"made")) == BOTH


def test_or_not_if_somebody_was_faster(share: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before its mark was there."""
    mkdir = os.mkdir

    def mkdir_and_more(name: bytes, mode: int, *, dir_fd: int) -> None:
        mkdir(name, mode, dir_fd=dir_fd)
        (share.path / os.fsdecode(name) / "x").touch()

    monkeypatch.setattr(os, "mkdir", mkdir_and_more)
    assert promised(share, answer(share, MakeDirectory, ROOT, b"made", 0o755)) == BOTH


def test_without_marks_nothing_is_promised(share: Served, watched: Watched) -> None:
    watched.full = True
    assert promised(share, answer(share, Lookup, ROOT, b"f")) == 0
    assert promised(share, answer(share, GetAttributes, ROOT)) == 0
    assert share.refused(Lookup, ROOT, b"absent") == "ENOENT"


def test_a_file_without_a_mark_has_a_name(share: Served, watched: Watched) -> None:
    share.node("d")
    watched.full = True
    assert promised(share, answer(share, Lookup, ROOT, b"f")) == NAME


def test_what_is_on_another_filesystem_is_not_promised(
    share: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mounts come and go without an event in the directory."""
    real = share.tree._core.reach.devices.key
    monkeypatch.setattr(
        share.tree._core.reach, "key", lambda status, descriptor: (1, *real(status, descriptor)[1:])
    )
    assert promised(share, answer(share, Lookup, ROOT, b"d")) == 0


def test_a_sealed_directory_is_not_promised(tmp_path: Path) -> None:
    (tmp_path / "sealed").mkdir()
    with serving(tmp_path, watches=Watched(), hidden=[tmp_path / "sealed"]) as share:
        assert promised(share, answer(share, Lookup, ROOT, b"sealed")) == 0
        assert promised(share, answer(share, GetAttributes, share.node("sealed"))) == 0
        assert promised(share, answer(share, List, share.node("sealed"), 0, 0)) == 0


# --- what breaks it ----------------------------------------------------------------------------------


def move_root(share: Served, watched: Watched) -> None:
    watched.moved(node(share, ROOT), None)


def void(share: Served, watched: Watched) -> None:
    watched.epoch += 1


def make_a_name(share: Served, watched: Watched) -> None:
    answer(share, Create, ROOT, b"made", 0o644, os.O_EXCL)


def remove_a_name(share: Served, watched: Watched) -> None:
    answer(share, Unlink, ROOT, b"f")


@pytest.mark.parametrize("event", [move_root, void, make_a_name, remove_a_name])
def test_what_was_read_before_is_not_promised_after(
    share: Served, watched: Watched, event: Callable[[Served, Watched], None]
) -> None:
    name, absent = answer(share, Lookup, ROOT, b"d"), answer(share, Lookup, ROOT, b"absent")
    attributes, listing = answer(share, GetAttributes, ROOT), answer(share, List, ROOT, 0, 0)
    event(share, watched)
    assert promised(share, name) & NAME == 0
    assert [promised(share, each) for each in (absent, attributes, listing)] == [0, 0, 0]
    assert promised(share, answer(share, Lookup, ROOT, b"absent")) == NAME, "and what is read now is"


def test_a_file_that_loses_a_name_is_read_again(share: Served) -> None:
    """The guest's own unlink or rename changes nlink and ctime of what may have been asked for just before."""
    file = share.node("f")
    answer(share, MakeLink, file, ROOT, b"hard")
    for kind, fields in [
        (Unlink, (ROOT, b"hard")),
        (Rename, (ROOT, b"f", ROOT, b"g")),
        (Unlink, (ROOT, b"g")),
    ]:
        before = answer(share, GetAttributes, file)
        answer(share, kind, *fields)
        assert promised(share, before) == 0, fields
        assert promised(share, answer(share, GetAttributes, file)) == ATTRIBUTES


def test_a_name_that_a_program_of_the_host_took_meanwhile(
    share: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its event came before the guest's own change was done with: only what is read after that can be promised."""
    real = linux.renameat2

    def renameat2(*arguments: Any) -> None:
        real(*arguments)
        (share.path / "other").write_text("other")
        os.rename(share.path / "other", share.path / "g")

    monkeypatch.setattr(linux, "renameat2", renameat2)
    share.node("f")
    assert promised(share, answer(share, Rename, ROOT, b"f", ROOT, b"g")) == 0


def test_a_file_that_is_gone_before_the_answer(share: Served) -> None:
    found = answer(share, Lookup, ROOT, b"f")
    share.forget(found.value.node)  # type: ignore[union-attr]
    assert promised(share, found) & ATTRIBUTES == 0


def test_an_alarm_that_is_put_off_is_no_promise(share: Served, watched: Watched) -> None:
    """A larger size raises none (``signatures``); the next answer does, and drops what the guest has."""
    file = share.node("f")
    share.ask(GetAttributes, file)
    share.bytes(Read, file, 0, 10)
    (share.path / "f").write_text("longer")
    assert promised(share, answer(share, GetAttributes, file)) == 0
    alarm = answer(share, GetAttributes, file)
    assert alarm.value.stale  # type: ignore[union-attr]
    assert promised(share, alarm) == ATTRIBUTES


# --- what is remembered ------------------------------------------------------------------------------


def test_what_is_promised_is_remembered(share: Served) -> None:
    os.utime(share.path / "f", ns=(0, 10**18))
    entry = answer(share, Lookup, ROOT, b"f")
    assert promised(share, entry)
    file = node(share, entry.value.node)  # type: ignore[union-attr]
    assert file.given == UNCERTAIN, "it has just changed"
    attr = list(ATTR.unpack(entry.value.attr))  # type: ignore[union-attr]
    attr[5] -= 100  # ctime
    old = ATTR.pack(*attr)
    assert remembered(old) == fingerprint(old) > 0
    for index, differs in [
        (2, False),
        (3, False),
        (6, False),
        (1, True),
        (4, True),
        (8, True),
        (9, True),
        (10, True),
    ]:
        changed = ATTR.pack(*(field + (at == index) for at, field in enumerate(attr)))
        assert (fingerprint(changed) != fingerprint(old)) == differs


# --- told --------------------------------------------------------------------------------------------


def elsewhere(root: Path, command: str) -> None:
    """Another program of the host's."""
    subprocess.run(["sh", "-ec", command], cwd=root, check=True)


class Heard:
    """What a guest was told, all together."""

    def __init__(self, guest: Connected) -> None:
        self._guest = guest
        self._all: list[Changed] = []

    def _now(self) -> list[Changed]:
        self._all += self._guest.kernel.changes()
        return self._all

    def names(self) -> set[tuple[int, bytes]]:
        return {item for told in self._now() for item in zip(told.parents, told.names, strict=True)}

    def nodes(self) -> set[tuple[int, int]]:
        return {item for told in self._now() for item in zip(told.nodes, told.through, strict=True)}

    def directories(self) -> set[tuple[int, int]]:
        return {item for told in self._now() for item in zip(told.directories, told.above, strict=True)}


@pytest.mark.parametrize(
    ("command", "names", "nodes", "directories"),
    [
        ("echo more >> f", [], ["f"], []),
        ("chmod 600 f", [], ["f"], []),
        ("ln f ../hard", [], ["f"], []),
        ("echo more > hard", [], ["f"], []),
        ("touch new", ["new"], [], ["."]),
        ("rm f", ["f"], ["f"], ["."]),
        ("mv f d/g", ["f", "d/g"], ["f"], [".", "d"]),
        ("mv other f", ["f", "other"], ["f"], ["."]),
        ("rmdir d", ["d"], [], [".", "d"]),
        ("chmod 700 d", [], [], ["d"]),
        ("touch d/new", ["d/new"], [], ["d"]),
        ("touch . -d 2001-01-01", [], [], ["."]),
    ],
)
async def test_what_others_do_is_told(
    place: Path, command: str, names: list[str], nodes: list[str], directories: list[str]
) -> None:
    async with connected(place) as guest:
        elsewhere(guest.root, "mkdir d; echo f > f; echo o > other; ln f hard")
        known = {name: (await guest.kernel.lookup(name.encode())).node for name in ("f", "d")}
        known["."] = ROOT
        for number in known.values():
            await guest.kernel.ask(GetAttributes(SHARE, guest.kernel.unique(), number))
        guest.kernel.changes()
        heard = Heard(guest)
        elsewhere(guest.root, command)
        expected = {(known[os.path.dirname(name) or "."], os.path.basename(name).encode()) for name in names}
        await until(lambda: heard.names() >= expected)
        await until(lambda: {node for node, _ in heard.nodes()} >= {known[name] for name in nodes})
        await until(
            lambda: {node for node, _ in heard.directories()} >= {known[name] for name in directories}
        )
        assert (known["f"], 0) not in heard.nodes()


async def test_what_the_guest_does_is_not_told(place: Path) -> None:
    async with connected(place) as guest:
        kernel = guest.kernel
        await kernel.ask(GetAttributes(SHARE, kernel.unique(), ROOT))
        entry = await guest.create(b"new")
        assert entry.promise == BOTH
        await kernel.ask(Write(SHARE, kernel.unique(), entry.node, 0), b"content")
        await kernel.ask(SetAttributes(SHARE, kernel.unique(), entry.node, SET_MODE, mode=0o600))
        moved = await kernel.ask(Rename(SHARE, kernel.unique(), ROOT, b"new", ROOT, b"newer"))
        assert moved.promise & NAME
        assert moved.node == entry.node
        await kernel.ask(Unlink(SHARE, kernel.unique(), ROOT, b"newer"))
        elsewhere(guest.root, "touch last")
        heard = Heard(guest)
        await until(lambda: heard.names() == {(ROOT, b"last")})
        assert not heard.nodes()


async def test_what_was_told_before_an_answer_is_not_promised_by_it(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread has looked; then the file changes, and the guest is told; then the thread's answer is sent."""
    async with connected(place) as guest:
        (guest.root / "slow").write_text("before")
        gate = Gate(monkeypatch, Lookup, done=True)
        pending = guest.kernel.begin(Lookup(SHARE, guest.kernel.unique(), ROOT, b"slow"))
        await until(lambda: gate.begun)
        elsewhere(guest.root, "echo after >> slow; touch new")
        heard = Heard(guest)
        await until(lambda: heard.nodes() and heard.names())
        gate.open()
        result = await guest.kernel.finish(pending)
        assert result.value[3] == 0  # type: ignore[index]


async def test_the_directory_s_attributes_are_in_the_answer_if_they_stand(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with connected(place) as guest:
        kernel = guest.kernel
        mkdir = MakeDirectory(SHARE, kernel.unique(), ROOT, b"d", 0o755)
        made, again = await kernel.ask(mkdir), await kernel.ask(mkdir)
        removed = await kernel.ask(RemoveDirectory(SHARE, kernel.unique(), ROOT, b"d"))
        there = await kernel.ask(GetAttributes(SHARE, kernel.unique(), ROOT))
        assert removed.above == there.attr
        assert ATTR.unpack(made.above)[10] == ATTR.unpack(there.attr)[10] + 1, (
            "a link for the directory in it"
        )
        assert (again.node, again.above) == (made.node, b"")
        (guest.root / "f").touch()
        gate = Gate(monkeypatch, Unlink, done=True)
        pending = kernel.begin(Unlink(SHARE, kernel.unique(), ROOT, b"f"))
        await until(lambda: gate.begun)
        elsewhere(guest.root, "touch new")
        heard = Heard(guest)
        await until(lambda: (ROOT, b"new") in heard.names())
        gate.open()
        above, promise, _ = (await kernel.finish(pending)).value
        assert (above, promise) == (b"", 0)


async def test_that_a_name_is_gone_is_promised(place: Path) -> None:
    async with connected(place) as guest:
        kernel = guest.kernel
        for make, remove in ((Path.touch, Unlink), (Path.mkdir, RemoveDirectory)):
            make(guest.root / "lock")
            call = remove(SHARE, kernel.unique(), ROOT, b"lock")
            first, again = await kernel.ask(call), await kernel.ask(call)
            assert (first.promise, again.promise) == (NAME, 0)
        heard = Heard(guest)
        elsewhere(guest.root, "touch lock")
        await until(lambda: (ROOT, b"lock") in heard.names())


async def test_that_somebody_has_made_another_is_told_or_not_promised(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, before anybody has looked: by a call that is done in trio's thread it is told after the answer."""
    removed = os.unlink

    def overtaken(name: bytes, *, dir_fd: int) -> None:
        removed(name, dir_fd=dir_fd)
        elsewhere(guest.root, "touch lock")

    async with connected(place) as guest:
        (guest.root / "lock").touch()
        await guest.kernel.ask(GetAttributes(SHARE, guest.kernel.unique(), ROOT))
        guest.kernel.changes()
        monkeypatch.setattr("fileserver.names.os.unlink", overtaken)
        gone = await guest.kernel.ask(Unlink(SHARE, guest.kernel.unique(), ROOT, b"lock"))
        monkeypatch.undo()
        heard = Heard(guest)
        if gone.promise:
            await until(lambda: (ROOT, b"lock") in heard.names())


@pytest.mark.parametrize("told", [False, True])
async def test_one_that_was_heard_of_before_the_answer_is_not_promised(
    place: Path, monkeypatch: pytest.MonkeyPatch, told: bool
) -> None:
    """A thread does it, so that the change may be handled, and told, before the token is taken."""
    removed = os.unlink
    overtaken, go_on = threading.Event(), threading.Event()

    def slowly(name: bytes, *, dir_fd: int) -> None:
        removed(name, dir_fd=dir_fd)
        overtaken.set()
        go_on.wait(20)

    async with connected(place) as guest:
        (guest.root / "lock").touch()
        await guest.kernel.ask(GetAttributes(SHARE, guest.kernel.unique(), ROOT))
        guest.kernel.changes()
        monkeypatch.setattr("fileserver.prompt.KINDS", frozenset())
        monkeypatch.setattr("fileserver.names.os.unlink", slowly)
        pending = guest.kernel.begin(Unlink(SHARE, guest.kernel.unique(), ROOT, b"lock"))
        await until(overtaken.is_set)
        if told:
            elsewhere(guest.root, "touch lock")
            heard = Heard(guest)
            await until(lambda: (ROOT, b"lock") in heard.names())
        go_on.set()
        _, promise, _ = (await guest.kernel.finish(pending)).value
        assert promise == (0 if told else NAME)


async def test_of_what_is_made_neither(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same of a new file, which another one has replaced."""
    opened = os.open
    overtaken, go_on = threading.Event(), threading.Event()

    def slowly(path: Any, flags: int, *arguments: Any, **named: Any) -> int:
        made = opened(path, flags, *arguments, **named)
        if flags & os.O_EXCL:
            overtaken.set()
            go_on.wait(20)
        return made

    async with connected(place) as guest:
        await guest.kernel.ask(GetAttributes(SHARE, guest.kernel.unique(), ROOT))
        guest.kernel.changes()
        monkeypatch.setattr("fileserver.prompt.KINDS", frozenset())
        monkeypatch.setattr("fileserver.names.os.open", slowly)
        create = Create(SHARE, guest.kernel.unique(), ROOT, b"new", 0o644, os.O_EXCL)
        pending = guest.kernel.begin(create)
        await until(overtaken.is_set)
        elsewhere(guest.root, "touch other; mv other new")
        heard = Heard(guest)
        await until(lambda: (ROOT, b"new") in heard.names())
        go_on.set()
        assert Entry(*(await guest.kernel.finish(pending)).value).promise & NAME == 0


async def test_a_name_that_is_not_there_is_enoent_if_it_cannot_be_promised(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tree, "promised", lambda *_: 0)
    async with connected(place) as guest:
        with pytest.raises(FileNotFoundError):
            await guest.kernel.ask(Lookup(SHARE, guest.kernel.unique(), ROOT, b"absent"))


async def test_what_is_answered_twice_is_promised_once(place: Path) -> None:
    """The second answer may be older than what was told after the first."""
    async with connected(place) as guest:
        create = Create(SHARE, guest.kernel.unique(), ROOT, b"new", 0o644, os.O_EXCL)
        first, second = await guest.kernel.ask(create), await guest.kernel.ask(create)
        assert (first.promise, second.promise) == (BOTH, 0)
        assert first.node == second.node


# --- another root ------------------------------------------------------------------------------------


def test_the_old_name_of_a_directory_that_was_found_by_its_new_one_is_told(tmp_path: Path) -> None:
    """The move is heard of afterwards, when nothing is known by that name, which the guest's kernel knows for ever."""
    for name in "from/moved", "to":
        (tmp_path / name).mkdir(parents=True)
    told: list[Retraction] = []
    with serving(tmp_path, retract=told.append) as share:
        old, new, moved = (share.node(name) for name in ("from", "to", "from/moved"))
        (tmp_path / "from/moved").rename(tmp_path / "to/moved")
        for _ in range(2):  # and only once
            assert share.ask(Lookup, new, b"moved").node == moved
        [changed] = [notice for retraction in told for notice in retraction.notices(SHARE)]
        assert (changed.parents, changed.names, changed.fresh) == ([old], [b"moved"], [False])


def test_another_root_is_told(tmp_path: Path) -> None:
    """All that was known of the one before, and what was not there and is now."""
    root, watched, told = tmp_path / "root", Watched(), []
    (root / "d").mkdir(parents=True)
    (root / "f").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/new").touch()
    with serving(root, watches=watched, retract=told.append) as share:
        number = share.node("f")
        share.node("d")
        before, absent = answer(share, GetAttributes, ROOT), answer(share, Lookup, ROOT, b"new")
        assert not told
        root.rename(tmp_path / "away")
        share.tree.check_root()
        assert [promised(share, each) for each in (before, absent)] == [0, 0]
        [lost] = told
        assert {(name.directory, name.name) for name in lost.names} == {(ROOT, b"f"), (ROOT, b"d")}
        assert lost.directories == [(ROOT, 0)]

        (tmp_path / "other").rename(root)
        share.tree.check_root()
        _, found = told
        assert {(name.name, name.node is None) for name in found.names} == {
            (b"f", False), (b"d", False), (b"new", True),
        }  # fmt: skip
        assert ROOT not in watched.marked, "that was of the one before"
        assert promised(share, answer(share, Lookup, ROOT, b"new")) == BOTH
        assert share.refused(GetAttributes, number) == "ESTALE"
        assert not share.tree.check_root()
        assert len(told) == 2
