"""What shares are told about real files, of what another process does and of what we do; and what they are not."""

from __future__ import annotations

import errno
import logging
import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from fileserver import fanotify, watches
from fileserver.fanotify import OVERFLOW, FanotifyGroup
from fileserver.linux import failure, fstatx
from fileserver.nodes import Node
from fileserver.watches import Changes, Watches
from protocol.lane import Lane
from tests.descriptors import open_descriptors
from tests.fileserver.stranger import FILESYSTEMS, Stranger, watchable

WRITTEN = fanotify.MODIFY | fanotify.CLOSE_WRITE


class Scene:
    """A folder with ``a`` and ``d/b`` in it, shares that know nodes of it, and what they were told."""

    def __init__(self, place: Path, stack: ExitStack) -> None:
        self.place = place
        (place / "d").mkdir()
        for name in ("a", "d/b"):
            (place / name).write_text("old")
        self._stack = stack
        self._numbers = iter(range(1, 1000))
        self.told: list[tuple[int, Changes]] = []
        self.voided: list[str] = []
        self.lane = Lane()
        stack.callback(self.lane.close)
        self.watches = self.another()
        self.stranger = stack.enter_context(Stranger(place))

    def another(self) -> Watches:
        made = Watches(
            self.lane, lambda share, changes: self.told.append((share, changes)), self.voided.append
        )
        self._stack.callback(made.close)
        return made

    def node(self, name: str) -> Node:
        """As a share has one that was just looked up: with a descriptor, and no mark."""
        descriptor = os.open(self.place / name, os.O_PATH | os.O_NOFOLLOW)
        status = fstatx(descriptor)
        node = Node(next(self._numbers), (status.device, status.ino, 0), status.kind, False)
        node.descriptor = descriptor
        self._stack.callback(self.close, node)
        return node

    @staticmethod
    def close(node: Node) -> None:
        if node.descriptor >= 0:
            os.close(node.descriptor)
        node.descriptor = -1

    def known(self, *names: str, share: int = 1) -> list[Node]:
        """Nodes whose marks are made, and whose versions are about to be compared."""
        nodes = [self.node(name) for name in names]
        assert all(self.watches.watch(share, node) for node in nodes)
        return nodes

    def hear(self) -> list[tuple[int, Changes]]:
        """What has been told since the last time."""
        self.lane.turn()
        told, self.told = self.told, []
        return told

    def hear_of(self, node: Node) -> int:
        """What has happened to a file."""
        return sum(changes.files.get(node, 0) for _, changes in self.hear())

    def forget(self, node: Node, *, share: int = 1, keep: bool = False) -> None:
        """As the table does it."""
        node.dead = True
        self.watches.forget(share, node, -1 if keep else node.descriptor)
        self.close(node)


def marks() -> int:
    """Marks of all groups of this process, as the kernel counts them."""
    return sum(
        path.read_text().count("fanotify ino:")
        for path in Path("/proc/self/fdinfo").iterdir()
        if path.exists() and os.path.lexists(f"/proc/self/fd/{path.name}")
    )


def refuse(number: int) -> Callable[..., Any]:
    def refusing(*arguments: object) -> None:
        raise failure(number)

    return refusing


@pytest.fixture(params=FILESYSTEMS)
def scene(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Scene]:
    with watchable(request.param, tmp_path) as place, ExitStack() as stack:
        yield Scene(place, stack)


# --- what others do ------------------------------------------------------------------------------------


def test_names_that_come_and_go(scene: Scene) -> None:
    root, below, file = scene.known(".", "d", "a")
    token = scene.watches.sample(1, root)
    assert scene.watches.stands(root, token)
    scene.stranger("echo 1 > new; mv d/b moved; rm a")
    ((share, changes),) = scene.hear()
    assert share == 1
    assert changes.names == {root: {b"new", b"moved", b"a"}, below: {b"b"}}
    assert changes.selves == set()
    assert changes.files[file] & fanotify.ATTRIB
    assert not scene.watches.stands(root, token)
    assert scene.hear() == []


def test_the_same_name_again_and_again_is_told_once(scene: Scene) -> None:
    (root,) = scene.known(".")
    scene.stranger("for i in 1 2 3 4 5 6 7 8 9; do echo > x; rm x; done")
    assert [changes.names for _, changes in scene.hear()] == [{root: {b"x"}}]


def test_a_directory_s_own_attributes(scene: Scene) -> None:
    root, below = scene.known(".", "d")
    scene.stranger("chmod 711 d")
    ((_, changes),) = scene.hear()
    assert (changes.names, changes.selves, changes.files) == ({}, {below}, {})
    scene.stranger("mv d e")
    ((_, changes),) = scene.hear()
    assert (changes.names, changes.selves, changes.files) == ({root: {b"d", b"e"}}, {below}, {})


def test_a_file_s_data_and_attributes(scene: Scene) -> None:
    file, other = scene.known("a", "d/b")
    tokens = [scene.watches.sample(1, node) for node in (file, other)]
    for commands, mask in (("echo 1 >> a", WRITTEN), ("chmod 600 a", fanotify.ATTRIB), ("mv a c", 0x800)):
        scene.stranger(commands)
        assert scene.hear_of(file) & mask == mask, commands
    assert not scene.watches.stands(file, tokens[0])
    assert scene.watches.stands(other, tokens[1])


def test_what_happens_by_another_name_elsewhere(
    scene: Scene, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A link that is made outside of the share, a write through it, and its end."""
    root, file = scene.known("d", "a")
    scene.stranger("mkdir elsewhere; ln a elsewhere/other")
    assert scene.hear_of(file) == fanotify.ATTRIB
    scene.stranger("echo 1 >> elsewhere/other")
    assert scene.hear_of(file) == WRITTEN
    scene.stranger("exec 7>>elsewhere/other; rm elsewhere/other; echo 2 >&7")
    assert scene.hear_of(file) == fanotify.ATTRIB | fanotify.MODIFY
    assert scene.watches.stands(root, scene.watches.token(root))


def test_who_reads_changes_nothing(scene: Scene) -> None:
    scene.known(".", "a", "d")
    scene.stranger("cat a d/b >/dev/null; ls -lR . >/dev/null; exec 7<a 7<&-")
    assert scene.hear() == []


def test_who_opens_a_file_may_be_of_interest(scene: Scene) -> None:
    file, other = scene.known("a", "d/b")
    assert not scene.watches.watch_opens(scene.node("a"), file.descriptor), "it has no mark"
    assert not scene.watches.hears_opens(file)
    for _ in range(2):
        assert scene.watches.watch_opens(file, file.descriptor)
    assert scene.watches.hears_opens(file)
    (scene.place / "a").read_text()
    assert scene.hear() == []
    scene.stranger("cat a d/b >/dev/null")
    ((_, changes),) = scene.hear()
    assert changes.files == {file: fanotify.OPEN}
    assert marks() == 2
    scene.forget(file)
    assert marks() == 1
    assert not scene.watches.watch_opens(file, other.descriptor)


def test_symlinks_and_what_else_there_is(scene: Scene) -> None:
    os.symlink("a", scene.place / "l")
    os.mkfifo(scene.place / "f")
    link, fifo, target = scene.known("l", "f", "a")
    scene.stranger("touch -h l; chmod 600 f")
    ((_, changes),) = scene.hear()
    assert changes.files == {link: fanotify.ATTRIB, fifo: fanotify.ATTRIB}
    assert target.version == 0


def test_a_removed_directory_is_forgotten_and_its_successor_watched(scene: Scene) -> None:
    root, below = scene.known(".", "d")
    token = scene.watches.sample(1, below)
    scene.stranger("rm -r d; mkdir d")
    ((_, changes),) = scene.hear()
    assert changes.names == {root: {b"d"}, below: {b"b"}}
    later = scene.watches.token(below)
    scene.close(below)  # the last that kept it
    scene.hear()
    assert not scene.watches.stands(below, later)
    assert below.watch is None
    assert scene.watches.token(below) is None
    assert not scene.watches.stands(below, token)
    assert marks() == scene.watches.marks == 1
    (again,) = scene.known("d")
    scene.stranger("echo > d/c")
    assert [changes.names for _, changes in scene.hear()] == [{again: {b"c"}}]


# --- what we do ----------------------------------------------------------------------------------------


def test_what_we_do_ourselves_is_told_to_nobody(scene: Scene) -> None:
    root, file = scene.known(".", "a")
    tokens = [scene.watches.sample(1, node) for node in (root, file)]
    (scene.place / "mine").write_text("x")
    (scene.place / "a").write_text("y")
    (scene.place / "a").chmod(0o600)
    (scene.place / "mine").unlink()
    assert scene.hear() == []
    assert scene.watches.stands(root, tokens[0])
    assert scene.watches.stands(file, tokens[1])


def test_what_others_do_at_the_same_time_is_told_all_the_same(scene: Scene) -> None:
    (file,) = scene.known("a")
    with (scene.place / "a").open("ab", buffering=0) as mine:
        mine.write(b"1")
        scene.stranger("echo 2 >> a")
        mine.write(b"3")
    assert scene.hear_of(file) == WRITTEN


def test_another_share_that_knows_the_file_is_told_what_we_did(scene: Scene) -> None:
    root, file = scene.known(".", "a", share=1)
    same_root, same_file = scene.known(".", "a", share=2)
    scene.known("d", share=2)
    (scene.place / "a").write_text("x")
    (scene.place / "mine").touch()
    (scene.place / "d" / "mine").touch()
    heard = dict(scene.hear())
    assert heard[1].names == {root: {b"mine"}}
    assert heard[2].names == {same_root: {b"mine"}}
    assert heard[1].files == {file: WRITTEN}
    assert heard[2].files == {same_file: WRITTEN}
    scene.forget(same_file, share=2)
    (scene.place / "a").write_text("y")
    (scene.place / "more").touch()
    assert {share: (changes.names, changes.files) for share, changes in scene.hear()} == {
        1: ({root: {b"more"}}, {}),
        2: ({same_root: {b"more"}}, {}),
    }
    scene.forget(same_root, share=2)
    (scene.place / "last").touch()
    assert scene.hear() == []


def test_one_share_may_have_no_mark_of_what_another_one_knows(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What we did may then have been done for the one, so the other is told."""
    mine = scene.node("a")
    scene.known(".", share=1)
    with monkeypatch.context() as patch:
        patch.setattr(FanotifyGroup, "mark", refuse(errno.EACCES))
        assert scene.watches.sample(1, mine) is None
    (theirs,) = scene.known("a", share=2)
    (scene.place / "a").write_text("x")
    assert [(share, changes.files) for share, changes in scene.hear()] == [(2, {theirs: WRITTEN})]
    scene.forget(mine)
    (scene.place / "a").write_text("y")
    assert scene.hear() == []


def test_the_token_of_what_we_have_changed(scene: Scene) -> None:
    """An answer that was read before our own change cannot be promised, one that was read after it can."""
    (root,) = scene.known(".")
    before = scene.watches.sample(1, root)
    ours = scene.watches.sample(1, root)
    (scene.place / "mine").touch()
    ours = scene.watches.moved(root, ours)
    assert ours is not None
    assert scene.watches.stands(root, ours)
    assert not scene.watches.stands(root, before)
    scene.stranger("echo > theirs")
    scene.hear()
    assert not scene.watches.stands(root, ours)
    assert scene.watches.moved(root, None) is None


# --- what cannot be told -------------------------------------------------------------------------------


def test_more_than_the_queue_takes(scene: Scene) -> None:
    size = int(Path("/proc/sys/fs/fanotify/max_queued_events").read_text())
    if size > 100_000:
        pytest.skip(f"the queue takes {size} events")
    root, file = scene.known(".", "a")
    token = scene.watches.token(file)
    for number in range(size + 1):
        os.mknod(scene.place / str(number))
    while not scene.voided:
        assert scene.hear() == []
    assert scene.voided == ["more happened on the host than its kernel could tell"]
    assert not scene.watches.stands(file, token)
    assert scene.watches.stands(file, scene.watches.token(file)), "the marks are as they were"
    scene.stranger("echo > x")
    assert [changes.names for _, changes in scene.hear()] == [{root: {b"x"}}]


def test_an_event_that_is_not_understood(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    root, file = scene.known(".", "a")
    token = scene.watches.token(root)
    scene.stranger("echo >> a; echo > x")
    parse = fanotify.parse
    monkeypatch.setattr(fanotify, "parse", lambda *read: [OVERFLOW, *parse(*read)])
    ((_, changes),) = scene.hear()
    assert changes.names == {root: {b"x"}}
    assert changes.files == {file: WRITTEN}
    assert len(scene.voided) == 1
    assert not scene.watches.stands(root, token)


def test_what_is_void_while_a_mark_is_made(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mark may be one of those that are lost in the same moment."""
    node = scene.node("a")

    def slow(descriptor: int) -> object:
        scene.watches.void("meanwhile")
        return fanotify.identify(descriptor)

    monkeypatch.setattr(watches, "identify", slow)
    assert not scene.watches.stands(node, scene.watches.sample(1, node))


def test_all_that_was_promised_can_be_void_for_other_reasons(scene: Scene) -> None:
    (root,) = scene.known(".")
    token = scene.watches.token(root)
    scene.watches.void("a reason")
    assert scene.voided == ["a reason"]
    assert not scene.watches.stands(root, token)
    assert scene.watches.stands(root, scene.watches.token(root))


# --- no mark -------------------------------------------------------------------------------------------


def test_nothing_is_promised_of_what_has_no_mark(scene: Scene) -> None:
    node = scene.node("a")
    assert scene.watches.token(node) is None
    assert scene.watches.sample(1, node) is not None
    assert scene.watches.token(node) == scene.watches.sample(1, node)
    node.dead = True
    assert not scene.watches.stands(node, scene.watches.token(node))
    unseen = scene.node("d")
    unseen.kind = 0
    assert scene.watches.sample(1, unseen) is None
    dead = scene.node("d")
    dead.dead = True
    assert scene.watches.sample(1, dead) is None
    assert marks() == 1


def test_a_descriptor_that_is_not_the_node_s(scene: Scene) -> None:
    """Of what was found in a listing, and is not kept open."""
    node = scene.node("a")
    descriptor, node.descriptor = node.descriptor, -1
    assert scene.watches.sample(1, node, descriptor) is not None
    os.close(descriptor)
    scene.stranger("echo >> a")
    assert scene.hear_of(node) == WRITTEN


def test_no_mark_is_left(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    root, (file, other) = scene.known(".")[0], (scene.node("a"), scene.node("d"))
    asked = []
    with monkeypatch.context() as patch:

        def refused(*arguments: object) -> None:
            asked.append(arguments)
            raise failure(errno.ENOSPC)

        patch.setattr(FanotifyGroup, "mark", refused)
        for _ in range(3):
            assert scene.watches.sample(1, file) is None
            assert scene.watches.sample(2, other) is None
        assert len(asked) == 1, "it is not tried again for each call"
        scene.watches.look()
        assert scene.watches.sample(1, file) is None
        assert len(asked) == 2
    assert [scene.watches.unwatched(share) for share in (1, 2, 3)] == [1, 1, 0]
    assert len(caplog.records) == 1
    assert watches.LIMIT in caplog.text
    assert scene.watches.sample(1, root) is not None
    scene.watches.look()
    assert scene.watches.sample(1, file) is not None
    scene.forget(other, share=2)
    assert [scene.watches.unwatched(share) for share in (1, 2)] == [0, 0]
    monkeypatch.setattr(FanotifyGroup, "mark", refuse(errno.ENOSPC))
    assert not scene.watches.is_full
    assert scene.watches.sample(1, scene.node("d/b")) is None
    assert scene.watches.is_full
    assert len(caplog.records) == 1, "it was said"


def test_a_mark_that_is_given_back_can_be_had_at_once(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    (file,), other = scene.known("a"), scene.node("d/b")
    with monkeypatch.context() as patch:
        patch.setattr(FanotifyGroup, "mark", refuse(errno.ENOSPC))
        assert scene.watches.sample(1, other) is None
    assert scene.watches.sample(1, other) is None
    scene.forget(file)
    assert scene.watches.sample(1, other) is not None


def test_directories_come_before_files(
    scene: Scene, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = tmp_path_factory.mktemp("sysctl") / "max_user_marks"
    limit.write_text("2\n")
    monkeypatch.setattr(watches, "_LIMIT_PATH", limit)
    assert watches.limit() == 2
    assert scene.watches.limit_hint == "sudo sysctl fs.fanotify.max_user_marks=4"
    scene.watches.look()
    (first,), second = scene.known("a"), scene.node("d/b")
    assert scene.watches.sample(1, second) is None
    assert scene.watches.unwatched(1) == 1
    scene.known(".", "d")
    scene.forget(first)
    assert scene.watches.sample(1, second) is not None
    assert scene.watches.unwatched(1) == 0
    limit.unlink()
    assert watches.limit() == 8192


@pytest.mark.parametrize("number", [errno.ENODEV, errno.EXDEV, errno.EOPNOTSUPP, errno.EMFILE])
def test_a_filesystem_that_cannot_tell(
    scene: Scene, number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    node, other = scene.node("a"), scene.node("d")
    with monkeypatch.context() as patch:
        patch.setattr(FanotifyGroup, "mark", refuse(number))
        assert scene.watches.sample(1, node) is None
    assert scene.watches.sample(1, other) is None, "it is not asked again for each file"
    scene.watches.look()
    assert scene.watches.sample(1, other) is not None, "its device may be another filesystem's by now"
    assert scene.watches.unwatched(1) == 0
    with monkeypatch.context() as patch:
        patch.setattr(FanotifyGroup, "mark", refuse(number))
        assert scene.watches.sample(1, node) is None
    assert len(caplog.records) == 1


def test_a_filesystem_that_says_nothing_of_what_others_do(scene: Scene) -> None:
    """/proc takes marks as any other."""
    descriptor = os.open("/proc/self", os.O_PATH)
    status = fstatx(descriptor)
    node = Node(1, (status.device, status.ino, 0), status.kind, False)
    node.descriptor = descriptor
    assert scene.watches.sample(1, node) is None
    assert node.watch is None
    assert marks() == 0
    os.close(descriptor)


@pytest.mark.parametrize("number", [errno.EPERM, errno.EINVAL, errno.ENOSYS])
def test_a_kernel_that_offers_nothing(
    scene: Scene, number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(FanotifyGroup, "__init__", refuse(number))
    none = scene.another()
    assert [none.sample(1, scene.node(name)) for name in (".", "a")] == [None, None]
    none.look()
    assert (none.marks, none.unwatched(1)) == (0, 0)
    assert len(caplog.records) == 1


def test_another_thread_is_luckier(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is refused does not take from the node the mark that it has got meanwhile."""
    node = scene.node("a")

    def lucky(descriptor: int) -> None:
        monkeypatch.undo()
        assert scene.watches.sample(1, node) is not None
        raise failure(errno.ENOSPC)

    monkeypatch.setattr(watches, "identify", lucky)
    assert scene.watches.sample(1, node) is None
    assert scene.watches.unwatched(1) == 0
    scene.stranger("echo >> a")
    assert scene.hear_of(node) == WRITTEN


# --- forgetting ----------------------------------------------------------------------------------------


def test_what_is_forgotten_has_no_mark(scene: Scene) -> None:
    root, file = scene.known(".", "a")
    assert marks() == scene.watches.marks == 2
    scene.forget(file)
    assert marks() == scene.watches.marks == 1
    scene.forget(root)
    scene.stranger("echo >> a; echo > x")
    assert scene.hear() == []
    assert marks() == scene.watches.marks == 0
    scene.watches.forget(1, root)


def test_the_last_share_that_forgets_ends_it(scene: Scene) -> None:
    mine, theirs = scene.known("a", share=1)[0], scene.known("a", share=2)[0]
    scene.forget(mine, share=1)
    scene.stranger("echo >> a")
    assert [(share, changes.files) for share, changes in scene.hear()] == [(2, {theirs: WRITTEN})]
    scene.forget(theirs, share=2)
    assert marks() == 0


def test_a_file_is_found_by_its_name_to_take_its_mark(scene: Scene) -> None:
    file, other = scene.known("a", "d/b")
    for node in (file, other):
        scene.close(node)
        node.dead = True
    (directory,) = scene.known("d")
    (root,) = scene.known(".")
    before = open_descriptors()
    scene.watches.forget(1, file, root.descriptor, b"a")
    assert open_descriptors() == before
    assert marks() == scene.watches.marks == 3
    os.rename(scene.place / "d" / "b", scene.place / "d" / "c")
    os.rename(scene.place / "a", scene.place / "d" / "b")
    (usurper,) = scene.known("d/b")
    scene.watches.forget(1, other, directory.descriptor, b"b")
    assert marks() == 4, "what is called so by now keeps its own"
    assert scene.watches.marks == 3
    scene.stranger("echo >> d/b; echo >> d/c")
    assert [changes.files for _, changes in scene.hear()] == [{usurper: WRITTEN}]
    gone = scene.known("d/c")[0]
    gone.dead = True
    scene.watches.forget(1, gone, directory.descriptor, b"nothing")
    assert marks() == 4


def test_marks_that_are_left_over_go_with_their_group(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watches, "LEFT_OVER", 1)
    root, below, first, second = scene.known(".", "d", "a", "d/b")
    token = scene.watches.token(root)
    scene.forget(first, keep=True)
    scene.watches.look()
    assert scene.watches.stands(root, token), "more of them are still of use"
    scene.forget(second, keep=True)
    scene.watches.look()
    for thread in threading.enumerate():
        if thread.name == "fanotify-close":
            thread.join()
    assert marks() == scene.watches.marks == 0
    assert len(scene.voided) == 1
    assert scene.watches.token(root) is None
    assert not scene.watches.stands(root, token)
    assert scene.watches.sample(1, root) is not None
    scene.stranger("echo > x; echo > d/y")
    assert [changes.names for _, changes in scene.hear()] == [{root: {b"x"}}]
    assert below.watch is None


def test_a_mark_that_was_left_over_is_taken_up_again(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watches, "LEFT_OVER", 1)
    (file,) = scene.known("a")
    scene.forget(file, keep=True)
    (again,) = scene.known("a")
    scene.watches.look()
    scene.stranger("echo >> a")
    assert scene.hear_of(again) == WRITTEN
    scene.known("d")
    scene.forget(again, keep=True)
    scene.stranger("rm a")  # and the mark with it
    scene.hear()
    scene.watches.look()
    assert scene.voided == []


def test_nobody_is_disturbed_when_all_that_is_left_is_left_over(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watches, "LEFT_OVER", 1)
    (file,) = scene.known("a")
    scene.forget(file, keep=True)
    scene.watches.look()
    assert scene.voided == []


def test_a_share_that_is_closed(scene: Scene) -> None:
    mine, theirs = scene.known("a", share=1)[0], scene.known("a", share=2)[0]
    alone = scene.known("d", share=1)[0]
    scene.watches.forget_share(1)
    assert (mine.watch, alone.watch) == (None, None)
    assert scene.watches.marks == 1
    scene.stranger("echo >> a; echo > d/x")
    assert [(share, changes.files) for share, changes in scene.hear()] == [(2, {theirs: WRITTEN})]
    assert scene.watches.sample(1, alone) is not None, "it was not closed, only mounted anew"


def test_the_end(scene: Scene) -> None:
    before = open_descriptors()
    another = scene.another()
    node = scene.node("a")
    assert another.sample(1, node) is not None
    another.close()
    another.forget(1, node)
    another.look()
    assert another.sample(1, scene.node("d")) is None
    scene.stranger("echo >> a")
    assert scene.hear() == []
    assert len(open_descriptors()) <= len(before) + 2


# --- all at once ---------------------------------------------------------------------------------------


def test_threads_that_watch_and_forget_while_things_happen(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However they meet, the kernel has the marks that we count, and what is marked is heard of."""
    names = ["d", *map(str, range(20))]
    for name in names[1:]:
        (scene.place / name).touch()
    rounds, failed = 2000, []
    mark = FanotifyGroup.mark

    def at_times_refused(self: FanotifyGroup, descriptor: int, mask: int) -> None:
        if random.random() < 0.1:
            raise failure(random.choice([errno.ENOSPC, errno.EACCES]))
        mark(self, descriptor, mask)

    monkeypatch.setattr(FanotifyGroup, "mark", at_times_refused)
    current = {share: {name: scene.node(name) for name in names} for share in (1, 2)}
    pool = {share: [[scene.node(name) for name in names] for _ in range(15)] for share in (1, 2)}

    def work(share: int, seed: int) -> None:
        chance = random.Random(seed)
        try:
            for _ in range(rounds):
                name = chance.choice(names)
                node = current[share][name]
                scene.watches.sample(share, node)
                if chance.random() < 0.05 and pool[share]:
                    fresh = pool[share].pop()
                    for new, which in zip(fresh, names, strict=True):
                        old, current[share][which] = current[share][which], new
                        old.dead = True
                        scene.watches.forget(share, old, old.descriptor if chance.random() < 0.8 else -1)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(share, seed)) for share in (1, 2) for seed in range(2)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        scene.stranger("echo >> 3; echo > d/x; rm d/x; echo >> 7")
        scene.watches.look()
        scene.hear()
    assert failed == []
    monkeypatch.setattr(FanotifyGroup, "mark", mark)
    scene.watches.look()
    nodes = [(share, node) for share, known in current.items() for node in known.values()]
    assert all(scene.watches.sample(*each) for each in nodes)
    left = sum(len(device.left_over) for device in scene.watches._devices.values())
    assert scene.watches.marks == scene.watches._shared == len(names)
    assert marks() == scene.watches.marks + left
    assert [scene.watches.unwatched(share) for share in (1, 2)] == [0, 0]
    scene.hear()
    scene.stranger(f"for i in {' '.join(names[1:])}; do echo >> $i; done; echo > d/y")
    heard: dict[int, Changes] = {}
    for share, changes in scene.hear():
        told = heard.setdefault(share, Changes())
        told.names.update(changes.names)
        told.files.update(changes.files)
    for share, known in current.items():
        assert set(heard[share].files) == {known[name] for name in names[1:]}
        assert heard[share].names == {known["d"]: {b"y"}}
