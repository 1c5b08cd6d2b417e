"""Calls that are done in trio's thread: which ones, of which shares, and that nobody else waits for them."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from fileserver import linux, prompt
from fileserver.core import Core
from fileserver.mountwatch import MountWatch
from fileserver.nodes import Node, Shared
from fileserver.prompt import MAX_PAYLOAD, Disk, harmless, is_small
from fileserver.tree import Outcome, Tree
from fileserver.workers import waiting
from protocol.files import (
    ROOT,
    SET_MODE,
    SET_MTIME,
    SET_SIZE,
    FileCall,
    Forget,
    GetAttributes,
    ListEntries,
    Lookup,
    Read,
    SetAttributes,
    Sync,
    Unlink,
    Write,
)
from tests.fileserver.peers import SHARE, Kernel, until
from tests.fileserver.scene import Connected, Gate, connected

EXT4, BTRFS, TMPFS, NFS = 0xEF53, 0x9123683E, 0x01021994, 0x6969


@pytest.mark.parametrize(
    ("call", "payload", "expected"),
    [
        (Write(1, 2, 3, 0), b"x" * MAX_PAYLOAD, True),
        (Write(1, 2, 3, 0), b"x" * (MAX_PAYLOAD + 1), False),
        (Lookup(1, 2, ROOT, b"name"), b"", True),
        (Unlink(1, 2, ROOT, b"name"), b"", True),
        (SetAttributes(1, 2, 3, SET_MODE | SET_MTIME), b"", True),
        (SetAttributes(1, 2, 3, SET_MODE | SET_SIZE), b"", False),
        (Forget(1, 2, 0, [3], [1]), b"", False),
        (Sync(1, 2, 3, False), b"", False),
        (Read(1, 2, 3, 0, 1), b"", False),
        (ListEntries(1, 2, 3, 0), b"", False),
    ],
)
def test_what_is_small(call: FileCall[Any], payload: bytes, expected: bool) -> None:
    assert is_small(call, payload) is expected


@pytest.mark.parametrize(
    ("disks", "expected"),
    [
        ({"a": Disk(1, EXT4)}, "a"),
        ({"a": Disk(1, EXT4), "b": Disk(1, EXT4)}, "ab"),
        ({"a": Disk(1, EXT4), "b": Disk(2, EXT4)}, ""),
        ({"a": Disk(1, EXT4), "b": Disk(2, NFS)}, ""),
        ({"a": Disk(1, NFS)}, ""),
        ({"a": Disk(1, EXT4), "b": None}, ""),
        ({"a": Disk(1, BTRFS), "b": Disk(2, TMPFS)}, "ab"),
        ({"a": Disk(1, NFS), "b": Disk(2, TMPFS), "c": Disk(3, TMPFS)}, "bc"),
        ({}, ""),
    ],
)
def test_a_share_that_may_hold_up_another_is_not_harmless(
    disks: dict[str, Disk | None], expected: str
) -> None:
    assert harmless(disks) == set(expected)


def test_who_works_does_not_wait() -> None:
    """A thread that has no processor for a while is not waiting."""

    def worked() -> int:
        before = prompt.waits()
        sum(range(10_000))
        return prompt.waits() - before

    assert min(worked() for _ in range(20)) == 0
    before = prompt.waits()
    time.sleep(0.001)
    assert prompt.waits() > before


# --- served ----------------------------------------------------------------------------------------


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the threads in which calls were done; the test's own is trio's."""
    names: list[str] = []
    perform = Tree.perform

    def note(tree: Tree, call: Any, payload: bytes = b"") -> Outcome:
        names.append("trio" if threading.current_thread() is threading.main_thread() else "another")
        return perform(tree, call, payload)

    monkeypatch.setattr(Tree, "perform", note)
    return names


async def prompt_share(guest: Connected) -> None:
    """It is, as soon as it was looked at."""
    shares = guest.scene.server._shares

    async def asked() -> bool:
        await look(guest.kernel)
        return shares[SHARE].is_prompt

    while not await asked():
        guest.scene.server._judge()
    await until(lambda: shares[SHARE].is_prompt)


async def look(kernel: Kernel) -> None:
    await kernel.ask(GetAttributes(SHARE, 0, ROOT))


async def test_a_small_call_is_done_at_once(place: Path, threads: list[str]) -> None:
    async with connected(place) as guest:
        await prompt_share(guest)
        threads.clear()
        await look(guest.kernel)
        with pytest.raises(FileNotFoundError):
            await guest.kernel.lookup(b"missing")
        assert threads == ["trio", "trio"]


async def test_what_fails_at_once_is_answered(place: Path) -> None:
    async with connected(place) as guest:
        await prompt_share(guest)
        with pytest.raises(FileNotFoundError):
            await guest.kernel.ask(Unlink(SHARE, guest.kernel.unique(), ROOT, b"missing"))


async def test_nothing_is_done_at_once_beside_a_thread(
    place: Path, threads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which may hold a lock while it waits for the disk."""
    async with connected(place) as guest:
        await prompt_share(guest)
        (guest.root / "file").write_bytes(b"content")
        node = (await guest.kernel.lookup(b"file")).node
        gate = Gate(monkeypatch, Read)
        reading = guest.kernel.begin(Read(SHARE, guest.kernel.unique(), node, 0, 7))
        await until(lambda: gate.begun)
        threads.clear()
        await look(guest.kernel)
        assert threads == ["another"]
        gate.open()
        await guest.kernel.finish(reading)
        await prompt_share(guest)


async def test_a_slow_disk_is_left_to_the_threads_for_a_while(
    place: Path, threads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stat(descriptor: int) -> linux.Status:
        time.sleep(1.1 * prompt.SLOW)
        return fstatx(descriptor)

    async with connected(place) as guest:
        await prompt_share(guest)
        fstatx = linux.fstatx
        with monkeypatch.context() as patch:
            patch.setattr(linux, "fstatx", stat)
            patch.setattr(prompt, "PAUSE", 1e6)
            threads.clear()
            await look(guest.kernel)
        assert threads == ["trio"]
        share = guest.scene.server._shares[SHARE]
        assert not share.is_prompt
        threads.clear()
        await look(guest.kernel)
        assert threads == ["another"]
        share._slow_until = 0.0
        await prompt_share(guest)


async def test_what_waits_for_a_program_of_the_host_is_done_by_a_thread_after_all(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with connected(place) as guest:
        await prompt_share(guest)
        perform = Tree.perform
        attempts: list[bool] = []

        def wait(tree: Tree, call: Any, payload: bytes = b"") -> Outcome:
            attempts.append(threading.current_thread() is threading.main_thread())
            with waiting():
                return perform(tree, call, payload)

        monkeypatch.setattr(Tree, "perform", wait)
        await look(guest.kernel)
        assert attempts == [True, False]


async def test_a_lookup_that_has_to_wait_counts_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who writes the file can only be seen once somebody has given up a lease."""
    async with connected(place) as guest:
        await prompt_share(guest)
        (guest.root / "file").write_bytes(b"content")
        number = (await guest.kernel.lookup(b"file")).node
        core = guest.scene.server._shares[SHARE].tree._core
        node = core.reach.peek(number)
        assert node is not None
        node.shared = Shared.PERHAPS
        attempts: list[bool] = []

        def see_writers(core: Core, node: Node) -> None:
            attempts.append(threading.current_thread() is threading.main_thread())
            with waiting():
                pass

        monkeypatch.setattr(Core, "see_writers", see_writers)
        await until(lambda: guest.scene.server._shares[SHARE].is_prompt)
        assert (await guest.kernel.lookup(b"file")).node == number
        assert attempts == [True, False]
        assert node.lookups == 2


async def test_what_is_mounted_below_may_hang_by_itself(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with connected(place) as guest:
        await prompt_share(guest)
        server, share = guest.scene.server, guest.scene.server._shares[SHARE]
        with monkeypatch.context() as patch:
            patch.setattr(MountWatch, "is_below", lambda watch, folder: folder == bytes(guest.root))
            server._on_mounts(frozenset({bytes(guest.root / "point")}))
            assert not share.is_prompt
            server._judge()
            assert not share.is_prompt
        await prompt_share(guest)


async def test_a_folder_that_is_another_one_is_judged_anew(place: Path) -> None:
    """It may be on another disk; the shares are judged once a second, the folder is looked at beside that."""
    async with connected(place) as guest:
        await prompt_share(guest)
        guest.scene.server._judge = lambda: None  # type: ignore[method-assign]
        share = guest.scene.server._shares[SHARE]
        guest.root.rename(place / "aside")
        guest.root.mkdir()
        await until(lambda: not share.is_prompt and share.disk is not None and share.workers.is_idle)
        assert share.disk is not share._prompt_on
