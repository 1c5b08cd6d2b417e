"""Everything is looked at again: what is told is what differs, whatever was missed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fileserver.promises import UNCERTAIN
from fileserver.retractions import Retraction, Retractions
from fileserver.signatures import UNSETTLED_NS
from host_agent.fileserver.server import FileServer
from protocol.files import ATTRIBUTES, ROOT, Create, GetAttributes, Lookup, Unlink
from tests.fileserver.peers import SHARE, until
from tests.fileserver.scene import connected, waiting
from tests.fileserver.served import Served, serving
from tests.fileserver.test_promises import Heard, elsewhere, node
from tests.fileserver.watched import Watched, answer, promised


@pytest.fixture
def watched() -> Watched:
    return Watched()


@pytest.fixture
def share(tmp_path: Path, watched: Watched) -> Iterator[Served]:
    (tmp_path / "d/below").mkdir(parents=True)
    for name in ("f", "d/g", "d/below/h"):
        (tmp_path / name).write_text(name)
    with serving(tmp_path, watches=watched) as served:
        yield served


class Known:
    """What the guest was given, and what it is told of it."""

    def __init__(self, share: Served, *paths: str) -> None:
        time.sleep(UNSETTLED_NS / 1e9)  # the last change is so long ago that another one will show
        self._share = share
        self._names = {ROOT: "."}
        assert promised(share, answer(share, GetAttributes, ROOT))
        for path in paths:
            number, walked = ROOT, ""
            for name in path.split("/"):
                outcome = answer(share, Lookup, number, name.encode())
                assert promised(share, outcome)
                number, walked = outcome.value.node, os.path.join(walked, name)  # type: ignore[union-attr]
                self._names[number] = walked
        assert all(node(share, number).given > 0 for number in self._names)

    def told(self, *, absences: bool = True, trusting: bool = True) -> tuple[set[str], set[str], set[str]]:
        """Names, files and directories."""
        names, files, directories = set(), set(), set()

        def take(told: Retraction) -> None:
            for name in told.names:
                names.add(os.path.join(self._names[name.directory], name.name.decode()).removeprefix("./"))
            files.update(self._names[node.number] for node, _ in told.nodes)
            directories.update(self._names[number] for number, _ in told.directories)

        self._share.tree.revalidate(take, absences=absences, trusting=trusting)
        return names, files, directories


def test_nothing_has_changed(share: Served) -> None:
    known = Known(share, "f", "d/g", "d/below/h")
    assert known.told() == (set(), set(), set())


def test_a_file_has_changed(share: Served) -> None:
    known = Known(share, "f", "d/g", "d/below/h")
    (share.path / "d/g").write_text("other")
    os.chmod(share.path / "f", 0o600)
    assert known.told() == (set(), {"d/g", "f"}, set())


def test_names_have_changed(share: Served) -> None:
    known = Known(share, "f", "d/g", "d/below/h")
    os.rename(share.path / "f", share.path / "d/below/new")
    (share.path / "d/other").write_text("other")
    os.rename(share.path / "d/other", share.path / "d/g")
    names, files, directories = known.told()
    assert names == {"f", "d/g", "d/below/new"}
    assert files == {"f", "d/g"}
    assert directories == {".", "d", "d/below"}


def test_what_was_promised_not_to_be_there(share: Served) -> None:
    known = Known(share, "d/g")
    (share.path / "new").touch()
    assert known.told(absences=False) == (set(), set(), {"."})
    assert known.told()[0] == {"new", "f"}, "and what it never asked for"


def test_a_directory_has_gone(share: Served) -> None:
    known = Known(share, "d/below/h", "f")
    os.rename(share.path / "d", share.path / "e")
    names, _, directories = known.told(absences=False)
    assert names == {"d"}
    assert "." in directories


def test_only_what_another_directory_is_now_is_named(share: Served) -> None:
    """The guest's kernel unmounts what a container has mounted below a name that it is told of."""
    known = Known(share, "d/below/h")
    (share.path / "d/below/new").touch()
    os.chmod(share.path / "d", 0o700)
    assert known.told(trusting=False, absences=False) == (set(), {"d/below/h"}, {".", "d", "d/below"})
    os.rename(share.path / "d/below", share.path / "was")
    os.rename(share.path / "d", share.path / "other")
    (share.path / "d/below").mkdir(parents=True)
    assert known.told(absences=False)[0] == {"d", "d/below"}


def test_what_cannot_be_compared_is_told(share: Served) -> None:
    known = Known(share, "f", "d/g")
    file = answer(share, Create, ROOT, b"new", 0o644, os.O_EXCL)
    assert promised(share, file)
    assert node(share, file.value.node).given == UNCERTAIN  # type: ignore[union-attr]
    known._names[file.value.node] = "new"  # type: ignore[union-attr]
    names, files, directories = known.told(absences=False)
    assert (names, files) == (set(), {"new"})
    assert directories == {"."}


def test_a_file_without_a_name(share: Served) -> None:
    known = Known(share, "f", "d/g")
    file = share.node("f")
    with (share.path / "f").open("a") as opened:
        share.ask(Unlink, ROOT, b"f")
        time.sleep(UNSETTLED_NS / 1e9)
        assert promised(share, answer(share, GetAttributes, file)) == ATTRIBUTES
        assert known.told(absences=False)[1] == set()
        opened.write("more")
    assert known.told(absences=False)[1] == {"f"}


def test_marks_are_made_again(share: Served, watched: Watched) -> None:
    known = Known(share, "f", "d/g")
    before = set(watched.marked)
    watched.marked.clear()
    known.told()
    assert watched.marked == before


def test_a_successor_finds_out_what_is_a_directory(share: Served) -> None:
    known = Known(share, "f", "d/g", "d/below/h")
    share.restart()
    names, files, directories = known.told(absences=False, trusting=False)
    assert names == set()
    assert files == {"f", "d/g", "d/below/h"}
    assert directories == {".", "d", "d/below"}


# --- of a server -------------------------------------------------------------------------------------


def overflow(server: FileServer) -> None:
    server._watches.void("a test says so")


def sleep(server: FileServer) -> None:
    """The machine's: what others did to a disk of the network meanwhile is one example."""
    server._mount_watch._on_sleep(3600.0)


@pytest.mark.parametrize("lose", [overflow, sleep])
async def test_when_events_were_lost(
    place: Path, monkeypatch: pytest.MonkeyPatch, lose: Callable[[FileServer], None]
) -> None:
    async with connected(place) as guest:
        elsewhere(guest.root, "mkdir d; echo f > d/f; echo g > g")
        directory = (await guest.kernel.lookup(b"d")).node
        file = (await guest.kernel.lookup(b"f", directory)).node
        await guest.kernel.lookup(b"g")
        with monkeypatch.context() as patch:
            patch.setattr(Retractions, "of", lambda *_: Retraction())
            elsewhere(guest.root, "rm g; touch new; echo more >> d/f")
            await until(lambda: guest.scene.server._shares[SHARE].telling._said)
        guest.kernel.changes()
        lose(guest.scene.server)
        heard = Heard(guest)
        await until(lambda: heard.names() == {(ROOT, b"g"), (ROOT, b"new")})
        await until(lambda: (file, directory) in heard.nodes())
        await until(lambda: not guest.scene.server._shares[SHARE].state().revalidating)


async def test_what_happened_without_a_session_is_told_in_the_next(place: Path) -> None:
    async with waiting(place) as guest:
        elsewhere(guest.root, "mkdir d; echo f > d/f; echo g > g")
        async with guest.session():
            directory = (await guest.kernel.lookup(b"d")).node
            file = (await guest.kernel.lookup(b"f", directory)).node
            await guest.kernel.lookup(b"g")
        elsewhere(guest.root, "rm g; echo more >> d/f")
        await until(lambda: guest.scene.server._link is None)
        guest.kernel.changes()
        async with guest.session():
            heard = Heard(guest)
            await until(lambda: heard.names() == {(ROOT, b"g")})
            await until(lambda: (file, directory) in heard.nodes())


async def test_what_was_said_last_is_said_again(place: Path) -> None:
    """It may not have arrived, and what has been looked up since is what is there: nothing differs."""
    async with waiting(place) as guest:
        elsewhere(guest.root, "echo f > f; touch -d 2001-01-01 f")
        async with guest.session():
            before = (await guest.kernel.lookup(b"f")).node
            elsewhere(guest.root, "echo other > g; mv g f")
            heard = Heard(guest)
            await until(lambda: (ROOT, b"f") in heard.names())
            after = (await guest.kernel.lookup(b"f")).node
            assert after != before
        guest.kernel.changes()
        async with guest.session():
            heard = Heard(guest)
            await until(lambda: heard.names() == {(ROOT, b"f")})
            await until(lambda: {number for number, _ in heard.nodes()} >= {before})
        guest.kernel.changes()
        async with guest.session():
            heard, shares = Heard(guest), guest.scene.server._shares.values()
            await until(lambda: not any(share.telling.revalidating for share in shares))
            await guest.kernel.lookup(b"f")  # answered behind what was told
            assert not heard.names(), "and not a second time"
