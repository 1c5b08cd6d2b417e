"""Many files at once: what is given is whole, is promised, and is not what somebody is about to change."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from fileserver import promises
from fileserver.linux import fstatx
from fileserver.nodes import Node
from fileserver.watches import Changes, Watches
from protocol import codec
from protocol.bulk import Bulk, Run
from protocol.files import (
    ATTRIBUTES,
    MAX_CONTENT,
    MAX_DATA,
    MAX_MANY,
    ROOT,
    Contents,
    GetAttributes,
    Read,
    ReadMany,
)
from protocol.lane import Lane
from tests.fileserver.peers import SHARE
from tests.fileserver.scene import connected, memory
from tests.fileserver.served import refused, serving
from tests.fileserver.stranger import FILESYSTEMS, Stranger, watchable


class Scene:
    """A share whose changes are heard of, and a program of the host in it."""

    def __init__(self, place: Path, stack: ExitStack) -> None:
        self.place = place
        self.lane = Lane()
        stack.callback(self.lane.close)
        self.heard: list[Changes] = []
        self.watches = Watches(
            self.lane, lambda share, changes: self.heard.append(changes), lambda reason: None
        )
        stack.callback(self.watches.close)
        self._begin()
        self.stranger = stack.enter_context(Stranger(place))
        self.share = stack.enter_context(serving(place, share=1, watches=self.watches))

    def _begin(self) -> None:
        """The descriptor of the marks is no share's."""
        descriptor = os.open(self.place, os.O_PATH)
        status = fstatx(descriptor)
        node = Node(0, (status.device, status.ino, 0), status.kind, False)
        assert self.watches.watch(0, node, descriptor)
        self.watches.forget(0, node, descriptor)
        os.close(descriptor)

    def make(self, *names: str) -> list[int]:
        """Files with their names as content, which the guest has looked up."""
        for name in names:
            (self.place / name).write_text(name)
        return [self.share.node(name) for name in names]

    def read(self, nodes: list[int], most: int = MAX_DATA, payload: Any = b"") -> Any:
        return self.share.tree.perform(self.share.call(ReadMany, ROOT, nodes, most), payload)

    def given(self, outcome: Any) -> list[bytes | None]:
        """What the guest takes from an answer that is sent now."""
        self.lane.turn()
        sizes = self.settled(outcome)
        content = bytes(outcome.payload.content if isinstance(outcome.payload, Run) else outcome.payload)
        files: list[bytes | None] = []
        for size in sizes:
            files.append(content[:size] if size >= 0 else None)
            content = content[size if size >= 0 else ~size :]
        assert content == b""
        return files

    def settled(self, outcome: Any) -> list[int]:
        """The sizes in an answer that is sent before more is heard."""
        kept = partial(self.share.tree.promised, outcome.value)
        sizes: list[int] = outcome.promise.settled(outcome.value, kept).sizes
        return sizes

    def ask(self, nodes: list[int], most: int = MAX_DATA) -> list[bytes | None]:
        return self.given(self.read(nodes, most))


@pytest.fixture(params=FILESYSTEMS)
def scene(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Scene]:
    with watchable(request.param, tmp_path) as place, ExitStack() as stack:
        yield Scene(place, stack)


def test_files_come_whole_and_in_order(scene: Scene) -> None:
    (scene.place / "empty").touch()
    nodes = [*scene.make("one", "three"), scene.share.node("empty"), *scene.make("seven")]
    assert scene.ask(nodes) == [b"one", b"three", b"", b"seven"]
    assert scene.ask(nodes[::-1]) == [b"seven", b"", b"three", b"one"]
    assert scene.ask([]) == []
    scene.stranger("echo >> one")
    scene.lane.turn()
    assert len(scene.heard) == 1


def test_what_is_no_small_file_is_left_out(scene: Scene) -> None:
    (scene.place / "directory").mkdir()
    (scene.place / "link").symlink_to("a")
    os.mkfifo(scene.place / "fifo")
    (scene.place / "large").write_bytes(bytes(MAX_CONTENT + 1))
    (scene.place / "limit").write_bytes(bytes(MAX_CONTENT))
    others = [scene.share.node(name) for name in ("directory", "link", "fifo", "large")]
    assert scene.ask([*others, 4711, *scene.make("a"), ROOT]) == [None] * 5 + [b"a", None]
    assert scene.ask([scene.share.node("limit")]) == [bytes(MAX_CONTENT)]


def test_there_may_be_no_room_for_one_and_some_for_the_next(scene: Scene) -> None:
    nodes = scene.make("aa", "bbbb", "c")
    assert scene.ask(nodes, most=3) == [b"aa", None, b"c"]
    assert scene.ask(nodes, most=0) == [None] * 3


def test_into_memory_that_the_guest_has_too(scene: Scene) -> None:
    nodes = scene.make("aa", "bbbb", "c")
    run = Run(Bulk(), 0, 1, memoryview(bytearray(100)))
    outcome = scene.read(nodes, most=3, payload=run)
    assert outcome.payload is run
    assert run.content == b"aac"
    assert scene.given(outcome) == [b"aa", None, b"c"]


@pytest.mark.parametrize(("nodes", "most"), [([2] * (MAX_MANY + 1), 100), ([2], MAX_DATA + 1), ([2], -1)])
def test_more_than_can_be_asked_for(scene: Scene, nodes: list[int], most: int) -> None:
    assert refused(lambda: scene.read(nodes, most)) == "EINVAL"


def test_a_file_that_somebody_writes_is_left_out(scene: Scene) -> None:
    nodes = scene.make("a", "b")
    scene.stranger("exec 7>>a")
    assert scene.ask(nodes) == [None, b"b"]
    scene.stranger("exec 7>&-")
    scene.lane.turn()
    assert scene.ask(nodes) == [b"a", b"b"]


@pytest.mark.parametrize("commands", ["echo >> b", "chmod 600 b", "exec 7<b", "mv c b", "rm b", "ln b d"])
def test_what_changes_before_the_answer_is_sent_is_left_out(scene: Scene, commands: str) -> None:
    """Or what somebody opens then, who may be about to map it."""
    nodes = scene.make("a", "b", "c")
    outcome = scene.read(nodes)
    scene.stranger(commands)
    given = scene.given(outcome)
    assert given[:2] == [b"a", None]
    assert given[2] == (None if commands == "mv c b" else b"c")


def test_what_changes_afterwards_is_told(scene: Scene) -> None:
    (number,) = scene.make("a")
    assert scene.ask([number]) == [b"a"]
    scene.stranger("echo >> a")
    scene.lane.turn()
    assert [node.number for changes in scene.heard for node in changes.files] == [number]


def test_the_guest_s_kernel_may_have_older_attributes(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """When nothing stands any more, what it has is not taken for what came with the data."""
    monkeypatch.setattr(promises, "UNSETTLED_NS", 0)
    (number,) = scene.make("a")
    node = scene.share.tree._core.reach.peek(number)
    assert node is not None
    assert scene.ask([number]) == [b"a"]
    with_data = node.given
    assert with_data > 0
    outcome = scene.share.tree.perform(scene.share.call(GetAttributes, number))
    assert scene.share.tree.promised(outcome.value, outcome.promise) & ATTRIBUTES
    assert scene.ask([number]) == [b"a"]
    assert node.given == with_data
    scene.stranger("chmod 600 a")
    outcome = scene.read([number])
    assert scene.settled(outcome) == [1], "it is not heard of yet"
    assert node.given == promises.UNCERTAIN


def test_a_file_that_becomes_shorter_meanwhile(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = scene.make("aaa", "bbb")
    preadv = os.preadv

    def after_a_change(descriptor: int, buffers: Any, offset: int) -> int:
        if os.path.samestat(os.fstat(descriptor), os.stat(scene.place / "aaa")):
            scene.stranger(": > aaa")
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", after_a_change)
    assert scene.ask(nodes) == [None, b"bbb"]


def test_what_the_guest_has_is_compared_as_after_any_other_read(scene: Scene) -> None:
    """In case nothing is promised any more, as in the next session."""
    (number,) = scene.make("a")
    assert scene.ask([number]) == [b"a"]
    scene.stranger("echo longer > a")
    answer = scene.share.ask(GetAttributes, number)
    assert answer.stale or scene.share.ask(GetAttributes, number).stale
    assert scene.share.bytes(Read, number, 0, 100) == b"longer\n"


def test_without_promises_nothing_is_given(tmp_path: Path) -> None:
    with serving(tmp_path) as share:
        (tmp_path / "a").write_text("a")
        outcome = share.tree.perform(share.call(ReadMany, ROOT, [share.node("a")], 100))
        assert outcome.value.sizes == [-1]
        assert outcome.payload == b""


@pytest.mark.parametrize("size", [10, 20_000])
async def test_in_frames_and_in_memory(tmp_path: Path, place: Path, size: int) -> None:
    """Little comes inline; what lies in slots is answered from them, and they are free again."""
    with watchable("disk", tmp_path):  # which ``place`` is on, too
        host, guests = memory(32)
    async with connected(place, (host, guests)) as guest:
        contents = [os.urandom(size) for _ in range(8)]
        nodes = []
        for number, content in enumerate(contents):
            (guest.root / str(number)).write_bytes(content)
            nodes.append((await guest.kernel.lookup(b"%d" % number)).node)
        call = ReadMany(SHARE, guest.kernel.unique(), ROOT, [*nodes, 4711], MAX_DATA)
        pending = guest.kernel.begin(call)
        result = await guest.kernel.finish(pending)
        assert codec.decode(Contents, result.value).sizes == [size] * 8 + [-1]
        assert result.payload == b"".join(contents)
        assert pending.lent == (8 * size if size > 1000 else 0)
        await guest.kernel.lookup(b"0")  # what has not been given back yet goes with the next frame
        with trio.fail_after(20):
            while host.free < 32:
                await guest.kernel.lookup(b"0")
