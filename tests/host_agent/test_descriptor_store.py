"""The host agent's side of the store: what a file server has said is held for the next one."""

from __future__ import annotations

import array
import errno
import os
import resource
import socket
from collections.abc import Iterator
from pathlib import Path

import msgpack
import pytest
import trio

from fileserver.keepsakes import MAX_AT_ONCE, Message, Name, prepare, receive, send
from host_agent import descriptor_store
from host_agent.descriptor_store import DescriptorStore
from tests.descriptors import open_descriptors


def names(count: int, first: int = 2) -> list[Name]:
    return [Name(0, 1, number) for number in range(first, first + count)]


def open_count() -> int:
    return len(open_descriptors())


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    descriptor = os.open(tmp_path, os.O_PATH)
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def store() -> Iterator[DescriptorStore]:
    before = open_count()
    store = DescriptorStore(1000)
    yield store
    store.close()
    assert len(store) == 0
    assert open_count() <= before


def handed_over(theirs: socket.socket) -> list[Name]:
    theirs.setblocking(False)
    found = []
    try:
        while (message := receive(theirs)) is not None:
            for name, descriptor in message.kept:
                found.append(name)
                os.close(descriptor)
    except BlockingIOError:
        pass
    return found


def test_what_was_sent_before_the_end_is_taken_in_after_it(file: int, store: DescriptorStore) -> None:
    with store.opened() as (_, theirs):
        send(theirs, (), [(name, file) for name in names(3)])
        theirs.close()
        assert len(store) == 0
    assert len(store) == 3


def test_the_next_one_is_given_everything_before_it_is_started(file: int, store: DescriptorStore) -> None:
    many = names(2 * MAX_AT_ONCE + 1)
    with store.opened() as (_, theirs):
        for start in range(0, len(many), MAX_AT_ONCE):
            send(theirs, (), [(name, file) for name in many[start : start + MAX_AT_ONCE]])
    for _ in range(2):  # it goes on being held here
        with store.opened() as (_, theirs):
            assert handed_over(theirs) == many
    assert len(store) == len(many)


def test_one_that_dies_without_having_looked(file: int, store: DescriptorStore) -> None:
    """The kernel then says that the connection was reset, once, before what was sent."""
    with store.opened() as (_, theirs):
        send(theirs, (), [(name, file) for name in names(2)])
    with store.opened() as (_, theirs):
        send(theirs, names(1), [(name, file) for name in names(1, 10)])
    assert sorted(store._held) == [*names(1, 3), *names(1, 10)]


def test_a_name_that_is_kept_again_is_of_the_later_one(
    file: int, store: DescriptorStore, tmp_path: Path
) -> None:
    (tmp_path / "other").touch()
    other = os.open(tmp_path / "other", os.O_PATH)
    with store.opened() as (_, theirs):
        send(theirs, (), [(names(1)[0], file)])
        send(theirs, names(1), [(names(1)[0], other)])
    [held] = store._held.values()
    assert os.path.samestat(os.fstat(held), os.fstat(other))
    os.close(other)


def test_no_more_than_the_limit(file: int) -> None:
    before = open_count()
    store = DescriptorStore(2)
    with store.opened() as (_, theirs):
        send(theirs, (), [(name, file) for name in names(5)])
    assert (len(store), store.refused) == (2, 3)
    assert open_count() <= before + 2
    store.close()


UNREADABLE = [
    b"\xc1", b"x" * 70_000, b"", msgpack.packb(1), msgpack.packb([[], [], []]), msgpack.packb([[[1, 2]], []]),
    msgpack.packb([[], [[0, 1, 2, 3, 4]]]), msgpack.packb([[], [["a", 1, 2]]]),
    msgpack.packb([[[float("inf"), 1, 2]], []]), msgpack.packb([[], [None]]),
]  # fmt: skip


@pytest.mark.parametrize("data", UNREADABLE, ids=lambda data: repr(data[:12]))
def test_one_message_that_does_not_make_sense_is_passed_over(
    data: bytes, file: int, store: DescriptorStore, caplog: pytest.LogCaptureFixture
) -> None:
    """With whatever descriptors it brings; what was said before and after it counts."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [file, file]))]
    first, second, third = names(3)
    with store.opened() as (ours, theirs):
        before = open_count()
        send(theirs, (), [(first, file)])
        for _ in range(2):
            theirs.sendmsg([data or msgpack.packb([[], [list(first)]])], rights)
        send(theirs, (), [(second, file)])
        assert store.take_in(ours)
        send(theirs, [first], [(third, file)])
        assert store.take_in(ours)
        assert open_count() == before + 2
    assert [*store._held] == [second, third]
    assert (store.unreadable, len(caplog.records)) == (2, 1)


def test_a_channel_that_fails_is_not_followed_and_keeps_what_it_has(
    file: int, store: DescriptorStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> Message | None:
        raise OSError(errno.ENOBUFS, "no buffers")

    with store.opened() as (ours, theirs):
        send(theirs, (), [(name, file) for name in names(1)])
        with monkeypatch.context() as patched:
            patched.setattr(descriptor_store, "receive", fail)
            assert not store.take_in(ours)
        assert len(store) == 0
    assert len(store) == 1


def test_the_processs_limit_is_what_comes_without_a_descriptor(file: int, store: DescriptorStore) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with store.opened() as (_, theirs):
        send(theirs, (), [(name, file) for name in names(5)])
        highest = max(open_descriptors())
        fillers = []
        while not fillers or fillers[-1] < highest:
            fillers.append(os.dup(file))
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(fillers) + 3, hard))
        theirs.close()
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    for filler in fillers:
        os.close(filler)
    assert (len(store), store.refused) == (3, 2)


async def test_it_is_followed_to_the_end(file: int, store: DescriptorStore) -> None:
    with store.opened() as (ours, theirs):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.follow, ours)
            prepare(theirs)
            for count, name in enumerate(names(10), 1):
                send(theirs, (), [(name, file)])
                with trio.fail_after(10):
                    while len(store) < count:
                        await trio.lowlevel.checkpoint()
            theirs.close()


async def test_it_is_not_woken_for_each_message(
    file: int, store: DescriptorStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes between two looks waits in the queue, and is not lost with whoever does not look any more."""
    monkeypatch.setattr(descriptor_store, "NAP", 3600)
    first, *others = names(4)
    with store.opened() as (ours, theirs):
        send(theirs, (), [(first, file)])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.follow, ours)
            with trio.fail_after(20):
                while not len(store):
                    await trio.sleep(0.01)
            for name in others:
                send(theirs, (), [(name, file)])
                await trio.sleep(0.01)
            assert len(store) == 1
            nursery.cancel_scope.cancel()
    assert len(store) == 4


def test_room_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    limits = (1024, 1 << 20)
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda _, pair: asked.append(pair))
    assert descriptor_store.make_room(4096) == 4096
    assert asked == [(8192, 1 << 20)]
    limits = (65536, 65536)
    assert descriptor_store.make_room(4096) == 4096
    limits = (1024, 1024)
    assert descriptor_store.make_room(4096) == 512
    limits = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    assert descriptor_store.make_room(4096) == 4096
    assert asked[1:] == [(1024, 1024)]
