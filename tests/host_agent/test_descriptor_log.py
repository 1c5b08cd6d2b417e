"""What is held, in a queue that outlives whoever wrote it there: also if that one is killed at any moment."""

from __future__ import annotations

import errno
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from fileserver import keepsakes
from fileserver.keepsakes import Kept, Name, send
from host_agent import descriptor_log, keeper
from host_agent.descriptor_log import DescriptorLog
from host_agent.descriptor_store import DescriptorStore

REPOSITORY = Path(__file__).parents[2]


def name(number: int) -> Name:
    return Name(0, 1, number)


@pytest.fixture
def queues() -> Iterator[list[int]]:
    """What the keeper has."""
    before = len(os.listdir("/proc/self/fd"))
    descriptors = keeper.make_store()
    yield descriptors
    for descriptor in descriptors:
        os.close(descriptor)
    assert len(os.listdir("/proc/self/fd")) <= before


@pytest.fixture
def log(queues: list[int]) -> Iterator[DescriptorLog]:
    log = log_of(queues)
    yield log
    log.close()


def log_of(queues: list[int]) -> DescriptorLog:
    return DescriptorLog(*(socket.socket(fileno=os.dup(descriptor)) for descriptor in queues[2:]))


def told(queues: list[int]) -> set[Name]:
    """What a successor would take over."""
    log = log_of(queues)
    held: set[Name] = set()
    for message in log.read():
        held -= {*message.gone}
        for kept, descriptor in message.kept:
            held.add(kept)
            os.close(descriptor)
    log.close()
    return held


class Pipes:
    """Descriptors to be kept, each of which shows whether anybody still has it open."""

    def __init__(self) -> None:
        self.readers: dict[int, int] = {}

    def kept(self, number: int) -> Iterator[Kept]:
        reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.readers[number] = reader
        yield name(number), writer
        os.close(writer)

    def open(self) -> set[int]:
        return {number for number, reader in self.readers.items() if not self._is_at_its_end(reader)}

    @staticmethod
    def _is_at_its_end(reader: int) -> bool:
        try:
            return os.read(reader, 1) == b""
        except BlockingIOError:
            return False

    def close(self) -> None:
        for reader in self.readers.values():
            os.close(reader)


@pytest.fixture
def pipes() -> Iterator[Pipes]:
    pipes = Pipes()
    yield pipes
    pipes.close()


#: What a file server says: names given up, and kept.
Story = Sequence[tuple[Sequence[int], Sequence[int]]]

STORY: Story = (
    ((), (1,)),
    ((), (2, 3)),
    ((1,), (4,)),
    ((), (5,)),
    ((4, 2), (6, 7)),
    ((7,), ()),
)


def left_of(story: Story) -> set[int]:
    """What is held at its end."""
    held: set[int] = set()
    for gone, kept in story:
        held = held - {*gone} | {*kept}
    return held


def story_of(seed: int) -> Story:
    """The one above, or a longer one."""
    if not seed:
        return STORY
    chance, held, said = random.Random(seed), set[int](), []
    for first in range(1, 60, 3):
        gone = chance.sample(sorted(held), min(len(held), chance.choice([0, 0, 1, 3])))
        kept = list(range(first, first + chance.choice([0, 1, 2, 3])))
        held = held - {*gone} | {*kept}
        said.append((gone, kept))
    return said


class Killed(BaseException):
    """Nothing is done any more."""


class Mortal(socket.socket):
    """A socket of somebody who is killed after so many system calls."""

    calls = 0

    def _live(self) -> None:
        Mortal.calls -= 1
        if Mortal.calls < 0:
            raise Killed

    def sendmsg(self, *arguments: object) -> int:
        self._live()
        return super().sendmsg(*arguments)  # type: ignore[arg-type]

    def recv(self, *arguments: int) -> bytes:
        self._live()
        return super().recv(*arguments)

    def recvmsg(self, *arguments: int) -> object:  # type: ignore[override]
        self._live()
        return super().recvmsg(*arguments)


def tell(theirs: socket.socket, pipes: Pipes, gone: Sequence[int], kept: Sequence[int]) -> None:
    opened = [pipes.kept(number) for number in kept]
    send(theirs, [name(number) for number in gone], [next(one) for one in opened])
    for one in opened:
        next(one, None)


def live(
    queues: list[int],
    pipes: Pipes,
    whole: Story,
    calls: int,
    monkeypatch: pytest.MonkeyPatch,
) -> bool:
    """A host agent that hears of a story and is killed after so many calls; what it did not hear is said after
    its death. True if it lived."""
    story, before = iter(whole), {*os.listdir("/proc/self/fd")}
    with socket.socket(fileno=os.dup(queues[1])) as theirs, monkeypatch.context() as patched:
        patched.setattr(socket, "socket", Mortal)
        Mortal.calls = 1 << 30
        store = DescriptorStore(100, queues)
        with suppress(Killed), store.opened() as (ours, _):
            Mortal.calls = calls
            for gone, kept in story:
                tell(theirs, pipes, gone, kept)
                store.take_in(ours)
        lived = Mortal.calls >= 0
        store.close()
        for gone, kept in story:
            tell(theirs, pipes, gone, kept)
    if not lived:  # what it had just received
        for descriptor in {*os.listdir("/proc/self/fd")} - before:
            with suppress(OSError):
                if int(descriptor) not in pipes.readers.values():
                    os.close(int(descriptor))
    return lived


def make_narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queues take six messages, and no more."""
    monkeypatch.setattr(keepsakes, "SEND_BUFFER", 1)


@pytest.fixture(params=["wide", "narrow"])
def width(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Of the log, which is told anew all the time."""
    monkeypatch.setattr(descriptor_log, "MOST_MESSAGES", 2)
    if request.param == "narrow":
        make_narrow(monkeypatch)
    return str(request.param)


@pytest.mark.parametrize("seed", range(4))
def test_nothing_is_lost_and_nothing_comes_back_whenever_it_is_killed(
    width: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    story = story_of(seed)
    left = left_of(story)
    calls, lived = 0, False
    while not lived:
        queues, pipes = keeper.make_store(), Pipes()
        lived = live(queues, pipes, story, calls, monkeypatch)
        store = DescriptorStore(100, queues)
        with store.opened():
            assert {held.number for held in store._held} == pipes.open() == left, calls
        store.close()
        assert told(queues) == {name(number) for number in left}, calls
        assert pipes.open() == left, "what is held is not closed by whoever ends"
        for descriptor in queues:
            os.close(descriptor)
        assert pipes.open() == set()
        pipes.close()
        calls += 1
    assert calls > 5 * len(story)


@contextmanager
def so_many_taken(most: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernel takes ``most`` messages with descriptors for the log, and then none."""
    taken = 0

    def send_or_refuse(channel: socket.socket, gone: Sequence[Name], kept: Sequence[Kept]) -> None:
        nonlocal taken
        if kept and taken >= most:
            raise OSError(errno.ETOOMANYREFS, "too many references")
        send(channel, gone, kept)
        taken += bool(kept)

    with monkeypatch.context() as patched:
        patched.setattr(descriptor_log, "send", send_or_refuse)
        yield


@pytest.mark.parametrize("most", [*range(12), 1 << 30])
def test_what_was_given_up_does_not_come_back_if_there_is_no_room(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever it is killed: no descriptors are taken from some moment on, or the queue is full."""
    story, calls, lived = story_of(2), 0, False
    left = left_of(story)
    if most > 100:
        monkeypatch.setattr(descriptor_log, "MOST_MESSAGES", 1 << 20)
        make_narrow(monkeypatch)
    while not lived:
        queues, pipes = keeper.make_store(), Pipes()
        with so_many_taken(most, monkeypatch):
            lived = live(queues, pipes, story, calls, monkeypatch)
        store = DescriptorStore(100, queues)
        with store.opened():
            assert {held.number for held in store._held} <= left, (most, calls)
        store.close()
        for descriptor in queues:
            os.close(descriptor)
        assert pipes.open() == set()
        pipes.close()
        calls += 1


def test_what_is_given_up_is_closed_at_once(queues: list[int], pipes: Pipes) -> None:
    """It may be a program that is open for writing, or half of the user's disk."""
    store = DescriptorStore(100, queues)
    with store.opened() as (ours, theirs):
        tell(theirs, pipes, (), (1, 2))
        store.take_in(ours)
        tell(theirs, pipes, (1,), ())
        store.take_in(ours)
        assert pipes.open() == {2}
    store.close()


def test_one_that_is_killed_has_a_successor_that_knows(
    queues: list[int], pipes: Pipes, tmp_path: Path
) -> None:
    """The real thing: a process, SIGKILL, and what it was told after it had gone."""
    program = (
        "import sys, trio\n"
        "from host_agent import keeper\n"
        "from host_agent.descriptor_store import DescriptorStore\n"
        "store = DescriptorStore(100, keeper.read(sys.argv[1]))\n"
        "with store.opened() as (ours, theirs):\n"
        "    print(len(store), flush=True)\n"
        "    trio.run(store.follow, ours)\n"
    )
    command = [sys.executable, "-c", program, keeper.written(queues)]
    with socket.socket(fileno=os.dup(queues[1])) as theirs:
        for already in (0, 2, 2):
            with subprocess.Popen(
                command, stdout=subprocess.PIPE, pass_fds=queues, cwd=REPOSITORY
            ) as host_agent:
                assert host_agent.stdout is not None
                assert int(host_agent.stdout.readline()) == already
                if not already:
                    tell(theirs, pipes, (), (1, 2))
                host_agent.send_signal(signal.SIGKILL)
        tell(theirs, pipes, (2,), (3,))
    assert pipes.open() == {1, 2, 3}
    store = DescriptorStore(100, queues)
    with store.opened() as (_, next_server):
        assert sorted(store._held) == [name(1), name(3)]
        assert pipes.open() == {1, 3}
        next_server.recv(1)  # it is told of them, and not of what was meant for servers that never came
        with pytest.raises(BlockingIOError):
            next_server.recv(1)
    store.close()


def test_a_long_story_is_told_anew(
    queues: list[int], log: DescriptorLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(descriptor_log, "MOST_DESCRIPTORS", 600)
    held: dict[Name, int] = {}
    for number in range(1, descriptor_log.MOST_MESSAGES + 1):
        held[name(number)] = queues[0]
        log.append((), [(name(number), queues[0])], held)
        log.tidy(held)
    assert list(messages(queues)) == [1] * 128
    held.update({name(number): queues[0] for number in range(129, 521)})
    log.append((), [(name(520), queues[0])], held)
    assert list(messages(queues)) == [128, 250, 142]
    assert told(queues) == held.keys()
    log.tidy(held)
    assert list(messages(queues)) == [128, 250, 142]


def messages(queues: list[int]) -> Iterator[int]:
    """How many descriptors there are in each message of the queue."""
    log = log_of(queues)
    for message in log.read():
        yield len(message.kept)
        for _, descriptor in message.kept:
            os.close(descriptor)
    log.close()


def test_a_short_story_is_left_as_it_is(queues: list[int], log: DescriptorLog) -> None:
    held = {name(number): queues[0] for number in range(1, 4)}
    for kept in held.items():
        log.append((), [kept], held)
    log.tidy(held)
    assert list(messages(queues)) == [1, 1, 1]


def test_a_queue_that_is_full_is_told_anew(
    queues: list[int], log: DescriptorLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(descriptor_log, "MOST_MESSAGES", 1 << 20)
    with socket.socket(fileno=os.dup(queues[3])) as tail, suppress(BlockingIOError):
        while True:
            send(tail, (), [(name(1), queues[0])])
    for message in log.read():
        for _, descriptor in message.kept:
            os.close(descriptor)
    held = {name(1): queues[0], name(2): queues[0]}
    log.append((), [(name(2), queues[0])], held)
    assert list(messages(queues)) == [1, 1], "all but the last message said nothing any more"
    log.tidy(held)
    assert told(queues) == held.keys()


def test_only_so_many_descriptors_are_in_the_queue(
    queues: list[int], log: DescriptorLog, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its user's other programs could not send any, else."""
    monkeypatch.setattr(descriptor_log, "MOST_DESCRIPTORS", 3)
    held = {name(number): queues[0] for number in range(1, 6)}
    log.append((), list(held.items()), held)
    log.tidy(held)
    assert told(queues) == {name(1), name(2), name(3)}
    del held[name(4)]  # which it has not told of
    log.append([name(4)], (), held)
    log.tidy(held)
    assert list(messages(queues)) == [3]
    del held[name(2)]
    log.append([name(2)], (), held)
    log.tidy(held)
    assert told(queues) == {name(1), name(3), name(5)}
    assert len(caplog.records) == 1


def test_what_is_kept_again_is_told_again(queues: list[int], log: DescriptorLog, pipes: Pipes) -> None:
    """By the same name, another descriptor; the one before is closed."""
    opened = pipes.kept(1)
    first = next(opened)
    log.append((), [first], dict([first]))
    next(opened, None)
    assert pipes.open() == {1}
    held = {name(1): queues[0]}
    log.append((), [(name(1), queues[0])], held)
    log.tidy(held)
    assert list(messages(queues)) == [1]
    assert pipes.open() == set()


def test_what_cannot_be_kept_there_is_said_once_and_costs_nothing_that_is(
    queues: list[int],
    log: DescriptorLog,
    pipes: Pipes,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An ordinary user may have as many descriptors in queues as a process may have open."""
    opened = [pipes.kept(number) for number in (1, 2)]
    held = dict([next(one) for one in opened])
    log.append((), list(held.items()), held)
    held[name(3)] = queues[0]
    del held[name(1)]

    def refuse(channel: socket.socket, gone: Sequence[Name], kept: Sequence[Kept]) -> None:
        if kept:
            raise OSError(errno.ETOOMANYREFS, "too many references")
        send(channel, gone, kept)

    with monkeypatch.context() as patched:
        patched.setattr(descriptor_log, "send", refuse)
        for _ in range(2):
            log.append([name(1)], [(name(3), queues[0])], held)
            log.tidy(held)
    assert told(queues) == {name(2)}
    assert [record.getMessage() for record in caplog.records] == [
        "not all descriptors that are held would outlive the host agent"
    ]
    log.tidy(held)
    assert told(queues) == held.keys()
    for one in opened:
        next(one, None)
    assert pipes.open() == {2}, "what was given up is closed as soon as that can be"


def test_what_another_version_has_written_is_left_behind(queues: list[int], log: DescriptorLog) -> None:
    with socket.socket(fileno=os.dup(queues[3])) as tail:
        tail.send(b"\xc1")
    store = DescriptorStore(100, queues)
    assert len(store) == 0
    with store.opened() as (ours, theirs):
        theirs.send(b"\xc1")
        send(theirs, (), [(name(1), queues[0])])
        assert store.take_in(ours)
        assert told(queues) == {name(1)}
        send(theirs, (), [(name(2), queues[0])])
        theirs.send(b"\xc1")
        assert store.take_in(ours)
    assert told(queues) == {name(1), name(2)}
    store.close()
