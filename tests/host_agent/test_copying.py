"""Files across a link to a real guest's end: a process of this machine, in a home of its own."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import trio
import trio.testing

from guest_agent import execute
from host_agent.copying import Copy, CutOff, FarEnd, into_guest, out_of_guest
from host_agent.errors import ExitCode, UserError
from protocol import packedfile
from protocol.errors import LinkClosed
from protocol.link import Hello, Link, Role, Service

REPOSITORY = Path(__file__).parents[2]

LARGE = 24 << 20

Move = Callable[[Link, list[str], str, str, Copy, FarEnd], Awaitable[None]]
PROGRAM = (sys.executable, "-S", "-P", "-m", "guest_agent.copying")


@dataclass
class Copies:
    """Our end, with what was told."""

    link: Link
    told: list[str] = field(default_factory=list)
    end: FarEnd = FarEnd(PROGRAM, {"PYTHONPATH": str(REPOSITORY)})  # noqa: RUF009

    def copy(self) -> Copy:
        return Copy(self.told.append)

    async def into(self, destination: object, *sources: object, user: str = "") -> Copy:
        copy = self.copy()
        with trio.fail_after(30):
            await into_guest(self.link, [*map(str, sources)], str(destination), user, copy, self.end)
        return copy

    async def out(self, destination: object, *sources: object, user: str = "") -> Copy:
        copy = self.copy()
        with trio.fail_after(30):
            await out_of_guest(self.link, [*map(str, sources)], str(destination), user, copy, self.end)
        return copy


@pytest.fixture
async def copies() -> AsyncIterator[Copies]:
    service = Service()
    execute.register(service, lambda: "")
    ours, theirs = trio.testing.memory_stream_pair()
    host = Link(ours, Role.HOST, Service(), Hello(name="host"))
    guest = Link(theirs, Role.GUEST, service, Hello(name="guest"))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(guest.run)
        await nursery.start(host.run)
        yield Copies(host)
        with suppress(LinkClosed):  # the test may have said it
            await host.goodbye()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    root = tmp_path / "source"
    (root / "folder").mkdir(parents=True)
    for number in range(50):
        (root / "folder" / str(number)).write_text(f"{number}\n")
    (root / "big").write_bytes(os.urandom(3_000_000))
    (root / "link").symlink_to("folder/7")
    (root / "folder" / "7").chmod(0o755)
    os.utime(root / "folder" / "7", ns=(1, 2_000_000_003))
    return root


def need_codec(packs: bool) -> None:
    if packs and not packedfile.is_there():
        pytest.skip("no libzstd")


def check(copy: Path, source: Path) -> None:
    assert (copy / "big").read_bytes() == (source / "big").read_bytes()
    assert {path.name: path.read_text() for path in (copy / "folder").iterdir()} == {
        str(number): f"{number}\n" for number in range(50)
    }
    assert os.readlink(copy / "link") == "folder/7"
    assert (copy / "folder" / "7").stat().st_mode & 0o777 == 0o755
    assert (copy / "folder" / "7").stat().st_mtime_ns == 2_000_000_003


@pytest.mark.parametrize("packs", [False, True])
async def test_there_and_back_again(copies: Copies, source: Path, tmp_path: Path, packs: bool) -> None:
    need_codec(packs)
    copies.end = replace(copies.end, packs=packs)
    done = await copies.into(tmp_path / "in the VM", source)
    check(tmp_path / "in the VM", source)
    assert (done.gauge.size, done.problems) == (3_000_000 + 140, 0)
    assert done.gauge.files == 51
    (tmp_path / "there").mkdir()
    back = await copies.out(tmp_path / "there", tmp_path / "in the VM" / "big", f"{tmp_path}/in the VM/.")
    check(tmp_path / "there", source)
    assert (back.problems, copies.told) == (0, [])


async def test_packed_text_is_less_on_its_way(copies: Copies, tmp_path: Path) -> None:
    need_codec(True)
    text = tmp_path / "text"
    text.write_bytes(b"".join(b"%d: the same again and again\n" % number for number in range(100_000)))
    size = text.stat().st_size
    copies.end = replace(copies.end, packs=True)
    await copies.into(tmp_path / "there", text)
    assert copies.link.traffic.sent < size / 3
    await copies.out(tmp_path / "back", tmp_path / "there")
    assert copies.link.traffic.received < size / 3
    assert (tmp_path / "back").read_bytes() == text.read_bytes()
    assert copies.told == []


async def test_a_path_of_the_guest_begins_at_its_home(copies: Copies, source: Path, tmp_path: Path) -> None:
    name = f"agentctl-test-{os.getpid()}"
    try:
        await copies.into(f"~/{name}", source / "folder" / "7")
        await copies.out(tmp_path / "back", name)
    finally:
        (Path.home() / name).unlink(missing_ok=True)
    assert (tmp_path / "back").read_text() == "7\n"


async def test_what_cannot_be_copied_is_told_by_whichever_side(
    copies: Copies, source: Path, tmp_path: Path
) -> None:
    os.mkfifo(source / "pipe")
    there = tmp_path / "there"
    (there / "source" / "big").mkdir(parents=True)
    assert (await copies.into(there, source, tmp_path / "missing")).problems == 3
    assert sorted(copies.told) == [
        f"{tmp_path}/missing: No such file or directory",
        f"{source}/pipe: a pipe, which cannot be copied",
        f"guest:{there}/source/big: Is a directory",
    ]
    check_all_but_big = sorted(path.name for path in (there / "source").iterdir())
    assert check_all_but_big == ["big", "folder", "link"]
    copies.told.clear()
    assert (await copies.out(there, source, "/missing\nhere")).problems == 3
    assert sorted(copies.told) == [
        f"{there}/source/big: Is a directory",
        "guest:/missing\\nhere: No such file or directory",
        f"guest:{source}/pipe: a pipe, which cannot be copied",
    ]


async def test_nowhere_to_put_it(copies: Copies, source: Path, tmp_path: Path) -> None:
    """Long before the sender is done; it hears so, and ends."""
    assert (await copies.into("/nowhere/at all", source)).problems == 1
    assert (await copies.out("/nowhere/at all", source)).problems == 1
    assert copies.told == [
        "guest:/nowhere: No such file or directory",
        "/nowhere: No such file or directory",
    ]


async def test_a_guest_that_cannot_do_it_is_a_sentence(copies: Copies, source: Path, tmp_path: Path) -> None:
    for move in (copies.into, copies.out):
        with pytest.raises(UserError) as refused:
            await move(tmp_path / "there", source, user="nobody-here")
        assert refused.value.exit_code == ExitCode.GUEST
    copies.end = FarEnd(("/bin/sh", "-c", "kill -9 $$"))
    for move in (copies.into, copies.out):
        with pytest.raises(UserError, match="ended in the guest with status 137"):
            await move(tmp_path / "there", source)
    assert copies.told == []


@pytest.fixture
def large(source: Path) -> Path:
    """A file that takes a while, so that something can happen meanwhile."""
    with (source / "large").open("wb") as file:
        for _ in range(LARGE >> 20):
            file.write(os.urandom(1 << 20))
    return source / "large"


def sizes(there: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in there.iterdir()}


def check_large(there: Path, large: Path) -> None:
    assert (there / "large").read_bytes() == large.read_bytes()
    assert (there / "large").stat().st_mtime_ns == large.stat().st_mtime_ns


async def begun(there: Path) -> None:
    """Some of a file has come, and nothing has its name."""
    with trio.fail_after(30):
        while sum(sizes(there).values()) < 2 << 20:
            await trio.sleep(0.001)
    assert [name[:15] for name in sizes(there)] == [".agentctl-part-"]


async def goes_on(copies: Copies, there: Path, large: Path, move: Move) -> None:
    """What came is not sent again; nothing else is left of the first attempt."""
    again = copies.copy()
    with trio.fail_after(30):
        await move(copies.link, [str(large)], str(there), "", again, copies.end)
    assert (again.gauge.done, again.gauge.read) == (LARGE, again.gauge.kept)
    assert again.gauge.kept >= 2 << 20
    assert sizes(there) == {"large": LARGE}
    check_large(there, large)


@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("move", [into_guest, out_of_guest])
async def test_a_copy_that_is_interrupted_is_gone_on_with(
    copies: Copies, tmp_path: Path, large: Path, move: Move, packs: bool
) -> None:
    need_codec(packs)
    copies.end = replace(copies.end, packs=packs)
    there = tmp_path / "there"
    there.mkdir()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(move, copies.link, [str(large)], str(there), "", copies.copy(), copies.end)
        await begun(there)
        nursery.cancel_scope.cancel()
    assert [name[:15] for name in sizes(there)] == [".agentctl-part-"]
    assert copies.told == []
    await goes_on(copies, there, large, move)


@pytest.mark.parametrize("move", [into_guest, out_of_guest])
async def test_a_guest_of_another_version_is_sent_all_and_keeps_no_part(
    copies: Copies, tmp_path: Path, large: Path, move: Move
) -> None:
    there = tmp_path / "there"
    there.mkdir()
    end = replace(copies.end, resumes=False)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(move, copies.link, [str(large)], str(there), "", copies.copy(), end)
        with trio.fail_after(30):
            while not any(sizes(there).values()):
                await trio.sleep(0.001)
        nursery.cancel_scope.cancel()
    with trio.fail_after(30):
        while sizes(there):
            await trio.sleep(0.01)
        await move(copies.link, [str(large)], str(there), "", copies.copy(), end)
    check_large(there, large)


@pytest.mark.parametrize("move", [into_guest, out_of_guest])
async def test_a_lost_link_is_a_sentence_and_nothing_has_its_name(
    copies: Copies, tmp_path: Path, large: Path, move: Move
) -> None:
    there = tmp_path / "there"
    there.mkdir()

    async def lost() -> None:
        with pytest.raises(CutOff, match="the connection to the guest was lost during the copy"):
            await move(copies.link, [str(large)], str(there), "", copies.copy(), copies.end)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(lost)
        await begun(there)
        await copies.link.goodbye("the VM is switched off")
    assert [name[:15] for name in sizes(there)] == [".agentctl-part-"]
    assert copies.told == []
