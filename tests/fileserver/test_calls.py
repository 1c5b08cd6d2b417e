"""Calls whose payloads lie in memory that the guest has, too: whose slots are whose, whatever goes wrong meanwhile."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import trio

from fileserver import admission
from protocol import link
from protocol.bulk import INLINE_BELOW, SLOT, Bulk, Run
from protocol.files import MAX_DATA, ROOT, GetAttributes, List, Read, Write
from tests.fileserver.peers import SHARE, Kernel, Pending, until
from tests.fileserver.scene import Connected, Gate, connected, memory, waiting

SLOTS = 32
OF_A_CALL = MAX_DATA // SLOT
OTHER = SHARE + 1


def filled(bulk: Bulk, content: bytes) -> Run:
    run = bulk.take(len(content))
    assert run is not None
    run.view[: len(content)] = content
    run.length = len(content)
    return run


async def large(guest: Connected, content: bytes, name: str = "large") -> int:
    """The node of a new file."""
    (guest.root / name).write_bytes(content)
    return (await guest.kernel.lookup(os.fsencode(name))).node


async def all_free(guest: Connected, host: Bulk, guests: Bulk) -> None:
    """What has not been given back yet goes with the next frame."""

    async def settle() -> bool:
        await guest.kernel.ask(GetAttributes(SHARE, guest.kernel.unique(), ROOT))
        return host.free == guests.free == SLOTS

    with trio.fail_after(20):
        while not await settle():
            await trio.sleep(0.001)
    assert not host.in_use
    assert not guests.in_use


# --- reading ---------------------------------------------------------------------------------------


async def read(kernel: Kernel, node: int, offset: int, size: int) -> Pending:
    pending = kernel.begin(Read(SHARE, kernel.unique(), node, offset, size))
    await kernel.finish(pending)
    return pending


async def test_what_is_read_comes_in_memory(place: Path) -> None:
    host, guests = memory(SLOTS)
    content = os.urandom(MAX_DATA + 12345)
    async with connected(place, (host, guests)) as guest:
        node = await large(guest, content)
        for offset, size in [
            (0, MAX_DATA), (0, SLOT), (1, SLOT), (7, MAX_DATA), (len(content) - INLINE_BELOW, MAX_DATA),
        ]:  # fmt: skip
            pending = await read(guest.kernel, node, offset, size)
            expected = content[offset : offset + size]
            assert pending.result is not None
            assert pending.result.payload == expected
            assert pending.lent == len(expected), "it came inline"
        await all_free(guest, host, guests)


async def test_little_and_nothing_come_inline_and_their_slots_are_free(place: Path) -> None:
    host, guests = memory(SLOTS)
    content = os.urandom(SLOT + 100)
    async with connected(place, (host, guests)) as guest:
        node = await large(guest, content)
        for offset, size in [
            (0, 1), (0, INLINE_BELOW - 1), (SLOT, MAX_DATA), (len(content), MAX_DATA), (1 << 40, SLOT), (0, 0),
        ]:  # fmt: skip
            pending = await read(guest.kernel, node, offset, size)
            assert pending.result is not None
            assert (pending.result.payload, pending.lent) == (content[offset : offset + size], 0)
            assert host.free == SLOTS
        await all_free(guest, host, guests)


async def test_a_hole_is_zeros_though_the_slots_had_other_content(place: Path) -> None:
    host, guests = memory(OF_A_CALL)
    async with connected(place, (host, guests)) as guest:
        node = await large(guest, b"\xff" * MAX_DATA)
        sparse = guest.root / "sparse"
        with sparse.open("wb") as file:
            file.truncate(MAX_DATA - 10)
        hole = (await guest.kernel.lookup(b"sparse")).node
        for _ in range(2):
            for which, expected in (node, b"\xff" * MAX_DATA), (hole, bytes(MAX_DATA - 10)):
                pending = await read(guest.kernel, which, 0, MAX_DATA)
                assert pending.result is not None
                assert pending.result.payload == expected
                assert pending.lent == len(expected)


async def test_a_read_that_goes_wrong_in_the_middle_gives_its_run_back(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk gives one byte, and fails for the rest."""

    def preadv(descriptor: int, buffers: list[Any], offset: int) -> int:
        if offset:
            raise OSError(errno.EIO, "")
        return real(descriptor, [buffers[0][:1]], offset)

    host, guests = memory(SLOTS)
    async with connected(place, (host, guests)) as guest:
        node = await large(guest, os.urandom(MAX_DATA))
        real = os.preadv
        monkeypatch.setattr(os, "preadv", preadv)
        for _ in range(3 * SLOTS):
            pending = await read(guest.kernel, node, 0, MAX_DATA)
            assert pending.result is not None
            assert (pending.result.errno, pending.lent) == (errno.EIO, 0)
        monkeypatch.undo()
        assert (await read(guest.kernel, node, 0, MAX_DATA)).lent == MAX_DATA
        assert (await read(guest.kernel, 12345, 0, MAX_DATA)).lent == 0  # no such node
        await all_free(guest, host, guests)


async def test_short_reads_of_a_disk_are_continued_in_place(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.preadv
    monkeypatch.setattr(
        os, "preadv", lambda descriptor, buffers, offset: real(descriptor, [buffers[0][:77_777]], offset)
    )
    content = os.urandom(MAX_DATA - 1)
    async with connected(place, memory(SLOTS)) as guest:
        node = await large(guest, content)
        pending = await read(guest.kernel, node, 0, MAX_DATA)
        assert pending.result is not None
        assert pending.result.payload == content


async def test_a_session_that_ends_while_runs_are_being_filled(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads go on filling what the next session has not got; then it is free."""
    host, guests = memory(SLOTS)
    content = os.urandom(MAX_DATA)
    async with waiting(place, (host, guests)) as guest:
        kernel = guest.kernel
        async with guest.session():
            node = await large(guest, content)
            gate = Gate(monkeypatch, Read)
            first = [kernel.begin(Read(SHARE, kernel.unique(), node, 0, MAX_DATA)) for _ in range(2)]
            await until(lambda: len(gate.begun) == 2)
            assert host.free == SLOTS - 2 * OF_A_CALL
        async with guest.session():
            await until(lambda: host.active)
            assert host.free == SLOTS - 2 * OF_A_CALL, "threads have them yet"
            gate.open()
            for pending in first:
                assert (await kernel.finish(pending)).payload == content
            await all_free(guest, host, guests)


async def test_if_no_memory_comes_back_reads_go_on_without(place: Path) -> None:
    """A guest that keeps what it was lent: each answer after that comes inline, until it gives something back."""
    host, guests = memory(OF_A_CALL)
    content = os.urandom(MAX_DATA)
    async with connected(place, (host, guests)) as guest:
        guest.kernel.keep_loans = True
        node = await large(guest, content)
        kept = await read(guest.kernel, node, 0, MAX_DATA)
        assert kept.lent == MAX_DATA
        for _ in range(5):
            pending = await read(guest.kernel, node, 0, MAX_DATA)
            assert pending.result is not None
            assert (pending.lent, pending.result.payload) == (0, content)
            assert host.stuck
        assert kept.result is not None
        assert kept.result.loan is not None
        kept.result.loan.release()
        await all_free_of(guest, host)
        assert not host.stuck
        assert (await read(guest.kernel, node, 0, MAX_DATA)).lent == MAX_DATA


async def all_free_of(guest: Connected, host: Bulk) -> None:
    with trio.fail_after(20):
        while host.free < OF_A_CALL:
            await guest.kernel.ask(GetAttributes(SHARE, guest.kernel.unique(), ROOT))


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Links for which no time is too long without memory."""
    monkeypatch.setattr(link, "STUCK_AFTER", 1000.0)


@pytest.mark.usefixtures("patient")
async def test_reads_wait_for_memory_and_go_on_when_it_comes_back(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, guests = memory(3 * OF_A_CALL)
    content = os.urandom(MAX_DATA)
    async with connected(place, (host, guests)) as guest:
        kernel = guest.kernel
        node = await large(guest, content)
        gate = Gate(monkeypatch, Read)
        reads = [kernel.begin(Read(SHARE, kernel.unique(), node, 0, MAX_DATA)) for _ in range(20)]
        await until(lambda: len(gate.begun) == 2)
        await kernel.ask(GetAttributes(SHARE, kernel.unique(), ROOT))
        assert len(gate.begun) == 2, "there is memory for three, of which one is for other shares"
        gate.open()
        for pending in reads:
            assert (await kernel.finish(pending)).payload == content
            assert pending.lent == MAX_DATA
        await all_free_small(guest, host, guests, 3 * OF_A_CALL)


@pytest.mark.usefixtures("patient")
async def test_a_read_that_is_sent_inline_in_any_case_waits_for_no_memory(place: Path) -> None:
    host, guests = memory(OF_A_CALL)
    async with connected(place, (host, guests)) as guest:
        guest.kernel.keep_loans = True
        node = await large(guest, bytes(MAX_DATA))
        assert (await read(guest.kernel, node, 0, MAX_DATA)).lent == MAX_DATA
        assert host.free == 0
        await read(guest.kernel, node, 0, INLINE_BELOW - 1)
        await guest.kernel.ask(List(SHARE, guest.kernel.unique(), ROOT, 1, 0))
        assert not host.wanted


async def all_free_small(guest: Connected, host: Bulk, guests: Bulk, slots: int) -> None:
    with trio.fail_after(20):
        while not (host.free == guests.free == slots):
            await guest.kernel.ask(GetAttributes(SHARE, guest.kernel.unique(), ROOT))


async def another_share(guest: Connected, place: Path, content: bytes) -> int:
    """Of number ``OTHER``, and the node of a file in it."""
    second = place / "second"
    second.mkdir()
    (second / "file").write_bytes(content)
    folder = guest.scene.folder
    await guest.scene.agent.serve(folder, type(folder)(OTHER, str(second), "/second"))
    await until(lambda: len(guest.kernel.mounted[-1].shares) == 2)
    return (await guest.kernel.lookup(b"file", share=OTHER)).node


@pytest.mark.usefixtures("patient")
async def test_a_share_that_hangs_leaves_memory_to_another(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, guests = memory(SLOTS)
    content = os.urandom(MAX_DATA)
    async with connected(place, (host, guests)) as guest:
        kernel = guest.kernel
        node = await large(guest, content)
        elsewhere = await another_share(guest, place, content)
        gate = Gate(monkeypatch, Read)
        hanging = [kernel.begin(Read(SHARE, kernel.unique(), node, 0, MAX_DATA)) for _ in range(50)]
        await until(lambda: len(gate.begun) == 2)
        assert host.free == SLOTS // 2
        for _ in range(20):
            pending = kernel.begin(Read(OTHER, kernel.unique(), elsewhere, 0, MAX_DATA))
            assert (await kernel.finish(pending)).payload == content
            assert pending.lent == MAX_DATA
        gate.open()
        for pending in hanging:
            assert (await kernel.finish(pending)).payload == content
        await all_free(guest, host, guests)


async def test_a_share_that_hangs_with_all_memory_does_not_stop_another(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, guests = memory(OF_A_CALL)
    content = os.urandom(MAX_DATA)
    async with connected(place, (host, guests)) as guest:
        kernel = guest.kernel
        node = await large(guest, content)
        elsewhere = await another_share(guest, place, content)
        gate = Gate(monkeypatch, Read)
        hanging = [kernel.begin(Read(SHARE, kernel.unique(), node, 0, MAX_DATA)) for _ in range(3)]
        await until(lambda: gate.begun)
        for _ in range(5):
            pending = kernel.begin(Read(OTHER, kernel.unique(), elsewhere, 0, MAX_DATA))
            result = await kernel.finish(pending)
            assert (result.payload, pending.lent) == (content, 0)
        gate.open()
        for pending in hanging:
            assert (await kernel.finish(pending)).payload == content


# --- writing ---------------------------------------------------------------------------------------


class SlowDisk:
    """Writes begin, and wait until ``go_on``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._gate = Gate(monkeypatch, Write)

    @property
    def begun(self) -> int:
        return len(self._gate.begun)

    def go_on(self) -> None:
        self._gate.open()


def heir(before: Bulk) -> Bulk:
    """Of a guest's agent that was started again: it knows of nothing, and has the same memory."""
    bulk = Bulk()
    bulk.attach(before._own, before._peers)
    return bulk


async def in_use(bulk: Bulk) -> None:
    await until(lambda: bulk.active)


@pytest.mark.parametrize("size", [1, INLINE_BELOW - 1, INLINE_BELOW, SLOT, SLOT + 1, MAX_DATA])
@pytest.mark.parametrize("append", [False, True])
async def test_what_is_written_is_what_the_slots_held(place: Path, size: int, append: bool) -> None:
    host, guests = memory(SLOTS)
    content = os.urandom(size)
    async with connected(place, (host, guests)) as guest:
        node = await large(guest, b"start")
        run = filled(guests, content)
        write = Write(SHARE, guest.kernel.unique(), node, 0 if append else 5, append)
        written = await guest.kernel.ask(write, run)
        assert (written.size, written.offset) == (size, 5)
        run.give_back()
        assert (guest.root / "large").read_bytes() == b"start" + content
        await all_free(guest, host, guests)


async def test_many_writes_at_a_time(place: Path) -> None:
    host, guests = memory(SLOTS)
    blocks = [os.urandom(SLOT * (number % 3) + 5000) for number in range(12)]
    async with connected(place, (host, guests)) as guest:
        kernel = guest.kernel
        node = await large(guest, b"")
        runs = [filled(guests, block) for block in blocks]
        writes = [
            kernel.begin(Write(SHARE, kernel.unique(), node, number * MAX_DATA), run)
            for number, run in enumerate(runs)
        ]
        for pending, run in zip(writes, runs, strict=True):
            assert (await kernel.finish(pending)).errno == 0
            run.give_back()
        written = (guest.root / "large").read_bytes()
        for number, block in enumerate(blocks):
            assert written[number * MAX_DATA :].startswith(block)
        await all_free(guest, host, guests)


async def test_a_slot_is_busy_for_every_later_session_until_the_disk_has_it(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guest's agent is killed, twice, while a thread writes: no successor fills what is being written."""
    host, guests = memory(SLOTS)
    content = b"w" * MAX_DATA
    async with waiting(place, (host, guests)) as guest:
        kernel = guest.kernel
        disk = SlowDisk(monkeypatch)
        async with guest.session():
            node = await large(guest, b"")
            run = filled(guests, content)
            write = Write(SHARE, kernel.unique(), node, 0)
            pending = kernel.begin(write, run)
            await until(lambda: disk.begun)
        kernel.pending.clear()
        for _ in range(2):
            successor = heir(guests)
            kernel.bulk = successor
            async with guest.session():
                await in_use(successor)
                assert successor.free == SLOTS - OF_A_CALL
                while (free := successor.take(SLOT)) is not None:
                    free.view[:] = b"x" * SLOT
        assert host.in_use
        disk.go_on()
        await until(lambda: not host.in_use)
        assert (guest.root / "large").read_bytes() == content
        assert pending.result is None
        last = kernel.bulk = heir(guests)
        async with guest.session():
            await in_use(last)
            assert last.free == SLOTS


async def test_a_slot_comes_back_in_the_session_in_which_the_disk_has_it(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, guests = memory(SLOTS)
    async with waiting(place, (host, guests)) as guest:
        kernel = guest.kernel
        disk = SlowDisk(monkeypatch)
        async with guest.session():
            node = await large(guest, b"")
            run = filled(guests, os.urandom(MAX_DATA))
            kernel.begin(Write(SHARE, kernel.unique(), node, 0), run)
            await until(lambda: disk.begun)
        kernel.pending.clear()
        successor = kernel.bulk = heir(guests)
        async with guest.session():
            await in_use(successor)
            assert successor.free == SLOTS - OF_A_CALL
            disk.go_on()
            await all_free(guest, host, successor)


async def test_a_write_asked_again_from_the_same_slots_is_done_once(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sessions end while a thread writes; the guest keeps its slots, and shows them again."""
    host, guests = memory(SLOTS)
    content = os.urandom(MAX_DATA)
    async with waiting(place, (host, guests)) as guest:
        kernel = guest.kernel
        disk = SlowDisk(monkeypatch)
        async with guest.session():
            node = await large(guest, b"")
            run = filled(guests, content)
            pending = kernel.begin(Write(SHARE, kernel.unique(), node, 0, append=True), run)
            await until(lambda: disk.begun)
        for _ in range(2):
            async with guest.session():
                await until(lambda: guests.active)
                await kernel.ask(GetAttributes(SHARE, kernel.unique(), ROOT))
        async with guest.session():
            disk.go_on()
            assert (await kernel.finish(pending)).errno == 0
            run.give_back()
            assert (disk.begun, pending.sent) == (1, 4)
            assert (guest.root / "large").read_bytes() == content
            await all_free(guest, host, guests)


async def test_what_was_given_up_is_not_filled_while_it_is_written(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same agent, which has waited for too long, gives its run back between two sessions."""
    host, guests = memory(SLOTS)
    async with waiting(place, (host, guests)) as guest:
        kernel = guest.kernel
        disk = SlowDisk(monkeypatch)
        content = os.urandom(SLOT)
        async with guest.session():
            node = await large(guest, b"")
            run = filled(guests, content)
            kernel.begin(Write(SHARE, kernel.unique(), node, 0), run)
            await until(lambda: disk.begun)
        kernel.pending.clear()
        run.give_back()
        assert guests.take(SLOT) is None
        async with guest.session():
            await until(lambda: guests.active)
            assert guests.free == SLOTS - 1
            while (free := guests.take(SLOT)) is not None:
                free.view[:] = bytes(SLOT)
                kept = free
            kept.give_back()
            disk.go_on()
            await until(lambda: not host.in_use)
            assert (guest.root / "large").read_bytes() == content


async def test_calls_that_are_refused_give_their_slots_back(place: Path) -> None:
    host, guests = memory(SLOTS)
    async with connected(place, (host, guests)) as guest:
        kernel = guest.kernel
        run = filled(guests, os.urandom(MAX_DATA))
        for op, args, expected in [
            (99, [], errno.ENOSYS),
            (Write.OP, ["nonsense"], errno.EINVAL),
            (Write.OP, [SHARE + 1, 2, ROOT, 0], errno.ENODEV),
            (Write.OP, [SHARE, 4, 12345, 0], errno.ESTALE),
            (GetAttributes.OP, [SHARE, 6, ROOT], 0),
        ]:
            assert (await kernel.ask_anything(op, args, run)).errno == expected
            assert not host.in_use
        run.give_back()
        await all_free(guest, host, guests)


async def test_what_was_held_back_lets_go_of_its_slots_with_its_session(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guest that sends data along with its reads, for whatever reason, has not more of it kept than it asked for."""
    monkeypatch.setattr(admission, "MAX_OF_A_SHARE", MAX_DATA)
    host, guests = memory(SLOTS)
    async with waiting(place, (host, guests)) as guest:
        kernel = guest.kernel
        async with guest.session():
            node = await large(guest, os.urandom(MAX_DATA))
            gate = Gate(monkeypatch, Read)
            for _ in range(3):
                kernel.begin(Read(SHARE, kernel.unique(), node, 0, MAX_DATA), filled(guests, bytes(SLOT)))
            await until(lambda: gate.begun)
        kernel.pending.clear()
        gate.open()
        await until(lambda: not host.in_use)
