"""Files that programs of the host have open for writing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from fileserver.nodes import Shared
from fileserver.retractions import Retraction
from protocol.files import (
    ATTRIBUTES,
    ROOT,
    Attributes,
    Create,
    Entry,
    GetAttributes,
    Lookup,
    Read,
    ReadMany,
    Write,
)
from tests.fileserver.peers import SHARE, until
from tests.fileserver.scene import Connected, connected
from tests.fileserver.served import Served, serving
from tests.fileserver.test_promises import node
from tests.fileserver.watched import Watched, answer, promised


@contextmanager
def open_elsewhere(path: Path, mode: str) -> Iterator[subprocess.Popen[bytes]]:
    """Another program has the file open."""
    program = "import sys; file = open(sys.argv[1], sys.argv[2]); print(flush=True); sys.stdin.read()"
    argv = [sys.executable, "-Sc", program, str(path), mode]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield process
        finally:
            process.stdin.close()


@pytest.fixture
def share(tmp_path: Path) -> Iterator[Served]:
    (tmp_path / "f").write_text("content")
    with serving(tmp_path, watches=Watched()) as served:
        yield served


def read(share: Served, number: int) -> bytes:
    return share.bytes(Read, number, 0, 100)


def test_who_has_it_open_for_reading_does_no_harm(share: Served) -> None:
    file = share.node("f")
    with open_elsewhere(share.path / "f", "r"):
        read(share, file)
    assert promised(share, answer(share, GetAttributes, file)) == ATTRIBUTES


@pytest.mark.parametrize("kind", [GetAttributes, Lookup])
def test_while_somebody_writes_nothing_is_promised_and_all_is_stale(
    share: Served, kind: type[GetAttributes | Lookup]
) -> None:
    file = share.node("f")
    fields = (file,) if kind is GetAttributes else (ROOT, b"f")
    with open_elsewhere(share.path / "f", "r+"):
        read(share, file)
        for _ in range(2):
            outcome = answer(share, kind, *fields)
            assert isinstance(outcome.value, Attributes | Entry)
            assert outcome.value.stale
            assert promised(share, outcome) & ATTRIBUTES == 0
            share.tree.alarm_told(file)
            read(share, file)
    outcome = answer(share, kind, *fields)
    assert isinstance(outcome.value, Attributes | Entry)
    assert outcome.value.stale, "it may have been written since the guest was told last"
    assert promised(share, outcome) & ATTRIBUTES
    share.tree.alarm_told(file)
    outcome = answer(share, kind, *fields)
    assert isinstance(outcome.value, Attributes | Entry)
    assert not outcome.value.stale


def test_what_was_promised_before_is_taken_back(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("content")
    told: list[Retraction] = []
    with serving(tmp_path, watches=Watched(), retract=told.append) as share:
        file = share.node("f")
        with open_elsewhere(tmp_path / "f", "r+"):
            for _ in range(3):
                read(share, file)
        assert [node.number for retraction in told for node, _ in retraction.nodes] == [file], "and once"


@pytest.mark.parametrize("look", [GetAttributes, Read, ReadMany, Lookup])
def test_that_the_guest_writes_it_itself_is_no_change(
    share: Served, look: type[GetAttributes | Read | ReadMany | Lookup]
) -> None:
    """This process cannot tell its own descriptor from others': so that is closed."""
    entry = share.ask(Create, ROOT, b"new", 0o644, os.O_EXCL)
    share.ask(Write, entry.node, 0, payload=b"content")
    fields = {Read: (entry.node, 0, 7), ReadMany: (0, [entry.node], 100), Lookup: (ROOT, b"new")}
    outcome = answer(share, look, *fields.get(look, (entry.node,)))
    assert node(share, entry.node).shared == Shared.WITH_NOBODY
    if look in (GetAttributes, Lookup):
        assert promised(share, outcome) & ATTRIBUTES
    share.ask(Write, entry.node, 0, payload=b"another")
    assert promised(share, answer(share, GetAttributes, entry.node)) == ATTRIBUTES, (
        "it is heard who comes now"
    )


def test_while_it_writes_it_itself_nobody_knows_who_else_does(share: Served) -> None:
    entry = share.ask(Create, ROOT, b"new", 0o644, os.O_EXCL)
    share.ask(Write, entry.node, 0, payload=b"content")
    files = share.tree._core.files
    with share.tree._core.reach.use(entry.node) as used:
        writer = files.writer(used)
        read(share, entry.node)
        assert used.shared == Shared.PERHAPS
        assert promised(share, answer(share, GetAttributes, entry.node)) == 0
        files.release(writer)
    assert promised(share, answer(share, GetAttributes, entry.node)) == ATTRIBUTES


def test_a_file_that_the_guest_has_open_for_locks(share: Served) -> None:
    """The same, and nobody says when that is over."""
    file = share.node("f")
    descriptor = share.tree.data_fd_for_locks(file, os.O_RDWR)
    read(share, file)
    assert node(share, file).shared == Shared.PERHAPS
    node(share, file).doubt = False  # as if it had not changed lately
    assert not share.ask(GetAttributes, file).stale
    os.close(descriptor)
    assert promised(share, answer(share, GetAttributes, file)) == ATTRIBUTES


def test_a_mark_that_does_not_hear_of_opens_is_renewed(share: Served) -> None:
    """As after the loss of all marks: the guest has data, and nobody would say that it is written."""
    file = share.node("f")
    read(share, file)
    watched = share.options["watches"]
    assert file in watched.heard
    watched.heard.clear()
    found = answer(share, GetAttributes, file)
    assert file in watched.heard
    assert promised(share, found) == ATTRIBUTES
    before = answer(share, GetAttributes, file)
    watched.heard.clear()
    assert promised(share, before) == 0


# --- to a guest --------------------------------------------------------------------------------------


async def attributes(guest: Connected, number: int) -> Attributes:
    return await guest.kernel.ask(GetAttributes(SHARE, guest.kernel.unique(), number))


async def test_who_opens_it_for_writing_is_heard(place: Path) -> None:
    """The guest has read the file; then a program maps it, and stores. It is told when that is opened, and asks."""
    async with connected(place) as guest:
        path = guest.root / "f"
        path.write_bytes(b"0" * 4096)
        file = (await guest.kernel.lookup(b"f")).node
        await guest.kernel.ask(Read(SHARE, guest.kernel.unique(), file, 0, 100))
        assert (await attributes(guest, file)).promise == ATTRIBUTES
        guest.kernel.changes()
        with open_elsewhere(path, "r"):
            assert (await attributes(guest, file)).promise == ATTRIBUTES
        assert not guest.kernel.changes()

        with open_elsewhere(path, "r+"):
            await until(lambda: any(file in told.nodes for told in guest.kernel.changes()))
            assert (await attributes(guest, file)).promise == 0
            await guest.kernel.ask(Read(SHARE, guest.kernel.unique(), file, 0, 100))
            assert (await attributes(guest, file)).stale
        await until(lambda: any(file in told.nodes for told in guest.kernel.changes()))
        with trio.fail_after(20):
            while not (await attributes(guest, file)).promise:
                await trio.sleep(0.001)
