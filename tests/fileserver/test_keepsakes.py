"""Both ends of the store's socket, and what a tree puts there."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from fileserver import keepsakes as module
from fileserver.keepsakes import MAX_AT_ONCE, Keepsakes, Name, What, receive, send
from fileserver.nodes import RestoredNode
from fileserver.tree import Tree
from host_agent.descriptor_store import DescriptorStore
from protocol.files import (
    ROOT,
    CreateUnnamed,
    GetAttributes,
    MakeLink,
    Read,
    RemoveDirectory,
    Rename,
    Unlink,
    Write,
)
from tests.fileserver.served import Served, attr, open_descriptors, refused

SHARE = 1


class Kept:
    """The store's end, read whenever it is asked."""

    def __init__(self) -> None:
        self.store = DescriptorStore()
        self._opened = self.store.opened()
        self.ours, theirs = self._opened.__enter__()
        self.keepsakes = Keepsakes(theirs)

    def names(self, *, flushed: bool = True) -> list[Name]:
        if flushed:
            self.keepsakes.flush()
        self.store.take_in(self.ours)
        return list(self.store._held)

    def nodes(self, *, flushed: bool = True) -> list[int]:
        return [name.number for name in self.names(flushed=flushed)]

    def end(self) -> None:
        """As SIGKILL does it: nothing is said any more, and everything is closed."""
        if self.keepsakes._channel is not None:
            self.keepsakes._channel.close()
            self.keepsakes._channel = None
        self.keepsakes.close()
        self._opened.__exit__(None, None, None)

    def next(self) -> Keepsakes:
        """The next server's."""
        self.end()
        self._opened = self.store.opened()
        self.ours, theirs = self._opened.__enter__()
        self.keepsakes = Keepsakes(theirs)
        return self.keepsakes

    def close(self) -> None:
        self.end()
        self.store.close()


@pytest.fixture
def kept() -> Iterator[Kept]:
    before = open_descriptors()
    with closing(Kept()) as it:
        yield it
    assert open_descriptors() == before


@pytest.fixture
def share(kept: Kept, tmp_path: Path) -> Iterator[Served]:
    root = tmp_path / "root"
    root.mkdir()
    served = Served(root, keepsakes=kept.keepsakes.of(SHARE))
    yield served
    served.tree.close()


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    descriptor = os.open(tmp_path, os.O_PATH)
    yield descriptor
    os.close(descriptor)


def killed(share: Served, kept: Kept) -> None:
    """Another process goes on with the share."""
    share.tree.close()
    owner = kept.next().of(SHARE)
    inherited = owner.claim()
    share.options["keepsakes"] = owner
    share.tree = Tree(str(share.path), recorder=share.journal, **share.options)
    share.tree.restore(
        RestoredNode(old.node, old.lookups, old.identity, old.links, inherited.nodes.pop(old.node, -1))
        for old in share.journal.restored()
    )
    owner.discard(inherited)
    kept.keepsakes.give_up_unclaimed()


# --- files without a name --------------------------------------------------------------------------


def remove(share: Served) -> int:
    node = share.node("f")
    share.ask(Unlink, ROOT, b"f")
    return node


def rename_over(share: Served) -> int:
    node = share.node("f")
    (share.path / "g").write_text("other")
    share.node("g")
    share.ask(Rename, ROOT, b"g", ROOT, b"f", 0)
    return node


def make_unnamed(share: Served) -> int:
    entry = share.ask(CreateUnnamed, ROOT, 0o600, os.O_RDWR)
    share.ask(Write, entry.node, 0, payload=b"content")
    number: int = entry.node
    return number


@pytest.mark.parametrize("lose", [remove, rename_over, make_unnamed])
def test_a_file_without_a_name_outlives_two_servers(share: Served, kept: Kept, lose: Any) -> None:
    (share.path / "f").write_text("content")
    node = lose(share)
    assert kept.nodes(flushed=False) == [node]  # before the answer
    for _ in range(2):
        killed(share, kept)
        assert share.bytes(Read, node, 0, 100) == b"content"
        share.ask(Write, node, 0, payload=b"CON")
        share.ask(Write, node, 0, payload=b"con")
        assert attr(share.ask(GetAttributes, node)).nlink == 0
    share.forget(node)
    assert kept.nodes() == []
    assert share.refused(GetAttributes, node) == "ESTALE"


def test_a_server_that_is_killed_before_it_could_write_that_the_name_went(share: Served, kept: Kept) -> None:
    (share.path / "f").write_text("content")
    node = share.node("f")
    links = list(share.journal.records[node].links)
    share.ask(Unlink, ROOT, b"f")
    share.journal.records[node].links = links
    for _ in range(2):
        killed(share, kept)
        assert share.bytes(Read, node, 0, 100) == b"content"
    assert share.refused(Unlink, ROOT, b"f") == "ENOENT"
    assert kept.nodes() == [node]


def test_it_is_kept_before_the_name_goes(share: Served, kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    (share.path / "f").touch()
    node = share.node("f")
    seen: list[list[int]] = []

    def unlink(name: bytes, *, dir_fd: int) -> None:
        seen.append(kept.nodes(flushed=False))
        raise PermissionError(errno.EPERM, "not now")

    monkeypatch.setattr(os, "unlink", unlink)
    assert share.refused(Unlink, ROOT, b"f") == "EPERM"
    assert seen == [[node]]
    assert kept.nodes() == []


def test_what_has_another_name_is_not_kept(share: Served, kept: Kept) -> None:
    (share.path / "f").touch()
    os.link(share.path / "f", share.path / "g")
    node = share.node("f")
    assert share.node("g") == node
    share.ask(Unlink, ROOT, b"f")
    assert kept.nodes() == []
    share.ask(Unlink, ROOT, b"g")
    assert kept.nodes() == [node]


def test_what_gets_a_name_is_given_up(share: Served, kept: Kept) -> None:
    node = share.ask(CreateUnnamed, ROOT, 0o600, os.O_RDWR).node
    assert kept.nodes() == [node]
    share.ask(MakeLink, node, ROOT, b"named")
    assert kept.nodes() == []


def test_a_rename_keeps_nothing_of_its_source(share: Served, kept: Kept) -> None:
    (share.path / "f").touch()
    share.node("f")
    share.ask(Rename, ROOT, b"f", ROOT, b"g", 0)
    assert kept.nodes() == []


def test_a_directory_that_is_somebodys_current_one(share: Served, kept: Kept) -> None:
    (share.path / "d").mkdir()
    node = share.node("d")
    share.ask(RemoveDirectory, ROOT, b"d")
    killed(share, kept)
    assert attr(share.ask(GetAttributes, node)).nlink == 0


def test_deleted_on_the_host(share: Served, kept: Kept) -> None:
    (share.path / "f").write_text("content")
    node = share.node("f")
    (share.path / "f").unlink()
    assert share.tree.names_gone(100) == []
    assert share.tree.names_gone(200) == [(ROOT, b"f")]
    killed(share, kept)
    assert share.bytes(Read, node, 0, 100) == b"content"


def test_a_descriptor_of_another_file_is_not_taken(share: Served, kept: Kept, tmp_path: Path) -> None:
    (share.path / "f").touch()
    (tmp_path / "secret").write_text("secret")
    node = share.node("f")
    (share.path / "f").unlink()
    other = os.open(tmp_path / "secret", os.O_PATH)
    kept.keepsakes.of(SHARE).keep_node(node, other)
    os.close(other)
    killed(share, kept)
    assert share.refused(Read, node, 0, 100) == "ESTALE"
    assert kept.nodes() == []


# --- keeping and giving up -------------------------------------------------------------------------


def test_copies_are_kept_once_and_given_up(kept: Kept, file: int) -> None:
    owner = kept.keepsakes.of(SHARE)
    owner.keep_node(2, file)
    owner.keep_node(2, file)
    owner.keep_lock(owner.ranges(2, (1 << 64) - 1), file)
    assert kept.names() == [Name(What.NODE, SHARE, 2), Name(What.RANGES, SHARE, 2, (1 << 64) - 1)]
    owner.give_up_node(2)
    owner.give_up_node(3)
    assert len(kept.names(flushed=False)) == 2
    assert len(kept.names()) == 1
    owner.give_up_lock(owner.ranges(2, (1 << 64) - 1))
    assert kept.names(flushed=False) == []


def test_given_up_and_kept_again_while_the_store_does_not_read(kept: Kept, file: int) -> None:
    """Whatever the queue does not take arrives later, in an order that means the same."""
    owner = kept.keepsakes.of(SHARE)
    for node in range(3000):
        owner.keep_node(node, file)
    assert kept.keepsakes._waiting
    for node in range(3000):
        owner.give_up_node(node)
    for node in range(0, 3000, 3):
        owner.keep_node(node, file)
    for _ in range(100):
        found = kept.nodes()
    assert sorted(found) == list(range(0, 3000, 3))
    assert not kept.keepsakes._waiting
    assert kept.keepsakes.refused == 0


def test_a_full_store_is_counted(kept: Kept, file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_KEPT", 2)
    owner = kept.keepsakes.of(SHARE)
    for node in range(5):
        owner.keep_node(node, file)
    assert kept.nodes() == [0, 1]
    assert kept.keepsakes.refused == 3
    owner.give_up_node(0)
    owner.keep_node(5, file)
    assert kept.nodes() == [1, 5]


def test_a_share_that_is_served_no_more(kept: Kept, file: int) -> None:
    one, other = kept.keepsakes.of(1), kept.keepsakes.of(2)
    one.keep_node(2, file)
    other.keep_node(3, file)
    one.give_up_all()
    assert kept.nodes(flushed=False) == [3]


def test_without_a_store(file: int) -> None:
    nothing = Keepsakes()
    owner = nothing.of(SHARE)
    owner.keep_node(2, file)
    owner.give_up_node(2)
    nothing.flush()
    assert len(nothing) == 0
    assert not owner.claim().nodes
    nothing.close()


def test_the_host_agent_has_gone(file: int, caplog: pytest.LogCaptureFixture) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.close()
    before = open_descriptors()
    keepsakes = Keepsakes(theirs)
    owner = keepsakes.of(SHARE)
    for node in range(3):
        owner.keep_node(node, file)
    assert len([record for record in caplog.records if "cannot be told" in record.message]) == 1
    keepsakes.close()
    assert len(open_descriptors()) == len(before) - 1


# --- from one server to the next -------------------------------------------------------------------


def test_what_nobody_claims_is_given_up(kept: Kept, file: int) -> None:
    first, second = kept.keepsakes.of(1), kept.keepsakes.of(2)
    first.keep_node(2, file)
    second.keep_node(3, file)
    second.keep_lock(second.flock(7), file)
    keepsakes = kept.next()
    assert len(keepsakes) == 3
    owner = keepsakes.of(2)
    inherited = owner.claim()
    assert (list(inherited.nodes), list(inherited.locks)) == ([3], [owner.flock(7)])
    assert not owner.claim().nodes
    keepsakes.give_up_unclaimed()
    assert sorted(kept.nodes(flushed=False)) == [3, 7]
    owner.discard(inherited)
    assert kept.names(flushed=False) == []


def test_one_that_is_killed_before_it_has_claimed(kept: Kept, file: int) -> None:
    kept.keepsakes.of(1).keep_node(2, file)
    kept.next()
    owner = kept.next().of(1)
    inherited = owner.claim()
    assert list(inherited.nodes) == [2]
    owner.discard(inherited)


# --- messages --------------------------------------------------------------------------------------


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with one, other:
        for end in (one, other):
            module.prepare(end)
        yield one, other


def test_a_message_holds_what_it_may(pair: tuple[socket.socket, socket.socket], file: int) -> None:
    largest = (1 << 64) - 1
    gone = [Name(What.RANGES, 0xFFFFFFFF, largest, largest)] * module.MAX_GONE
    kept = [(Name(What.NODE, 0xFFFFFFFF, largest - index, largest), file) for index in range(MAX_AT_ONCE)]
    send(pair[0], gone, kept)
    message = receive(pair[1])
    assert message is not None
    assert message.gone == gone
    assert [name for name, _ in message.kept] == [name for name, _ in kept]
    for _, descriptor in message.kept:
        assert os.path.samestat(os.fstat(descriptor), os.fstat(file))
        assert not os.get_inheritable(descriptor)
        os.close(descriptor)


def test_the_end_and_nothing_yet(pair: tuple[socket.socket, socket.socket]) -> None:
    assert refused(lambda: receive(pair[1])) == "EAGAIN"
    pair[0].close()
    assert receive(pair[1]) is None


@pytest.mark.parametrize(
    "data", [b"\xc1", b"\x92\x90", b"\x01", b"\x92\x90\x91\x01", b"\x92\x90\x91\x91\xa1x"]
)
def test_no_message(pair: tuple[socket.socket, socket.socket], file: int, data: bytes) -> None:
    before = open_descriptors()
    socket.send_fds(pair[0], [data], [file])
    assert refused(lambda: receive(pair[1])) == "EBADMSG"
    assert open_descriptors() == before
