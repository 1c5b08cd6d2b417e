"""Writes that the guest has answered for before they are done: what waits for them, and that nothing tells of it."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

from fileserver import calls, prompt
from fileserver.behind import Batch, Behind
from fileserver.calls import Calls
from fileserver.control import SharedFolder
from fileserver.data import DataOperations
from fileserver.shares import Share
from fileserver.tree import Outcome, Tree
from protocol import files
from protocol.files import (
    MAX_DATA,
    ROOT,
    SET_SIZE,
    Create,
    FileCall,
    Forget,
    GetAttributes,
    GetFilesystemSize,
    GetXattr,
    List,
    ListEntries,
    ListXattr,
    Lookup,
    Read,
    ReadLink,
    ReadMany,
    Release,
    Rename,
    Seek,
    SetAttributes,
    SetLock,
    Sync,
    Unlink,
    Write,
)
from tests.fileserver.peers import SHARE, SOON, Kernel, Pending, until
from tests.fileserver.scene import Connected, Gate, connected, memory, waiting
from tests.fileserver.served import attr

FILE, ELSEWHERE = 3, 4
LARGE = prompt.MAX_PAYLOAD + 1
OTHER = SHARE + 1


def ahead(node: int = FILE) -> Write:
    return Write(1, 2, node, 0, ahead=True)


# --- the queue -------------------------------------------------------------------------------------


@pytest.mark.parametrize("of_a_file", [
    GetAttributes(1, 2, FILE), GetXattr(1, 2, FILE, b"user.x"), ListXattr(1, 2, FILE), Read(1, 2, FILE, 0, 1),
    ReadLink(1, 2, FILE), Seek(1, 2, FILE, 0, os.SEEK_DATA),
])  # fmt: skip
def test_a_question_waits_for_writes_of_its_own_file_only(of_a_file: Any) -> None:
    behind: Behind[str] = Behind()
    behind.begin(ahead(), "w")
    assert behind.holds(of_a_file)
    assert not behind.holds(replace(of_a_file, node=ELSEWHERE))


@pytest.mark.parametrize("call", [
    ahead(ELSEWHERE), Write(1, 2, ELSEWHERE, 0), Forget(1, 2, 0, [9], [1]), Rename(1, 2, ROOT, b"a", ROOT, b"b"),
    Unlink(1, 2, ROOT, b"a"), Create(1, 2, ROOT, b"a", 0o644, 0), SetAttributes(1, 2, ELSEWHERE, SET_SIZE),
    Sync(1, 2, ELSEWHERE), Lookup(1, 2, ROOT, b"a"), List(1, 2, ROOT, 1, 0), ListEntries(1, 2, ROOT, 0),
    ReadMany(1, 2, ROOT, [ELSEWHERE], 1), GetFilesystemSize(1, 2, ROOT), Release(1, 2, ELSEWHERE, 1, 1),
    SetLock(1, 2, ELSEWHERE, 1, 1, 0, 0, 1), files.TestLock(1, 2, ELSEWHERE, 1, 1, 0, 0, 1),
])  # fmt: skip
def test_what_could_tell_or_changes_something_waits(call: Any) -> None:
    behind: Behind[str] = Behind()
    behind.begin(ahead(), "w")
    assert behind.holds(call)


def test_what_waits_begins_in_its_order_and_after_the_writes_before_it() -> None:
    behind: Behind[str] = Behind()
    assert list(behind.begin(ahead(), "w1").items) == ["w1"]
    for call, item in [
        (ahead(), "w2"), (ahead(ELSEWHERE), "w3"), (Unlink(1, 2, ROOT, b"a"), "unlink"),
        (GetAttributes(1, 2, FILE), "stat"), (ahead(), "w4"), (Sync(1, 2, FILE), "sync"),
    ]:  # fmt: skip
        assert behind.holds(call)
        behind.wait(call, item)
    assert behind.next() is None
    behind.ended(ahead())
    assert behind.next() == "w2"
    assert list(behind.begin(ahead(), "w2").items) == ["w2", "w3"], (
        "one thread does them, one after the other"
    )
    behind.ended(ahead())
    assert behind.next() is None
    assert behind.holds(GetAttributes(1, 2, ELSEWHERE))
    behind.ended(ahead(ELSEWHERE))
    assert not behind.holds(GetAttributes(1, 2, ELSEWHERE))
    assert behind.holds(GetAttributes(1, 2, FILE)), "a write of it waits"
    assert [behind.next(), behind.next(), behind.next()] == ["unlink", "stat", "w4"]
    assert behind.next() == "sync", "w4 was done at once"
    assert behind.next() is None
    assert not behind
    assert not behind.holds(GetAttributes(1, 2, FILE))


def test_what_is_dropped_changes_nothing() -> None:
    behind: Behind[str] = Behind()
    behind.begin(ahead(), "w1")
    for call, item in [(Lookup(1, 2, ROOT, b"a"), "lookup"), (ahead(), "w2"), (Sync(1, 2, FILE), "sync")]:
        behind.wait(call, item)
    assert behind.drop() == ["lookup", "sync"]
    behind.ended(ahead())
    assert behind.next() == "w2"
    assert behind.next() is None


def test_what_waits_at_the_end_is_done_after_what_is_under_way() -> None:
    behind: Behind[str] = Behind()
    first = behind.begin(ahead(), "w1")
    for call, item in [
        (ahead(), "w2"),
        (List(1, 2, ROOT, 1, 0), "list"),
        (Unlink(1, 2, ROOT, b"a"), "unlink"),
    ]:
        behind.wait(call, item)
    rest, left_out = behind.close(lambda call: isinstance(call, List))
    assert left_out == ["list"]
    assert behind.next() is None
    done: list[str] = []
    thread = threading.Thread(target=rest.run, args=(done.append,))
    thread.start()
    first.run(done.append)
    thread.join(SOON)
    assert done == ["w1", "w2", "unlink"]
    assert not rest.items


def test_what_fails_in_a_batch_does_not_stop_the_rest(caplog: pytest.LogCaptureFixture) -> None:
    behind: Behind[int] = Behind()
    batch: Batch[int] = behind.begin(ahead(), 0)
    batch.items.append(1)
    quotients: list[float] = []
    batch.run(lambda item: quotients.append(1 / item))
    assert quotients == [1.0]
    assert "call.failed" in caplog.text
    caplog.clear()


# --- served ----------------------------------------------------------------------------------------


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[FileCall[Any]]:
    """The calls that were done, in the order in which they were."""
    order: list[FileCall[Any]] = []
    perform = Tree.perform

    def note(tree: Tree, call: Any, payload: bytes = b"") -> Outcome:
        try:
            return perform(tree, call, payload)
        finally:
            order.append(call)

    monkeypatch.setattr(Tree, "perform", note)
    return order


class Writer:
    """A program of the guest's that writes a new file ahead, while the disk of the host hangs (``gate``)."""

    def __init__(self, guest: Connected, node: int, other: int, gate: Gate) -> None:
        self.guest = guest
        self.kernel = guest.kernel
        self.node = node
        self.other = other
        self.gate = gate
        self.content = b""
        self.writes: list[Pending] = []

    @property
    def calls(self) -> Calls:
        return self.guest.scene.server._calls

    def write(self, size: int = LARGE) -> Pending:
        content = bytes([65 + len(self.writes)]) * size
        call = Write(SHARE, self.kernel.unique(), self.node, len(self.content), append=True, ahead=True)
        self.content += content
        self.writes.append(self.kernel.begin(call, content))
        return self.writes[-1]

    def begin(self, kind: type[FileCall[Any]], *arguments: Any) -> Pending:
        return self.kernel.begin(kind(SHARE, self.kernel.unique(), *arguments))  # type: ignore[call-arg]

    async def finish(self, *calls: Pending) -> list[int]:
        return [(await self.kernel.finish(call)).errno for call in calls]

    async def others_are_served(self) -> None:
        """What came before this has come to the host."""
        assert (await self.kernel.finish(self.begin(Read, self.other, 0, 5))).payload == b"other"
        assert len(self.gate.begun) == 1

    async def all_over(self) -> None:
        await until(lambda: not self.calls._waiting)
        assert not self.calls._waiting_bytes
        assert not self.calls._behind
        assert not self.calls._admission._queues

    @property
    def written(self) -> bytes:
        return (self.guest.root / "file").read_bytes()


async def writer(guest: Connected, monkeypatch: pytest.MonkeyPatch) -> Writer:
    """The first write is in a thread."""
    for name, content in ("file", b""), ("other", b"other"):
        (guest.root / name).write_bytes(content)
    nodes = [(await guest.kernel.lookup(name)).node for name in (b"file", b"other")]
    begun = Writer(guest, *nodes, Gate(monkeypatch, Write))
    begun.write()
    await until(lambda: begun.gate.begun)
    return begun


@asynccontextmanager
async def writing(place: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> AsyncIterator[Writer]:
    async with connected(place, **options) as guest:
        begun = await writer(guest, monkeypatch)
        try:
            yield begun
        finally:
            begun.gate.open()


async def test_appends_keep_their_order(
    place: Path, monkeypatch: pytest.MonkeyPatch, done: list[FileCall[Any]]
) -> None:
    async with writing(place, monkeypatch) as program:
        for size in (MAX_DATA, LARGE, 1, LARGE):
            program.write(size)
        await program.others_are_served()
        program.gate.open()
        assert await program.finish(*program.writes) == [0] * 5
        assert program.written == program.content
        assert [call for call in done if type(call) is Write] == [each.call for each in program.writes]
        await program.all_over()


async def test_what_came_behind_is_done_behind(
    place: Path, monkeypatch: pytest.MonkeyPatch, done: list[FileCall[Any]]
) -> None:
    """Also what came behind that, whatever it is about."""
    async with writing(place, monkeypatch) as program:
        behind = [
            program.begin(Rename, ROOT, b"file", ROOT, b"renamed"),
            program.begin(Sync, program.other),
            program.write(),
            program.begin(Unlink, ROOT, b"other"),
        ]
        await program.others_are_served()
        assert (program.guest.root / "file").exists()
        program.gate.open()
        assert await program.finish(*behind) == [0] * 4
        assert (program.guest.root / "renamed").read_bytes() == program.content
        changes = [type(call) for call in done if call.CHANGES]
        assert changes[0] is Write
        assert changes.index(Unlink) > len(changes) - 1 - changes[::-1].index(Write)
        await program.all_over()


async def test_who_asks_about_the_file_is_told_of_what_was_written(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with writing(place, monkeypatch) as program:
        asked = [program.begin(GetAttributes, program.node), program.begin(Read, program.node, 0, MAX_DATA)]
        looked = [program.kernel.begin(Lookup(SHARE, program.kernel.unique(), ROOT, b"file"))]
        await program.others_are_served()
        assert not program.calls._admission._queues, "room for an answer is taken when its turn has come"
        program.gate.open()
        assert await program.finish(*asked, *looked) == [0] * 3
        assert asked[1].result is not None
        assert asked[1].result.payload == program.content
        for told, result in (asked[0], "Attributes"), (looked[0], "Entry"):
            assert told.result is not None
            assert type(_decoded(told)).__name__ == result
            assert attr(_decoded(told)).size == LARGE


def _decoded(asked: Pending) -> Any:
    assert asked.result is not None
    return calls.codec.decode(asked.call.RESULT, asked.result.value)


async def test_another_share_waits_for_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "second").mkdir()
    (place / "second" / "file").write_bytes(b"")
    async with writing(place, monkeypatch) as program:
        await program.guest.scene.agent.serve(
            program.guest.scene.folder, SharedFolder(OTHER, str(place / "second"), "/second")
        )
        await until(lambda: len(program.kernel.mounted[-1].shares) == 2)
        program.begin(Sync, program.node)
        node = (await program.kernel.lookup(b"file", share=OTHER)).node
        written = Write(OTHER, program.kernel.unique(), node, 0, ahead=True)
        assert (await program.kernel.ask(written, b"x" * LARGE)).size == LARGE
        await program.others_are_served()


async def test_calls_that_have_waited_are_done_at_once_one_after_another(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More of them than Python can call within each other."""
    async with writing(place, monkeypatch) as program:
        asked = [program.begin(GetAttributes, program.node) for _ in range(900)]
        await program.others_are_served()
        monkeypatch.setattr(Share, "is_prompt", True)
        program.gate.open()
        assert set(await program.finish(*asked)) == {0}
        await program.all_over()


async def test_too_much_that_waits_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "MAX_WAITING_BYTES", 2 * LARGE)
    async with writing(place, monkeypatch) as program:
        program.write()
        refused = program.write()
        assert await program.finish(refused) == [errno.ENOMEM]
        program.gate.open()
        assert await program.finish(*program.writes[:2]) == [0, 0]
        assert program.written == program.content[: 2 * LARGE]
        await program.all_over()


# --- sessions --------------------------------------------------------------------------------------


async def test_a_session_that_ends_loses_no_change(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nobody asks again: the guest's agent was killed."""
    host, guests = memory(64)
    async with waiting(place, (host, guests)) as guest:
        async with guest.session():
            program = await writer(guest, monkeypatch)
            run = guests.take(LARGE)
            assert run is not None
            run.view[:LARGE], run.length = b"B" * LARGE, LARGE
            program.kernel.begin(
                Write(SHARE, program.kernel.unique(), program.node, LARGE, append=True, ahead=True), run
            )
            program.begin(Lookup, ROOT, b"other")
            program.begin(ListEntries, ROOT, 0)
            program.begin(Read, program.node, 0, MAX_DATA)
            program.begin(Rename, ROOT, b"file", ROOT, b"renamed")
            program.begin(Sync, program.node)
            await program.others_are_served()
            waiting_before = program.calls._waiting
        guest.kernel.pending.clear()
        await until(lambda: program.calls._waiting < waiting_before)
        assert program.calls._waiting == 3, "two writes and a change of names"
        program.gate.open()
        await program.all_over()
        assert (guest.root / "renamed").read_bytes() == b"A" * LARGE + b"B" * LARGE
        await until(lambda: not host.in_use)


async def test_what_was_said_just_before_the_end_is_done(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has left the guest, and nobody has waited for more."""
    async with waiting(place) as guest:
        async with guest.session():
            program = await writer(guest, monkeypatch)
            program.gate.open()
            await program.finish(*program.writes)
            for _ in range(20):
                program.write(10)
            link = guest.kernel.link
            assert link is not None
            while link.backlog:
                await trio.lowlevel.checkpoint()
        guest.kernel.pending.clear()
        async with guest.session():
            await program.finish(program.begin(GetAttributes, program.node))
            assert program.written == program.content
            await program.all_over()


async def test_what_is_asked_again_while_it_waits_is_done_once(
    place: Path, monkeypatch: pytest.MonkeyPatch, done: list[FileCall[Any]]
) -> None:
    async with waiting(place) as guest:
        async with guest.session():
            program = await writer(guest, monkeypatch)
            behind = [
                program.write(),
                program.begin(Unlink, ROOT, b"other"),
                program.begin(Lookup, ROOT, b"file"),
            ]
            program.other = program.node  # there is nothing to be read any more
            await guest.kernel.finish(program.begin(GetAttributes, ROOT))
        for _ in range(2):
            async with guest.session():
                await guest.kernel.finish(program.begin(GetAttributes, ROOT))
        async with guest.session():
            program.gate.open()
            assert await program.finish(*program.writes, *behind) == [0] * 5
            assert program.written == program.content
            assert [type(call) for call in done if call.CHANGES] == [Write, Write, Unlink]
            await program.all_over()


async def test_a_write_is_the_same_whoever_has_answered_for_it(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The agent was killed before it had: its successor waits for the host."""
    async with waiting(place) as guest:
        async with guest.session():
            program = await writer(guest, monkeypatch)
        [first] = program.writes
        guest.kernel.pending.clear()
        async with guest.session():
            assert isinstance(first.call, Write)
            again = guest.kernel.begin(replace(first.call, ahead=False), first.payload)
            await program.others_are_served()
            program.gate.open()
            assert await program.finish(again) == [0]
            assert program.written == program.content
            assert len(program.gate.begun) == 1


async def test_how_much_was_free_is_not_remembered(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DataOperations, "_room", lambda *_: 12345)
    async with connected(place) as guest:
        node = (await guest.create(b"file")).node
        write = Write(SHARE, guest.kernel.unique(), node, 0, append=True)
        first, again = [await guest.kernel.ask(write, b"content") for _ in range(2)]
        assert (first.room, again.room) == (12345, 0)
        assert replace(first, room=0) == again
        assert (guest.root / "file").read_bytes() == b"content"


async def test_a_lookup_that_waited_in_vain_gives_back_what_its_first_answer_counted(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with waiting(place) as guest:
        kernel = guest.kernel
        async with guest.session():
            program = await writer(guest, monkeypatch)
            program.gate.open()
            await program.finish(*program.writes)
            question = Lookup(SHARE, kernel.unique(), ROOT, b"other")
            await kernel.ask(question)
            node = guest.scene.server._shares[SHARE].tree._core.reach.peek(program.other)
            assert node is not None
            assert node.lookups == 2
            gate = Gate(monkeypatch, Write)
            program.write()
            await until(lambda: gate.begun)
            kernel.begin(question)  # its answer was lost, for all the host knows
            await kernel.finish(program.begin(GetAttributes, ROOT))
        kernel.pending.clear()
        await until(lambda: node.lookups == 1)
        gate.open()
        await program.all_over()


# --- shares that go ----------------------------------------------------------------------------------


async def test_a_share_that_is_not_served_any_more_is_written_to_the_end(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with writing(place, monkeypatch) as program:
        for _ in range(3):
            program.write()
        renamed = program.begin(Rename, ROOT, b"file", ROOT, b"renamed")
        program.write()
        large = program.begin(List, ROOT, 1, 0)
        await program.others_are_served()
        share = program.guest.scene.server._shares[SHARE]
        await program.guest.scene.agent.serve()
        assert await program.finish(large) == [errno.ENODEV]
        assert not program.gate._open.is_set()
        program.gate.open()
        assert await program.finish(*program.writes, renamed) == [0] * 6
        assert (program.guest.root / "renamed").read_bytes() == program.content
        await program.all_over()
        assert await trio.to_thread.run_sync(share.workers.wait_closed, SOON)


async def test_another_kernel_finds_what_the_one_before_has_written(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with waiting(place) as guest:
        async with guest.session():
            program = await writer(guest, monkeypatch)
            program.write()
            await program.others_are_served()
        guest.kernel = Kernel("boot-2")
        async with guest.session():
            program.gate.open()
            await until(lambda: program.written == program.content)
            await program.all_over()


async def test_the_end_of_the_server_waits_for_what_waits(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with connected(place) as guest:
        program = await writer(guest, monkeypatch)
        program.write()
        await program.others_are_served()
        workers = guest.scene.server._shares[SHARE].workers
        on_close = guest.scene.server._shares[SHARE].on_close

        def opening() -> None:
            on_close()
            program.gate.open()

        monkeypatch.setattr(guest.scene.server._shares[SHARE], "on_close", opening)
    assert await trio.to_thread.run_sync(workers.wait_closed, SOON)
    assert program.written == program.content
