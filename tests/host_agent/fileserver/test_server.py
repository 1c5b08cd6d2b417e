"""The file server between a guest and a host agent, all in this process; the folders are real."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import trio

from fileserver import admission
from fileserver import calls as calls_module
from fileserver import shares as shares_module
from fileserver.control import (
    GuestStage,
    ServeShares,
    SharedFolder,
    ShareStage,
)
from fileserver.journal import Journal
from fileserver.tree import Outcome, Tree
from fileserver.workers import THREADS
from host_agent.fileserver.server import FileServer
from protocol import codec
from protocol.api import Done
from protocol.errors import ErrorCode, RpcError
from protocol.files import (
    MAX_DATA,
    ROOT,
    Entry,
    FileCall,
    Forget,
    GetAttributes,
    List,
    Listing,
    Lookup,
    MakeDirectory,
    MountReport,
    MountReports,
    MountShares,
    MountStage,
    OpenForLocks,
    Read,
    Removed,
    SetLock,
    Unlink,
    Write,
    Written,
)
from protocol.files import Share as MountedShare
from tests.fileserver.peers import (
    SHARE,
    SOON,
    Kernel,
    control_pair,
    host_agent,
    port,
    until,
)
from tests.fileserver.scene import Gate, connected, scene, waiting

# --- the beginning -----------------------------------------------------------------------------------


async def test_the_guest_hears_of_the_shares_first(place: Path) -> None:
    async with scene(place) as made:
        with trio.move_on_after(0.1) as early:
            await made.port._listener.accept()
        assert early.cancelled_caught, "nobody has said yet what to share"
        states = await made.agent.serve(made.folder)
        assert [(state.stage, state.guest) for state in states.shares] == [
            (ShareStage.SERVING, GuestStage.WAITING)
        ]
        assert not states.connected
        kernel = Kernel()
        async with kernel.session(await made.port.accept()):
            assert kernel.mounted == [MountShares([MountedShare(SHARE, "/guest")])]
            await until(lambda: made.agent.told and made.agent.told[-1].connected)
            assert made.agent.told[-1].shares[0].guest is GuestStage.MOUNTED
        await until(lambda: not made.agent.told[-1].connected)


async def test_files_are_made_written_and_read(place: Path) -> None:
    async with connected(place) as guest:
        kernel = guest.kernel
        entry = await guest.create(b"new")
        written = await kernel.ask(Write(SHARE, kernel.unique(), entry.node, 0), b"hello")
        assert isinstance(written, Written)
        assert (guest.root / "new").read_bytes() == b"hello"
        result = await kernel.finish(kernel.begin(Read(SHARE, kernel.unique(), entry.node, 1, 100)))
        assert (result.errno, result.payload) == (0, b"ello")
        listing = await kernel.ask(List(SHARE, kernel.unique(), ROOT, 1, 0))
        assert isinstance(listing, Listing)
        with pytest.raises(FileExistsError):
            await guest.create(b"new")
        assert isinstance(await kernel.ask(Unlink(SHARE, kernel.unique(), ROOT, b"new")), Removed)
        assert list(guest.root.iterdir()) == []
        state = await guest.state()
        assert (state.calls, state.bytes_written) == (6, len(b"hello"))
        assert state.bytes_read >= len(b"ello")  # and what the listing takes


@dataclass(frozen=True, slots=True)
class Strange(FileCall[Done]):
    """Nothing that is known; sent as whatever ``OP`` says."""

    OP: ClassVar[int] = 99
    RESULT: ClassVar[type] = Done

    share: object
    unique: object = 0


async def test_whatever_is_asked_is_answered(place: Path) -> None:
    async with connected(place) as guest:
        kernel = guest.kernel

        async def refusal(call: FileCall[Any], payload: bytes = b"") -> int:
            return (await kernel.finish(kernel.begin(call, payload))).errno

        class AsLookup(Strange):
            OP: ClassVar[int] = 1

        assert await refusal(Strange(SHARE)) == errno.ENOSYS
        assert await refusal(AsLookup(SHARE)) == errno.EINVAL
        assert await refusal(AsLookup("seven")) == errno.EINVAL
        assert await refusal(GetAttributes(SHARE + 1, 2, ROOT)) == errno.ENODEV
        assert await refusal(GetAttributes(SHARE, 2, 12345)) == errno.ESTALE
        assert await refusal(GetAttributes(SHARE, 1 << 63, -1)) == errno.ESTALE
        assert await refusal(OpenForLocks(SHARE, 2, ROOT, 0)) == errno.EOPNOTSUPP
        assert await refusal(GetAttributes(SHARE, 2, ROOT), b"a payload where none belongs") == 0


async def test_a_mebibyte_goes_both_ways(place: Path) -> None:
    async with connected(place) as guest:
        kernel = guest.kernel
        entry = await guest.create(b"large")
        data = os.urandom(MAX_DATA)
        assert (await kernel.ask(Write(SHARE, kernel.unique(), entry.node, 0), data)).size == MAX_DATA
        offsets = [number * MAX_DATA for number in range(16)]
        writes = [kernel.begin(Write(SHARE, kernel.unique(), entry.node, at), data) for at in offsets]
        for pending in writes:
            await kernel.finish(pending)
        reads = [kernel.begin(Read(SHARE, 0, entry.node, at, MAX_DATA)) for at in offsets]
        assert {(await kernel.finish(pending)).payload for pending in reads} == {data}


async def test_a_bug_in_a_call_is_an_io_error_and_the_others_go_on(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(tree: Tree, call: object, payload: bytes = b"") -> Outcome:
        raise ZeroDivisionError

    async with connected(place) as guest:
        with monkeypatch.context() as broken:
            broken.setattr(Tree, "perform", fail)
            with pytest.raises(OSError) as failed:
                await guest.kernel.lookup(b"a")
            assert failed.value.errno == errno.EIO
        with pytest.raises(FileNotFoundError):
            await guest.kernel.lookup(b"a")


async def test_an_answer_that_does_not_fit_is_an_io_error(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with connected(place) as guest:
        monkeypatch.setattr(Tree, "perform", lambda *_: Outcome(Done(), bytes(2 << 20)))
        with pytest.raises(OSError) as failed:
            await guest.kernel.ask(Read(SHARE, 2, ROOT, 0, 1))
        assert failed.value.errno == errno.EIO


# --- once ------------------------------------------------------------------------------------------


async def test_a_changing_call_asked_again_is_done_once(place: Path) -> None:
    async with connected(place) as guest:
        kernel = guest.kernel
        entry = await guest.create(b"log")
        append = Write(SHARE, kernel.unique(), entry.node, 0, append=True)
        answers = [await kernel.ask(append, b"line\n") for _ in range(3)]
        assert (guest.root / "log").read_bytes() == b"line\n"
        assert replace(answers[0], room=0) == answers[1] == answers[2]
        unlink = Unlink(SHARE, kernel.unique(), ROOT, b"nothing")
        for _ in range(2):
            with pytest.raises(FileNotFoundError):
                await kernel.ask(unlink)
            (guest.root / "nothing").touch()
        assert (guest.root / "nothing").exists(), "a failure is as final as a success"


async def test_asked_again_while_it_is_being_done(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guest agent is killed with a write under way, and its successor sends that again."""
    async with waiting(place) as guest:
        kernel = guest.kernel
        async with guest.session():
            entry = await guest.create(b"log")
            gate = Gate(monkeypatch, Write)
            append = kernel.begin(Write(SHARE, kernel.unique(), entry.node, 0, append=True), b"line\n")
            await until(lambda: gate.begun)
        async with guest.session():
            assert append.sent == 2
            with pytest.raises(FileNotFoundError):  # another call overtakes it, so it has come
                await kernel.lookup(b"nothing")
            gate.open()
            assert (await kernel.finish(append)).errno == 0
        assert len(gate.begun) == 1
        assert (guest.root / "log").read_bytes() == b"line\n"


async def test_the_outcome_of_a_dead_session_is_remembered(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with waiting(place) as guest:
        kernel = guest.kernel
        async with guest.session():
            entry = await guest.create(b"log")
            gate = Gate(monkeypatch, Write)
            append = kernel.begin(Write(SHARE, kernel.unique(), entry.node, 0, append=True), b"line\n")
            await until(lambda: gate.begun)
        gate.open()
        await until(lambda: (guest.root / "log").read_bytes())
        async with guest.session():
            assert (await kernel.finish(append)).errno == 0
        assert (guest.root / "log").read_bytes() == b"line\n"


async def test_a_crowd_of_calls_outlives_its_session(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than there are threads: what the new session begins with must not queue behind them."""
    async with waiting(place) as guest:
        kernel = guest.kernel
        async with guest.session():
            entry = await guest.create(b"log")
            gate = Gate(monkeypatch, Write)
            crowd = [
                kernel.begin(Write(SHARE, kernel.unique(), entry.node, 0, append=True), b"line\n")
                for _ in range(5 * THREADS)
            ]
            await until(lambda: len(gate.begun) == THREADS)
        async with guest.session():
            gate.open()
            assert [(await kernel.finish(pending)).errno for pending in crowd] == [0] * len(crowd)
        assert (guest.root / "log").read_bytes() == b"line\n" * len(crowd)


async def test_what_waits_is_bounded_over_all_sessions(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest that begins session after session while the disk hangs, and each time says something new."""
    monkeypatch.setattr(calls_module, "MAX_WAITING", 3)
    monkeypatch.setattr(calls_module, "MAX_WAITING_BYTES", 10)
    async with waiting(place) as guest:
        kernel = guest.kernel
        async with guest.session():
            entry = await guest.create(b"log")
            gate = Gate(monkeypatch, Write)
            first = kernel.begin(Write(SHARE, kernel.unique(), entry.node, 0), b"12345678")
            await until(lambda: gate.begun)
        async with guest.session():
            with pytest.raises(OSError) as large:
                await kernel.ask(Write(SHARE, kernel.unique(), entry.node, 0), b"123")
            others = [kernel.begin(Write(SHARE, kernel.unique(), entry.node, 8), b"9") for _ in "ab"]
            with pytest.raises(OSError) as many:
                await kernel.ask(Write(SHARE, kernel.unique(), entry.node, 0), b"")
            assert (large.value.errno, many.value.errno) == (errno.ENOMEM, errno.ENOMEM)
            gate.open()
            assert [(await kernel.finish(each)).errno for each in (first, *others)] == [0, 0, 0]
            for _ in range(5):
                await kernel.ask(Write(SHARE, kernel.unique(), entry.node, 0), b"12345678")
        assert (guest.root / "log").read_bytes() == b"123456789"


async def test_large_answers_wait_for_room_and_other_calls_do_not(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "MAX_OF_A_SHARE", 2 * MAX_DATA)
    async with connected(place) as guest:
        kernel = guest.kernel
        entry = await guest.create(b"large")
        data = os.urandom(MAX_DATA)
        await kernel.ask(Write(SHARE, kernel.unique(), entry.node, 0), data)
        gate = Gate(monkeypatch, Read)
        reads = [kernel.begin(Read(SHARE, 0, entry.node, 0, MAX_DATA)) for _ in range(20)]
        for _ in range(THREADS):
            await kernel.ask(GetAttributes(SHARE, kernel.unique(), ROOT))
            assert len(gate.begun) <= 2
        gate.open()
        assert {(await kernel.finish(read)).payload for read in reads} == {data}
        assert len(gate.begun) == 20


async def test_what_waits_for_room_is_dropped_with_its_session(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else what is asked again would be counted twice, and refused."""
    monkeypatch.setattr(admission, "MAX_OF_A_SHARE", 2 * MAX_DATA)
    monkeypatch.setattr(calls_module, "MAX_WAITING", 23)
    async with waiting(place) as guest:
        kernel = guest.kernel
        async with guest.session():
            entry = await guest.create(b"empty")
            gate = Gate(monkeypatch, Read)
            reads = [kernel.begin(Read(SHARE, 0, entry.node, 0, MAX_DATA)) for _ in range(20)]
            await until(lambda: len(gate.begun) == 2)
        async with guest.session():
            await kernel.ask(MakeDirectory(SHARE, kernel.unique(), ROOT, b"later", 0o755))
            gate.open()
            assert [(await kernel.finish(read)).errno for read in reads] == [0] * 20
            assert {read.sent for read in reads} == {2}


async def test_what_waits_for_room_in_a_share_that_goes(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "MAX_OF_A_SHARE", 2 * MAX_DATA)
    async with connected(place) as guest:
        kernel = guest.kernel
        entry = await guest.create(b"empty")
        gate = Gate(monkeypatch, Read)
        reads = [kernel.begin(Read(SHARE, 0, entry.node, 0, MAX_DATA)) for _ in range(5)]
        await until(lambda: len(gate.begun) == 2)
        await guest.scene.agent.serve(replace(guest.scene.folder, read_only=True))
        gate.open()
        assert [(await kernel.finish(read)).errno for read in reads] == [0, 0] + 3 * [errno.ENODEV]


@pytest.mark.parametrize("late", [False, True])
async def test_a_lookup_whose_answer_was_lost_is_counted_once(
    place: Path, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    """``late``: it is still being done when it is asked again."""
    async with waiting(place) as guest:
        kernel = guest.kernel
        (guest.root / "file").touch()
        async with guest.session():
            await kernel.ask(GetAttributes(SHARE, 0, ROOT))  # the folder is open
            nodes = (await guest.state()).nodes
            gate = Gate(monkeypatch, Lookup)
            asked = kernel.begin(Lookup(SHARE, kernel.unique(), ROOT, b"file"))
            await until(lambda: gate.begun)
        if not late:
            gate.open()
            await until(lambda: guest.scene.server._calls._glimpses._seen)
        async with guest.session():
            if late:
                await until(lambda: len(gate.begun) == 2)
            gate.open()
            result = await kernel.finish(asked)
            assert asked.sent == 2
            node = codec.decode(Entry, result.value).node
            assert (await guest.state()).nodes == nodes + 1
            await kernel.ask(Forget(SHARE, kernel.unique(), 0, [node], [1]))
            with trio.fail_after(SOON):
                while (await guest.state()).nodes != nodes:
                    await trio.sleep(0.005)


async def test_lookups_are_given_back_once(place: Path) -> None:
    async with connected(place) as guest:
        kernel = guest.kernel
        (guest.root / "file").touch()
        node = 0
        for _ in range(3):
            node = (await kernel.lookup(b"file")).node
        forget = Forget(SHARE, kernel.unique(), 0, [node], [1])
        for _ in range(5):
            await kernel.ask(forget)
        await kernel.ask(GetAttributes(SHARE, 0, node))
        await kernel.ask(Forget(SHARE, kernel.unique(), 0, [node], [2]))
        with pytest.raises(OSError) as gone:
            await kernel.ask(GetAttributes(SHARE, 0, node))
        assert gone.value.errno == errno.ESTALE


async def test_a_new_session_hears_again_that_data_is_stale(place: Path) -> None:
    async with waiting(place) as guest:
        kernel = guest.kernel
        path = guest.root / "file"
        path.write_bytes(b"old")
        os.utime(path, (1, 1))
        async with guest.session():
            entry = await kernel.lookup(b"file")
            await kernel.finish(kernel.begin(Read(SHARE, 0, entry.node, 0, 10)))
            await trio.sleep(0.05)  # until the times of the file have settled
            await kernel.ask(GetAttributes(SHARE, 0, entry.node))
            assert not (await kernel.ask(GetAttributes(SHARE, 0, entry.node))).stale
        kernel.changes()
        async with guest.session():
            answer = await kernel.ask(GetAttributes(SHARE, 0, entry.node))
            assert answer.stale or any(entry.node in told.nodes for told in kernel.changes())
            assert not (await kernel.ask(GetAttributes(SHARE, 0, entry.node))).stale


# --- another guest ---------------------------------------------------------------------------------


async def test_another_boot_begins_with_nothing(place: Path) -> None:
    async with waiting(place, host_locks=True) as guest:
        kernel = guest.kernel
        async with guest.session():
            entry = await guest.create(b"file")
            make = MakeDirectory(SHARE, kernel.unique(), ROOT, b"made", 0o755)
            await kernel.ask(make)
            (guest.root / "made").rmdir()
            opened = await kernel.ask(OpenForLocks(SHARE, kernel.unique(), entry.node, os.O_RDWR))
            await kernel.ask(
                SetLock(SHARE, kernel.unique(), entry.node, opened.handle, 0, 0, 0, 1, whole=True)
            )
            assert not is_free(guest.root / "file")
        guest.kernel = kernel = Kernel("boot-2")
        async with guest.session():
            with pytest.raises(OSError) as gone:
                await kernel.ask(GetAttributes(SHARE, 0, entry.node))
            assert gone.value.errno == errno.ESTALE
            await until(lambda: is_free(guest.root / "file"))
            assert await kernel.lookup(b"file") != entry, "another guest, other numbers"
            await kernel.ask(make)  # by its name and content the same as that of the guest before
            assert (guest.root / "made").is_dir()


async def test_a_share_that_no_mount_is_left_of_begins_with_nothing(place: Path) -> None:
    async with waiting(place, host_locks=True) as guest:
        kernel, store = guest.kernel, guest.scene.store
        kernel.in_use = set()  # the first session of a boot
        async with guest.session():
            entry, gone = await guest.create(b"file"), await guest.create(b"gone")
            await kernel.ask(Unlink(SHARE, kernel.unique(), ROOT, b"gone"))
            opened = await kernel.ask(OpenForLocks(SHARE, kernel.unique(), entry.node, os.O_RDWR))
            await kernel.ask(
                SetLock(SHARE, kernel.unique(), entry.node, opened.handle, 0, 0, 0, 1, whole=True)
            )
            await until(lambda: len(store) == 2)
        kernel.in_use = {SHARE}
        async with guest.session():
            for known in (entry, gone):
                await kernel.ask(GetAttributes(SHARE, 0, known.node))
        kernel.in_use = {SHARE + 1}
        async with guest.session():
            for known in (entry, gone):
                with pytest.raises(OSError) as forgotten:
                    await kernel.ask(GetAttributes(SHARE, 0, known.node))
                assert forgotten.value.errno == errno.ESTALE
            await until(lambda: is_free(guest.root / "file"))
            await until(lambda: len(store) == 0)
            await until(lambda: guest.scene.agent.told[-1].shares[0].nodes == 1)
            assert (await kernel.lookup(b"file")).node != entry.node, "numbers are not used twice"


async def test_of_what_a_killed_server_knew_only_what_is_in_use_is_taken_over(place: Path) -> None:
    nodes = {}
    for in_use in ({SHARE}, {SHARE}, set()):
        async with waiting(place) as guest:
            guest.kernel.in_use = in_use
            (guest.root / "file").touch()
            async with guest.session():
                await guest.kernel.ask(GetAttributes(SHARE, 0, ROOT))  # answered once the session has begun
                assert (await guest.state()).nodes == (1 + len(nodes) if in_use else 1)
                nodes[(await guest.kernel.lookup(b"file")).node] = in_use
            guest.scene.port.path.unlink()
    assert len(nodes) == 2, "the first two are the same"


async def test_descriptors_are_kept_for_a_guest_and_a_share(place: Path) -> None:
    async with waiting(place, host_locks=True) as guest:
        kernel, store = guest.kernel, guest.scene.store
        async with guest.session():
            entry = await guest.create(b"file")
            await kernel.ask(Unlink(SHARE, kernel.unique(), ROOT, b"file"))
            opened = await kernel.ask(OpenForLocks(SHARE, kernel.unique(), entry.node, os.O_RDWR))
            await kernel.ask(
                SetLock(SHARE, kernel.unique(), entry.node, opened.handle, 0, 0, 0, 1, whole=True)
            )
            await until(lambda: len(store) == 2)
        async with guest.session():
            await kernel.ask(GetAttributes(SHARE, 0, entry.node))
            assert len(store) == 2
        guest.kernel = kernel = Kernel("boot-2")
        async with guest.session():
            await until(lambda: len(store) == 0)
            await guest.create(b"file")
            await kernel.ask(Unlink(SHARE, kernel.unique(), ROOT, b"file"))
            await until(lambda: len(store) == 1)
            await guest.scene.agent.serve()
            await until(lambda: len(store) == 0)


def is_free(path: Path) -> bool:
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


async def test_locks_outlive_the_guest_agent(place: Path) -> None:
    async with waiting(place, host_locks=True) as guest:
        kernel = guest.kernel
        async with guest.session():
            entry = await guest.create(b"file")
            opened = await kernel.ask(OpenForLocks(SHARE, kernel.unique(), entry.node, os.O_RDWR))
            lock = SetLock(SHARE, kernel.unique(), entry.node, opened.handle, 0, 0, 0, 1, whole=True)
            await kernel.ask(lock)
        assert not is_free(guest.root / "file")
        async with guest.session():
            unlock = SetLock(SHARE, kernel.unique(), entry.node, opened.handle, 0, 0, 0, 2, whole=True)
            await kernel.ask(unlock)
            assert is_free(guest.root / "file")


# --- shares ----------------------------------------------------------------------------------------


async def test_shares_come_and_go(place: Path) -> None:
    async with connected(place) as guest:
        kernel, agent = guest.kernel, guest.scene.agent
        other = place / "other"
        other.mkdir()
        (other / "there").touch()
        second = SharedFolder(8, str(other), "/other", read_only=True)
        await agent.serve(guest.scene.folder, second)
        await until(lambda: len(kernel.mounted) == 2)
        assert kernel.mounted[1].shares == [
            MountedShare(SHARE, "/guest"),
            MountedShare(8, "/other", read_only=True),
        ]
        entry = await kernel.lookup(b"there", share=8)
        with pytest.raises(OSError) as refused:
            await kernel.ask(Write(8, kernel.unique(), entry.node, 0), b"x")
        assert refused.value.errno == errno.EROFS
        await agent.serve(guest.scene.folder, second)
        await agent.serve(second)
        await until(lambda: len(kernel.mounted) == 3)
        assert [share.id for share in kernel.mounted[2].shares] == [8]
        with pytest.raises(OSError) as gone:
            await kernel.lookup(b"there")
        assert gone.value.errno == errno.ENODEV
        assert (await kernel.lookup(b"there", share=8)).node == entry.node, "the other goes on as it was"


async def test_a_folder_that_is_another_one_now_has_other_nodes(place: Path) -> None:
    async with connected(place) as guest:
        kernel = guest.kernel
        (place / "elsewhere").mkdir()
        entry = await guest.create(b"file")
        folder = SharedFolder(SHARE, str(place / "elsewhere"), "/guest")
        await guest.scene.agent.serve(folder)
        with pytest.raises(OSError) as gone:
            await kernel.ask(GetAttributes(SHARE, 0, entry.node))
        assert gone.value.errno == errno.ESTALE
        fresh = await guest.create(b"file")
        assert fresh.node > entry.node, "a number is never given out again while the guest runs"
        assert (place / "elsewhere" / "file").exists()


async def test_two_shares_with_one_id_are_refused(place: Path) -> None:
    async with scene(place) as made:
        with pytest.raises(RpcError) as refused:
            await made.agent.link.request(ServeShares([made.folder, made.folder]))
        assert refused.value.code is ErrorCode.INVALID


async def test_a_share_that_hangs_does_not_stop_another(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with connected(place) as guest:
        kernel = guest.kernel
        (place / "nfs").mkdir()
        await guest.scene.agent.serve(guest.scene.folder, SharedFolder(8, str(place / "nfs"), "/nfs"))
        gate = Gate(monkeypatch, GetAttributes, share=8)
        stuck = [kernel.begin(GetAttributes(8, kernel.unique(), ROOT)) for _ in range(20)]
        await until(lambda: len(gate.begun) == THREADS)
        await guest.create(b"file")
        assert [pending.result for pending in stuck] == [None] * 20
        gate.open()
        assert [(await kernel.finish(pending)).errno for pending in stuck] == [0] * 20


async def test_a_call_behind_calls_that_hang_is_answered(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one share: what hangs is somewhere below it. The guest asks nothing else, since it waits."""
    monkeypatch.setattr("host_agent.fileserver.server.LOOK_INTERVAL", 0.05)
    async with connected(place) as guest:
        kernel = guest.kernel
        entry = await guest.create(b"file")
        gate = Gate(monkeypatch, GetAttributes)
        stuck = [kernel.begin(GetAttributes(SHARE, kernel.unique(), entry.node)) for _ in range(THREADS)]
        assert (await kernel.lookup(b"file")).node == entry.node
        assert [pending.result for pending in stuck] == [None] * THREADS
        gate.open()
        assert [(await kernel.finish(pending)).errno for pending in stuck] == [0] * THREADS


async def test_the_shares_have_one_budget(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    budgets: list[object] = []

    class Watched(Tree):
        def __init__(self, path: str, **options: Any) -> None:
            budgets.append(options["budget"])
            super().__init__(path, **options)

    monkeypatch.setattr(shares_module, "Tree", Watched)
    async with scene(place) as made:
        (place / "other").mkdir()
        await made.agent.serve(made.folder, SharedFolder(8, str(place / "other"), "/other"))
        assert len(budgets) == 2
        assert budgets[0] is budgets[1]


async def test_a_folder_that_hangs_from_the_start_does_not_stop_another(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("host_agent.fileserver.server.FIRST_LOOK", 0.05)
    monkeypatch.setattr(shares_module, "SILENCE", 0.05)
    release = threading.Event()

    class SlowTree(Tree):
        def __init__(self, path: str, **options: Any) -> None:
            if path.endswith("nfs"):
                release.wait(SOON)
            super().__init__(path, **options)

    monkeypatch.setattr(shares_module, "Tree", SlowTree)
    async with scene(place) as made:
        (place / "nfs").mkdir()
        states = await made.agent.serve(SharedFolder(8, str(place / "nfs"), "/nfs"), made.folder)
        assert len(states.shares) == 2
        kernel = Kernel()
        async with kernel.session(await made.port.accept()):
            waits = kernel.begin(GetAttributes(8, kernel.unique(), ROOT))
            with pytest.raises(FileNotFoundError):
                await kernel.lookup(b"nothing")
            await until(lambda: made.agent.told[-1].shares[0].reason == "The host's disk does not answer.")
            release.set()
            assert (await kernel.finish(waits)).errno == 0


async def test_a_folder_that_goes_is_told_and_one_that_comes_back(place: Path) -> None:
    async with connected(place) as guest:
        agent = guest.scene.agent
        shutil.rmtree(guest.root)
        await until(lambda: agent.told[-1].shares[0].stage is ShareStage.MISSING)
        assert agent.told[-1].shares[0].reason
        assert agent.told[-1].shares[0].hint
        guest.root.mkdir()
        (guest.root / "new").touch()
        await until(lambda: agent.told[-1].shares[0].stage is ShareStage.SERVING)
        await guest.kernel.lookup(b"new")


async def test_a_full_disk_is_told(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with connected(place) as guest:
        described = Tree.describe
        monkeypatch.setattr(Tree, "describe", lambda tree: replace(described(tree), full=True))
        await until(lambda: guest.scene.agent.told[-1].shares[0].stage is ShareStage.FULL)


async def test_what_the_guest_could_not_mount_is_told(place: Path) -> None:
    async with scene(place) as made:
        kernel = Kernel()
        kernel.report = lambda _: MountReports(
            [MountReport(SHARE, MountStage.FAILED, "There is a file in its place.")]
        )
        await made.agent.serve(made.folder)
        async with kernel.session(await made.port.accept()):
            await until(lambda: made.agent.told and made.agent.told[-1].shares[0].guest is GuestStage.FAILED)
            assert made.agent.told[-1].shares[0].reason == "There is a file in its place."


@pytest.mark.parametrize(("skew", "words"), [(-90, "90.0 s behind"), (90, "90.0 s ahead of"), (0, "")])
async def test_a_clock_that_is_off_is_told(place: Path, skew: int, words: str) -> None:
    async with scene(place) as made:
        kernel = Kernel()
        kernel.report = lambda _: MountReports(
            [MountReport(SHARE, MountStage.MOUNTED)], time.time_ns() + skew * 10**9
        )
        await made.agent.serve(made.folder)
        async with kernel.session(await made.port.accept()):
            await until(lambda: made.agent.told and made.agent.told[-1].shares[0].guest is GuestStage.MOUNTED)
            state = made.agent.told[-1].shares[0]
            assert state.clock_skew_ms == pytest.approx(skew * 1000, abs=500)
            assert words in state.reason
            assert bool(state.hint) == bool(words)


async def test_a_file_that_was_written_is_closed_soon(place: Path) -> None:
    """Who watches the file on the host waits for that."""
    async with connected(place) as guest:
        kernel = guest.kernel
        entry = await guest.create(b"file")
        await kernel.ask(Write(SHARE, kernel.unique(), entry.node, 0), b"data")

        def writers() -> list[str]:
            links = [Path(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
            infos = [Path(f"/proc/self/fdinfo/{link.name}") for link in links if points_to(link, "root/file")]
            return [info.name for info in infos if int(info.read_text().split()[3], 8) & os.O_ACCMODE]

        assert len(writers()) == 1
        await until(lambda: not writers())


def points_to(link: Path, end: str) -> bool:
    try:
        return os.readlink(link).endswith(end)
    except FileNotFoundError:
        return False


# --- the end ---------------------------------------------------------------------------------------


async def test_the_host_agents_end_is_the_servers(place: Path) -> None:
    root = place / "root"
    root.mkdir()
    journal = Journal(place / "journal")
    ours, theirs = control_pair()
    async with port(place) as opened:
        server = FileServer(
            opened.path, trio.SocketStream(trio.socket.from_stdlib_socket(theirs)), journal, [str(place)]
        )
        with trio.fail_after(SOON):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(server.run)
                async with host_agent(ours) as agent:
                    await agent.serve(SharedFolder(SHARE, str(root), "/guest"))
                    await opened.accept()
    journal.close()
