"""Writes answered ahead: which have landed, and that the other agent sees it."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from guest_agent.agent import Agent
from guest_agent.fence import SIZE, Reader, Tickets, Unfenced, Writer, open_reader, open_writer
from guest_agent.fuse.host import Host
from protocol.link import Hello, Link, Role, SerialChannel, Service
from protocol.outlet import HELD_MOST, MAX_HELD

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "fence"


def writer_of(path: Path) -> Writer:
    writer = open_writer(path)
    assert isinstance(writer, Writer)
    return writer


def reader_of(path: Path) -> Reader:
    reader = open_reader(path)
    assert reader is not None
    return reader


# --- which have landed -------------------------------------------------------------------------------------


def test_in_order_each_result_is_news() -> None:
    tickets = Tickets()
    assert [tickets.begin() for _ in range(3)] == [1, 2, 3]
    for ticket in (1, 2, 3):
        assert tickets.end(ticket)
        assert tickets.landed == ticket


def test_a_later_result_does_not_pass_for_an_earlier_one() -> None:
    tickets = Tickets()
    first, second = tickets.begin(), tickets.begin()
    assert not tickets.end(second)
    assert not tickets.end(tickets.begin())
    assert tickets.landed == 0, "two have landed, and not the first"
    assert tickets.end(first)
    assert tickets.landed == tickets.answered == 3


@pytest.mark.parametrize("seed", range(20))
def test_in_any_order_it_is_the_last_before_the_lowest_that_is_outstanding(seed: int) -> None:
    chance, tickets = random.Random(seed), Tickets(1000)
    outstanding: list[int] = []
    for _ in range(500):
        before = tickets.landed
        if outstanding and chance.random() < 0.5:
            assert tickets.end(outstanding.pop(chance.randrange(len(outstanding)))) == (
                before != tickets.landed
            )
        else:
            outstanding.append(tickets.begin())
        assert tickets.landed == min(outstanding, default=tickets.answered + 1) - 1
    for ticket in chance.sample(outstanding, len(outstanding)):
        tickets.end(ticket)
    assert tickets.landed == tickets.answered
    assert not tickets._early


def test_what_has_ended_ends_once() -> None:
    tickets = Tickets()
    first, second, third = (tickets.begin() for _ in range(3))
    tickets.end(second)
    assert not tickets.end(second)
    tickets.end(first)
    assert not tickets.end(first)
    assert not tickets.end(second)
    assert tickets.landed == second
    assert tickets.end(third)
    assert not tickets._early


# --- one file, mapped by both ------------------------------------------------------------------------------


def test_the_reader_sees_what_the_writer_says(path: Path) -> None:
    writer, reader = writer_of(path), reader_of(path)
    assert reader.mark() == 0
    first, second = writer.begin(), writer.begin()
    mark = reader.mark()
    assert mark != 0
    writer.end(second)
    assert not reader.passed(mark)
    third = writer.begin()
    writer.end(first)
    assert reader.passed(mark), "what was answered since does not count"
    assert reader.mark() != 0
    writer.end(third)
    assert reader.mark() == 0


def test_whoever_comes_first_makes_the_file_for_its_user_alone(path: Path) -> None:
    reader = reader_of(path)
    assert reader.mark() == 0
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.stat().st_size == SIZE
    ticket = writer_of(path).begin()
    assert reader.mark() == ticket


def test_what_a_killed_writer_left_is_its_successors_to_end(path: Path) -> None:
    reader, killed = reader_of(path), writer_of(path)
    first, second, third = (killed.begin(b"call %d" % number, b"data") for number in range(3))
    killed.end(second)
    mark = reader.mark()
    successor = writer_of(path)
    assert [tuple(record) for record in successor.left] == [
        (ticket, b"call %d" % number, b"data") for number, ticket in enumerate((first, second, third))
    ]
    assert not reader.passed(mark)
    fourth = successor.begin()
    for ticket in (first, second, third):
        assert not reader.passed(mark)
        successor.end(ticket)
    assert reader.passed(mark)
    assert reader.mark() == fourth
    successor.end(fourth)
    assert reader.mark() == 0
    assert writer_of(path).left == []


def test_what_is_not_in_the_spool_any_more_has_landed(path: Path) -> None:
    reader, killed = reader_of(path), writer_of(path)
    for _ in range(3):
        killed.begin(b"call", b"data")
    mark = reader.mark()
    os.truncate(path, path.stat().st_size - 1)
    successor = writer_of(path)
    assert [record.ticket for record in successor.left] == [1, 2]
    successor.end(1)
    successor.end(2)
    assert reader.passed(mark)


def test_without_a_spool_what_is_left_has_landed_as_far_as_anybody_will_say(path: Path) -> None:
    reader, killed = reader_of(path), open_writer(path, spooled=False)
    for _ in range(3):
        killed.begin(b"call", b"data")
    assert path.stat().st_size == SIZE
    mark = reader.mark()
    assert not reader.passed(mark)
    successor = open_writer(path, spooled=False)
    assert successor.left == ()
    assert reader.passed(mark)
    assert reader.mark() == 0
    ticket = successor.begin()
    assert ticket > mark
    assert not reader.passed(reader.mark())
    successor.end(ticket)
    assert reader.mark() == 0


def test_a_process_sees_what_another_has_answered(path: Path) -> None:
    writer = writer_of(path)
    program = (
        "import sys; from pathlib import Path; from guest_agent.fence import open_reader\n"
        "reader = open_reader(Path(sys.argv[1])); mark = 0\n"
        "for line in sys.stdin:\n"
        "    mark = mark or reader.mark(); print(mark, reader.passed(mark), reader.mark(), flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=REPOSITORY,
        text=True,
    )

    def look() -> str:
        assert process.stdin is not None
        assert process.stdout is not None
        print(file=process.stdin, flush=True)
        return process.stdout.readline().strip()

    with process:
        assert look() == "0 True 0"
        first, second = writer.begin(), writer.begin()
        assert look() == "2 False 2"
        writer.end(second)
        writer.begin()
        assert look() == "2 False 3"
        writer.end(first)
        assert look() == "2 True 3"


async def test_the_control_link_is_behind_it(
    path: Path, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    ours, theirs = trio.testing.memory_stream_pair()

    async def open_transport() -> trio.abc.Stream:
        await trio.lowlevel.checkpoint()
        return ours

    writer, greeted = writer_of(path), trio.Event()

    async def greet() -> None:
        link = Link(await SerialChannel(theirs).establish(), Role.HOST, Service(), Hello(name="host"))
        await nursery.start(link.run)
        greeted.set()

    ticket = writer.begin()
    nursery.start_soon(Agent(nursery, fence=reader_of(path)).serve, open_transport)
    nursery.start_soon(greet)
    await trio.sleep(MAX_HELD / 2)
    assert not greeted.is_set()
    writer.end(ticket)
    await trio.sleep(2 * HELD_MOST)
    assert greeted.is_set()
    nursery.cancel_scope.cancel()


# --- no memory ---------------------------------------------------------------------------------------------


def test_without_a_folder_nothing_is_fenced(tmp_path: Path) -> None:
    path = tmp_path / "none" / "fence"
    writer = open_writer(path)
    assert open_reader(path) is None
    assert not writer.shared
    writer.end(writer.begin())


def test_what_is_no_file_of_ours_is_not_used(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").touch()
    path.symlink_to(tmp_path / "elsewhere")
    assert open_reader(path) is None
    path.unlink()
    os.mkfifo(path)
    assert open_reader(path) is None
    path.unlink()
    path.touch()
    other = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: other)
    assert open_reader(path) is None


def test_a_full_filesystem_is_met_before_a_number_is_stored(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    assert not open_writer(path).shared


def test_a_host_tells_nobody_unless_it_is_said_whom(path: Path) -> None:
    host = Host()
    assert isinstance(host.fence, Unfenced)
    host.fence.end(host.fence.begin())
    writer = writer_of(path)
    assert Host(fence=writer).fence is writer
