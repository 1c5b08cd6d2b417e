"""Reads and writes through memory that the host has, too: each slot is given back once, whatever becomes of its request."""

from __future__ import annotations

import errno
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from guest_agent.fuse.abi import Opcode, Request
from guest_agent.fuse.host import LOOK_AGAIN, MAX_FLYING, PATIENCE
from guest_agent.fuse.operation import start
from protocol import codec
from protocol.api import Done
from protocol.bulk import MAX_RUN, SLOT, Bulk, Run
from protocol.files import List, Listing, Read, ReadLink, Write, Written
from protocol.messages import Result
from tests.guest_agent.fuse.script import ATTRIBUTES, Asked, Script, failed, pack, replied

SLOTS = 64
READ = pack("QQIIQII", 0, 0, MAX_RUN, 0, 0, 0, 0)


class Shared(Script):
    """A script with memory: ``host`` fills what the guest reads, and writes of the kernel land in slots."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        half = SLOTS * SLOT
        view = memoryview(bytearray(2 * half))
        self.bulk, self.peer = Bulk(), Bulk()
        self.bulk.attach(view[:half], view[half:])
        self.peer.attach(view[half:], view[:half])
        self.begin_session()

    def begin_session(self) -> None:
        busy = self.bulk.busy()
        self.bulk.begin(self.peer.busy())
        self.peer.begin(busy)

    def end_session(self) -> None:
        self.lose_host()
        self.bulk.end()
        self.peer.end()

    def next_session(self) -> None:
        self.begin_session()
        self.find_host()

    def write(self, data: bytes, run: Run | None = None) -> tuple[int, Run]:
        """Hand in a WRITE as it lands, in ``run`` if it was taken before; returns its unique and its run."""
        run = run or self.bulk.take(len(data))
        assert run is not None
        run.view[: len(data)] = data
        run.length = len(data)
        self._unique += 2
        body = pack("QQIIQII", 0, 4096, len(data), 0, 0, 0, 0)
        request = Request(Opcode.WRITE, self._unique, 5, 1000, 1000, 42, memoryview(body))
        request.run = run
        self._filesystem.handle(request)
        return self._unique, run

    def answer(
        self, asked: Asked, data: bytes, value: object = None, errno: int = 0, encoded: object = None
    ) -> None:
        """With ``data`` in memory."""
        run = self.peer.take(len(data))
        assert run is not None
        run.view[: len(data)] = data
        run.length = len(data)
        reference = [run.first, run.length]
        self.peer.lend(run)
        loan = self.bulk.receive(reference)
        if not errno and encoded is None:
            encoded = codec.encode(Done() if value is None else value)
        asked.on_result(Result(1, errno, encoded, loan.view, reference, loan))

    @property
    def nothing_is_kept(self) -> bool:
        return not self.bulk.in_use


def written(data: bytes) -> Written:
    return Written(len(data), 4096, ATTRIBUTES)


# --- writing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2048, SLOT, SLOT + 1, MAX_RUN])
def test_a_write_is_asked_from_its_slots(size: int) -> None:
    script = Shared()
    data = b"w" * size
    unique, run = script.write(data)
    asked = script.take()
    assert asked.call == Write(7, unique, 5, 4096)
    assert asked.payload is run
    assert script.bulk.free == SLOTS - run.slots
    asked.answer(written(data))
    assert script.answers == replied(unique, pack("II", size, 0))
    assert script.nothing_is_kept
    assert script.bulk.free == SLOTS


def test_a_write_that_fails_gives_its_slots_back() -> None:
    script = Shared()
    unique, _ = script.write(b"w" * SLOT)
    script.take().fail(errno.ENOSPC)
    assert script.answers == failed(unique, "ENOSPC")
    assert script.nothing_is_kept


def test_a_write_keeps_its_slots_until_it_is_answered_in_whichever_session() -> None:
    script = Shared()
    unique, run = script.write(b"w" * MAX_RUN)
    for _ in range(3):
        script.end_session()
        assert script.answers == []
        assert bytes(run.content) == b"w" * MAX_RUN
        script.next_session()
        assert [(asked.call.unique, asked.payload) for asked in script.link.asked] == [(unique, run)]
        assert script.bulk.free == SLOTS - run.slots
    script.take().answer(written(b"w" * MAX_RUN))
    assert script.answers == replied(unique, pack("II", MAX_RUN, 0))
    assert script.nothing_is_kept


def test_a_write_without_slots_is_copied() -> None:
    script = Shared()
    script.request(Opcode.WRITE, pack("QQIIQII", 0, 0, 4, 0, 0, 0, 0) + b"data")
    assert script.take().payload == b"data"


def test_an_answer_that_is_none_gives_the_slots_back(caplog: pytest.LogCaptureFixture) -> None:
    script = Shared()
    unique, _ = script.write(b"w" * SLOT)
    script.take().on_result(Result(1, 0, ["what", "is", "this"]))
    assert script.answers == failed(unique, "EIO")
    assert "operation.failed" in caplog.text
    assert script.nothing_is_kept


async def test_what_is_given_up_gives_its_slots_back(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    script = Shared()
    nursery.start_soon(script.host.keep_patience)
    unique, _ = script.write(b"w" * MAX_RUN)
    taken = script.bulk.take(SLOT)
    script.end_session()
    await trio.sleep(PATIENCE + 1)
    assert script.answers == failed(unique, "EIO")
    at_once, _ = script.write(b"w" * SLOT, taken)
    assert script.answers == failed(at_once, "EIO")
    assert script.nothing_is_kept


def test_a_dying_writer_that_was_never_heard_gives_its_slots_back() -> None:
    script = Shared(connected=False)
    unique, _ = script.write(b"w" * SLOT)
    script.dying = {42}
    script.request(Opcode.INTERRUPT, pack("Q", unique), pid=0)
    assert script.answers == failed(unique, "EINTR")
    assert script.nothing_is_kept


def test_a_dying_writer_that_was_heard_waits_with_its_slots() -> None:
    script = Shared()
    script.dying = {42}
    unique, run = script.write(b"w" * SLOT)
    script.end_session()
    script.request(Opcode.INTERRUPT, pack("Q", unique), pid=0)
    script.host.let_the_dying_go()
    assert script.answers == []
    assert bytes(run.content) == b"w" * SLOT
    script.next_session()
    script.take().answer(written(b"w" * SLOT))
    assert script.nothing_is_kept


def test_slots_count_as_what_flies() -> None:
    """More than the link should hold waits its turn in its slots."""
    script = Shared()
    script.host._turns._max_bytes = 4 * MAX_RUN
    uniques = [script.write(b"w" * MAX_RUN)[0] for _ in range(6)]
    assert MAX_FLYING > 4 * MAX_RUN
    assert [asked.call.unique for asked in script.link.asked] == uniques[:2]
    for unique in uniques:
        assert script.link.asked[0].call.unique == unique
        script.take().answer(written(b"w" * MAX_RUN))
    assert script.answers == [
        answer for unique in uniques for answer in replied(unique, pack("II", MAX_RUN, 0))
    ]
    assert script.nothing_is_kept


# --- reading ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2048, SLOT, MAX_RUN])
def test_what_was_read_goes_to_the_kernel_out_of_memory(size: int) -> None:
    script = Shared()
    unique = script.request(Opcode.READ, READ)
    asked = script.take()
    assert asked.call == Read(7, unique, 5, 0, MAX_RUN)
    script.answer(asked, b"r" * size)
    assert script.answers == replied(unique, b"r" * size)
    assert script.nothing_is_kept
    assert script.bulk.take_frees(), "and the host gets it back"


def test_what_came_inline_is_answered_as_well() -> None:
    script = Shared()
    unique = script.request(Opcode.READ, READ)
    script.take().answer(payload=b"little")
    assert script.answers == replied(unique, b"little")


def test_an_error_that_brings_data_keeps_no_memory() -> None:
    script = Shared()
    unique = script.request(Opcode.READ, READ)
    script.answer(script.take(), b"r" * SLOT, errno=errno.ENOSPC)
    assert script.answers == failed(unique, "ENOSPC")
    assert script.nothing_is_kept


def test_an_answer_that_is_none_keeps_no_memory(caplog: pytest.LogCaptureFixture) -> None:
    script = Shared()
    unique = script.request(Opcode.READ, READ)
    script.answer(script.take(), b"r" * SLOT, encoded="what is this")
    assert script.answers == failed(unique, "EIO")
    assert "operation.failed" in caplog.text
    assert script.nothing_is_kept


def test_data_where_none_belongs_keeps_no_memory() -> None:
    script = Shared()
    unique, _ = script.write(b"w" * SLOT)
    script.answer(script.take(), b"r" * SLOT, written(b"w" * SLOT))
    assert script.answers == replied(unique, pack("II", SLOT, 0))
    assert script.nothing_is_kept


def test_what_another_call_was_answered_is_copied_out() -> None:
    script = Shared()
    received: list[bytes] = []

    async def ask() -> bytes:
        call = script.host.ask(List(7, 2, 5, 1, 0))
        await call
        received.append(call.received)
        return b""

    start(ask(), script.kernel, 2)
    script.answer(script.take(), b"l" * SLOT, Listing(SLOT, True))
    assert script.nothing_is_kept
    assert received == [b"l" * SLOT]
    script.peer.freed(script.bulk.take_frees())


def test_an_answer_that_nobody_waits_for_keeps_no_memory() -> None:
    script = Shared()
    script.host.tell(ReadLink(7, 0, 5))
    script.answer(script.take(), b"r" * SLOT)
    assert script.nothing_is_kept


async def test_an_answer_for_a_caller_that_was_let_go_keeps_no_memory(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    script = Shared()
    nursery.start_soon(script.host.watch_the_signalled)
    unique = script.request(Opcode.READ, READ)
    script.dying = {42}
    script.request(Opcode.INTERRUPT, pack("Q", unique), pid=0)
    await trio.sleep(1.1 * LOOK_AGAIN)
    assert script.answers == failed(unique, "EINTR")
    script.answer(script.take(), b"r" * SLOT)
    assert script.nothing_is_kept


def test_a_read_asked_in_two_sessions_is_answered_out_of_the_second() -> None:
    script = Shared()
    unique = script.request(Opcode.READ, READ)
    script.end_session()
    script.next_session()
    script.answer(script.take(), b"r" * MAX_RUN)
    assert script.answers == replied(unique, b"r" * MAX_RUN)
    assert script.nothing_is_kept
