"""Directory streams and lookups, from memory or from the host: shared by all readers, resumable from any offset."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guest_agent.fuse import bare, bodies, directories, listing
from guest_agent.fuse.abi import Opcode
from guest_agent.fuse.directories import NameChange
from guest_agent.fuse.volume import Volume
from protocol.files import ATTRIBUTES as PROMISED_ATTRIBUTES
from protocol.files import (
    NAME,
    ROOT,
    Attributes,
    Changed,
    Entry,
    FileCall,
    Forget,
    GetAttributes,
    ListEntries,
    Listing,
    Lookup,
    Removed,
    Renamed,
)
from tests.guest_agent.fuse.entries import DIRECTORY, Name, Shown, numbered, piece_of, placed, shown
from tests.guest_agent.fuse.script import ATTRIBUTES, Asked, Script, failed, pack, replied
from tests.guest_agent.fuse.test_promises import parse
from tests.guest_agent.fuse.test_volume import DIRECTORY as FOLDER

D = 5
DOTS = [Shown(b".", 1, 0), Shown(b"..", 2, 0)]
NAMES = numbered(500)
ALL = [Shown(name.name, off, name.node) for off, name in placed(NAMES)]


class Directory:
    """The host's side: answers each ``ListEntries`` with a piece of at most ``piece`` names."""

    def __init__(self, names: Sequence[Name], piece: int = 100, promise: int = NAME) -> None:
        self.names = placed(names)
        self.piece = piece
        self.promise = promise
        self.asked: list[ListEntries] = []

    def answer(self, asked: Asked) -> None:
        assert isinstance(asked.call, ListEntries)
        self.asked.append(asked.call)
        asked.answer(*piece_of(self.names, asked.call.after, self.piece, self.promise))


def unpromised(names: Sequence[Name], piece: int = 100) -> Directory:
    return Directory([Name(name.name) for name in names], piece, promise=0)


def ask(script: Script, off: int, size: int = 4096, node: int = D) -> int:
    return script.request(Opcode.READDIRPLUS, pack("QQIIQII", 0, off, size, 0, 0, 0, 0), node=node)


def look_up(script: Script, name: bytes, node: int = D) -> int:
    return script.request(Opcode.LOOKUP, name + b"\0", node=node)


def calls(script: Script, kind: type[FileCall[Any]]) -> list[Asked]:
    """What was asked of the host and not answered, of a kind."""
    return [asked for asked in script.link.asked if type(asked.call) is kind]


class Reader:
    """One open directory of the guest's kernel."""

    def __init__(self, script: Script, directory: Directory, node: int = D) -> None:
        self.script = script
        self.directory = directory
        self.node = node

    def read(self, off: int, size: int = 4096) -> list[Shown]:
        ask(self.script, off, size, self.node)
        while self.script.link.asked:
            self.directory.answer(self.script.take())
        while self.script.notifier.waiting:
            self.script.notifier.finish()
        kind, _, reply = self.script.answers[-1]
        assert kind == "reply"
        assert len(reply) <= size
        return shown(reply)

    def read_all(self, off: int = 0, size: int = 4096) -> list[Shown]:
        found: list[Shown] = []
        while page := self.read(off, size):
            found += page
            off = page[-1].off
        return found


def names_of(records: Sequence[Shown]) -> list[bytes]:
    return [record.name for record in records]


def test_a_directory_is_opened_without_a_message() -> None:
    script = Script()
    unique = script.request(Opcode.OPENDIR, pack("II", 0, 0))
    assert script.answers == failed(unique, "ENOSYS")
    assert not script.link.asked


@pytest.mark.parametrize("piece", [1, 7, 100, 500, 1000])
@pytest.mark.parametrize("promise", [0, NAME])
def test_all_names_come_once_and_in_order(piece: int, promise: int) -> None:
    directory = Directory(NAMES, piece) if promise else unpromised(NAMES, piece)
    found = Reader(Script(), directory).read_all()
    assert names_of(found) == names_of(DOTS + ALL)
    assert [record.node for record in found[2:]] == [record.node * promise for record in ALL]
    # Each name crossed the link once: no piece was asked for again.
    assert len(directory.asked) == -(-len(NAMES) // piece)


def test_an_empty_directory_has_its_two_names() -> None:
    directory = Directory([])
    assert Reader(Script(), directory).read_all() == DOTS
    assert len(directory.asked) == 1


@given(
    names=st.sets(st.binary(min_size=1, max_size=255), max_size=60),
    piece=st.integers(1, 20),
    size=st.integers(732, 5000),
)
def test_pages_of_any_size_from_pieces_of_any_size(names: set[bytes], piece: int, size: int) -> None:
    directory = Directory([Name(name, 100 + number) for number, name in enumerate(names)], piece)
    found = Reader(Script(), directory).read_all(size=size)
    assert [(one.name, one.node) for one in found[2:]] == [
        (name.name, name.node) for _, name in directory.names
    ]


@given(
    names=st.sets(st.binary(min_size=1, max_size=40), max_size=40),
    piece=st.integers(1, 20),
    turns=st.lists(st.tuples(st.integers(0, 2), st.booleans()), max_size=80),
    promised=st.booleans(),
)
def test_readers_in_any_order_each_see_all_names(
    names: set[bytes], piece: int, turns: list[tuple[int, bool]], promised: bool
) -> None:
    """Each reads a page when it is its turn, or begins anew."""
    all_ = [Name(name, 100 + number) for number, name in enumerate(names)]
    directory = Directory(all_, piece) if promised else unpromised(all_, piece)
    reader = Reader(Script(), directory)
    expected = [b".", b"..", *(name.name for _, name in directory.names)]
    seen: list[list[Shown]] = [[], [], []]
    given: list[int] = []
    for who, rewind in turns:
        if rewind:
            seen[who] = []
        page = reader.read(seen[who][-1].off if seen[who] else 0, 600)
        assert names_of(page) == expected[len(seen[who]) :][: len(page)]
        assert page or names_of(seen[who]) == expected
        seen[who] += page
        given += [record.node for record in page if record.node]
    if promised:
        assert len(given) == len(set(given))


def test_readers_who_are_apart_do_not_ask_for_each_others_pieces() -> None:
    directory = unpromised(NAMES)
    reader = Reader(Script(), directory)
    positions = [0, 0, 0]
    for _ in range(20):
        for who in range(3):
            page = reader.read(positions[who], 1000)
            assert page == [Shown(one.name, one.off, 0) for one in ALL if one.off > positions[who]][
                : len(page)
            ] or (page[:2] == DOTS)
            positions[who] = page[-1].off
    assert [call.after for call in directory.asked].count(0) == 3  # whoever begins lists afresh
    assert len(directory.asked) <= 3 + 5


def test_what_is_promised_is_read_again_without_asking() -> None:
    directory = Directory(NAMES)
    reader = Reader(Script(), directory)
    reader.read_all()
    again = reader.read_all()
    assert names_of(again) == names_of(DOTS + ALL)
    assert {record.node for record in again} == {0}
    assert len(directory.asked) == 5


def test_what_is_not_promised_is_listed_afresh_by_whoever_begins() -> None:
    directory = unpromised(NAMES[1:])
    reader = Reader(Script(), directory)
    reader.read_all()
    directory.names = placed(NAMES)
    assert NAMES[0].name in names_of(reader.read_all())
    reader.read(0)
    directory.names = placed(NAMES[1:])
    assert NAMES[0].name not in names_of(reader.read_all())


@pytest.mark.parametrize("position", [0, 1, 250, 498])
def test_it_goes_on_after_any_offset(position: int) -> None:
    reader = Reader(Script(), Directory(NAMES))
    reader.read(0)
    assert names_of(reader.read_all(ALL[position].off)) == names_of(ALL[position + 1 :])


def test_the_two_names_can_be_gone_on_after_too() -> None:
    reader = Reader(Script(), Directory(NAMES))
    assert reader.read(1)[:2] == [DOTS[1], ALL[0]]
    assert names_of(reader.read(2)[:1]) == [ALL[0].name]


def test_a_stream_from_before_a_restart_goes_on() -> None:
    directory = Directory(NAMES)
    page = Reader(Script(), directory).read(0)
    assert page + Reader(Script(), directory).read_all(page[-1].off) == DOTS + ALL


def test_a_name_that_has_gone_is_a_position_all_the_same() -> None:
    directory = unpromised(NAMES)
    reader = Reader(Script(), directory)
    page = reader.read(0)
    directory.names = [one for one in directory.names if one[0] != page[-1].off]
    assert reader.read(page[-1].off)[0].name == ALL[len(page) - 2].name
    assert reader.read_all(ALL[300].off - 1)[0].name == ALL[300].name


def test_many_directories_are_bounded_and_can_be_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directories, "MAX_HELD", 300_000)
    script = Script()
    readers = [Reader(script, unpromised(NAMES, 500), node) for node in range(100, 110)]
    pages = [reader.read(0) for reader in readers]
    assert 0 < script.volume.listings.directories.held <= 300_000
    for reader, page in zip(readers, pages, strict=True):
        assert names_of(page + reader.read_all(page[-1].off)) == names_of(DOTS + ALL)


def test_a_directory_larger_than_all_memory_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directories, "MAX_HELD", 5_000)
    directory = Directory(NAMES, 50)
    assert Reader(Script(), directory).read_all() == DOTS + ALL
    assert len(directory.asked) == 10


def test_nothing_is_held_of_what_was_read_and_is_not_promised() -> None:
    script = Script()
    reader = Reader(script, unpromised(NAMES))
    reader.read(0)
    assert script.volume.listings.directories.held > 0
    reader.read_all()
    assert script.volume.listings.directories.held == 0


def test_an_older_listing_that_comes_late_takes_nothing_from_a_newer_one() -> None:
    script = Script()
    old, new = unpromised(NAMES, 10), unpromised([Name(b"new-%d" % number) for number in range(500)], 10)
    reader = Reader(script, old)
    off = reader.read(0)[-1].off
    ask(script, off)  # the old one goes on...
    late = script.take()
    reader.directory = new
    reader.read(0)  # ...while another begins
    old.answer(late)
    assert shown(script.answers[-1][2])[0].name == ALL[10].name
    assert all(one.name.startswith(b"new") for one in reader.read_all(new.names[0][0]))


# --- names, looked up --------------------------------------------------------------------------------


def learned(names: Sequence[Name] = NAMES, script: Script | None = None, node: int = D) -> Script:
    """A directory is here, and the guest has had nothing of it yet."""
    script = Script() if script is None else script
    for number in range(3):
        look_up(script, b"?%d" % number, node)
    for asked in list(script.link.asked):
        if isinstance(asked.call, ListEntries):
            Directory(names, 10_000).answer(asked)
        else:
            asked.fail(2)
    script.link.asked.clear()
    assert len(script.answers) == 3
    return script


def test_a_name_that_is_here_costs_no_message() -> None:
    script = learned()
    for name in NAMES:
        unique = look_up(script, name.name)
        assert script.answers == replied(unique, name.entry)
    assert not script.link.asked


def test_a_name_that_is_not_there_costs_none_either() -> None:
    script = learned()
    unique = look_up(script, b"absent")
    assert script.answers == replied(unique, bodies.ABSENT)
    assert not script.link.asked
    # It is remembered like any other, to be taken back.
    script.volume.take_back(Changed(7, [D], [b"absent"], directories=[D], above=[0]))
    assert b"absent" in b"".join(one for one, _ in script.notifier.sequences)


def test_a_name_that_was_given_is_asked_for() -> None:
    script = learned()
    look_up(script, b"name-1")
    look_up(script, b"name-1")
    assert [asked.call.name for asked in calls(script, Lookup)] == [b"name-1"]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("opcode", "body", "name"),
    [
        (Opcode.UNLINK, b"name-1\0", b"name-1"),
        (Opcode.RMDIR, b"name-1\0", b"name-1"),
        (Opcode.MKDIR, pack("II", 0o755, 0) + b"new\0", b"new"),
        (Opcode.MKNOD, pack("IIII", 0o100644, 0, 0, 0) + b"new\0", b"new"),
        (Opcode.SYMLINK, b"new\0target\0", b"new"),
        (Opcode.CREATE, pack("IIII", 0, 0o644, 0, 0) + b"new\0", b"new"),
        (Opcode.LINK, pack("Q", 1001) + b"new\0", b"new"),
        (Opcode.RENAME2, pack("QII", D, 0, 0) + b"name-1\0new\0", b"name-1"),
        (Opcode.RENAME2, pack("QII", D, 0, 0) + b"name-1\0new\0", b"new"),
    ],
)
def test_names_that_the_guest_has_changed_are_asked_for(opcode: Opcode, body: bytes, name: bytes) -> None:
    script = learned()
    script.request(opcode, body)
    asked = script.take()
    result: Any = {Entry: Entry(99, ATTRIBUTES)}.get(asked.call.RESULT)
    asked.answer(asked.call.RESULT() if result is None else result)
    look_up(script, name)
    assert [asked.call.name for asked in calls(script, Lookup)] == [name]  # type: ignore[attr-defined]
    # And whoever lists the directory wants to see it.
    ask(script, 0)
    assert [asked.call.node for asked in calls(script, ListEntries)] == [D]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("opcode", "body"),
    [
        (Opcode.SETATTR, pack("IIQQQQQQIIIIIIII", 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0o600, 0, 0, 0, 0)),
        (Opcode.WRITE, pack("QQIIQII", 0, 0, 3, 0, 0, 0, 0) + b"abc"),
        (Opcode.FALLOCATE, pack("QQQII", 0, 0, 100, 0, 0)),
        (Opcode.SETXATTR, pack("II", 1, 0) + b"user.x\0v"),
        (Opcode.REMOVEXATTR, b"user.x\0"),
    ],
)
def test_a_node_that_the_guest_has_changed_is_asked_for(opcode: Opcode, body: bytes) -> None:
    script = learned()
    script.request(opcode, body, node=1001)
    asked = script.take()
    results: dict[type, Any] = {"Attributes": (ATTRIBUTES,), "Written": (3, 0, ATTRIBUTES), "Done": ()}  # type: ignore[dict-item]
    asked.answer(asked.call.RESULT(*results[asked.call.RESULT.__name__]))  # type: ignore[index]
    look_up(script, b"name-1")
    assert len(calls(script, Lookup)) == 1


def test_a_newer_answer_without_a_promise_is_the_whole_word() -> None:
    script = learned()
    learned([Name(b"other", 1001)], script, node=6)
    look_up(script, b"name-1")
    look_up(script, b"name-1")
    script.take().answer(Entry(1001, ATTRIBUTES))
    look_up(script, b"other", node=6)
    assert len(calls(script, Lookup)) == 1


def getattr_(script: Script, node: int) -> int:
    return script.request(Opcode.GETATTR, pack("IIQ", 0, 0, 0), node=node)


def test_attributes_that_are_here_cost_no_message() -> None:
    script = learned()
    unique = getattr_(script, 1001)
    assert script.answers == replied(unique, bodies.attr_out(NAMES[1].attr, NAME | PROMISED_ATTRIBUTES))
    assert not script.link.asked


@pytest.mark.parametrize("promise", [0, PROMISED_ATTRIBUTES])
def test_attributes_are_asked_for_once_if_they_are_promised(promise: int) -> None:
    script = Script()
    for count in (1, 2):
        unique = getattr_(script, 77)
        if count == 1 or not promise:
            script.take().answer(Attributes(ATTRIBUTES, promise=promise))
        ((_, answered, reply),) = script.answers
        assert (answered, reply[16:]) == (unique, ATTRIBUTES)


def test_while_data_is_being_dropped_its_attributes_wait() -> None:
    script = learned()
    script.volume.drop(1001).begin(lambda _: None)
    getattr_(script, 1001)
    assert len(script.link.asked) == 1


def test_what_the_host_says_has_changed_is_asked_for() -> None:
    script = learned()
    script.volume.take_back(Changed(7, nodes=[1001], through=[D]))
    look_up(script, b"name-1")
    assert len(calls(script, Lookup)) == 1
    unique = look_up(script, b"name-2")
    assert script.answers == replied(unique, NAMES[2].entry)
    script.volume.take_back(Changed(7, [D], [b"new"], directories=[D], above=[0]))
    look_up(script, b"name-3")
    assert len(calls(script, Lookup)) == 2


def forgotten(script: Script) -> dict[int, int]:
    """What the host is told that nobody needs."""
    while script.timers.waiting:
        script.timers.fire()
    counts: dict[int, int] = {}
    for asked in calls(script, Forget):
        script.link.asked.remove(asked)
        counts.update(zip(asked.call.nodes, asked.call.counts, strict=True))  # type: ignore[attr-defined]
    return counts


def test_what_was_not_given_is_given_back_to_the_host() -> None:
    script = learned()
    look_up(script, b"name-1")
    script.volume.take_back(Changed(7, directories=[D], above=[0]))
    assert forgotten(script) == {name.node: 1 for name in NAMES if name.node != 1001}


def test_with_the_session_goes_all_that_was_promised() -> None:
    script = learned()
    script.lose_host()
    script.volume.void()
    script.find_host()
    assert forgotten(script) == {name.node: 1 for name in NAMES}
    look_up(script, b"name-1")
    look_up(script, b"absent")
    assert len(calls(script, Lookup)) == 2


@pytest.mark.parametrize(
    ("opcode", "body", "node"),
    [(Opcode.FORGET, pack("Q", 1), D), (Opcode.BATCH_FORGET, pack("IIQQQQ", 2, 0, D, 1, 99, 1), 0)],
)
def test_a_directory_that_the_kernel_forgets_is_forgotten(opcode: Opcode, body: bytes, node: int) -> None:
    script = learned()
    script.request(opcode, body, node=node)
    assert D not in script.volume.listings.directories
    assert forgotten(script).keys() >= {name.node for name in NAMES} | {D}


def test_what_comes_of_a_directory_that_was_forgotten_is_not_believed() -> None:
    script = Script()
    ask(script, 0)
    script.request(Opcode.FORGET, pack("Q", 1))
    Directory(NAMES, 1000).answer(script.take())
    assert {record.node for record in shown(script.answers[-1][2])} == {0}
    assert forgotten(script).keys() >= {name.node for name in NAMES}


def test_two_mounts_of_a_share_are_promised_nothing() -> None:
    script = learned()
    other = Script()
    other.volumes.add(script.volume)
    script.volumes.add(other.volume)
    script.volume.listings.void()
    reader = Reader(script, Directory(NAMES, 1000))
    assert {record.node for record in reader.read_all()} == {0}
    look_up(script, b"name-1")
    assert len(calls(script, Lookup)) == 1


# --- asked for already -------------------------------------------------------------------------------


def test_whoever_needs_what_is_coming_waits_for_it() -> None:
    script = Script()
    first, second = ask(script, 0, 600), ask(script, 0, 600)
    name, absent = look_up(script, b"name-1"), look_up(script, b"absent")
    assert len(script.link.asked) == 1
    Directory(NAMES, 1000).answer(script.take())
    answers = {unique: (kind, reply) for kind, unique, reply in script.answers}
    assert set(answers) == {first, second, name, absent}
    assert answers[absent] == ("reply", bodies.ABSENT)
    given = [record.node for unique in (first, second) for record in shown(answers[unique][1]) if record.node]
    assert len(given) == len(set(given)) > 0
    assert answers[name] == ("reply", NAMES[1].entry) or 1001 in given
    assert not [one for one in script.link.asked if not isinstance(one.call, Lookup)]


def test_of_what_is_not_promised_each_who_begins_asks_for_itself() -> None:
    script = Script()
    first, second = ask(script, 0), ask(script, 0)
    unpromised(NAMES).answer(script.take())
    assert [unique for _, unique, _ in script.answers] == [first]
    unpromised(NAMES).answer(script.take())
    assert [unique for _, unique, _ in script.answers] == [second]


def test_an_error_is_of_those_who_asked() -> None:
    script = Script()
    first, second, name = ask(script, 0), ask(script, 0), look_up(script, b"x")
    script.take().fail(13)
    assert script.answers == failed(first, "EACCES")
    assert {type(asked.call) for asked in script.link.asked} == {ListEntries, Lookup}
    for asked in list(script.link.asked):
        asked.fail(13)
    assert {unique for _, unique, _ in script.answers} == {second, name}


def test_a_signal_makes_one_who_waits_ask_for_itself() -> None:
    """And then it can be let go, if it is to be killed."""
    script = Script()
    ask(script, 0)
    name = look_up(script, b"name-1")
    script.dying.add(42)
    script.request(Opcode.INTERRUPT, pack("Q", name), unique=name | 1)
    assert [asked.call.unique for asked in calls(script, Lookup)] == [name]  # type: ignore[attr-defined]
    script.host.let_the_dying_go()
    assert script.answers == failed(name, "EINTR")


def test_nothing_is_given_to_one_who_was_let_go() -> None:
    script = Script()
    unique = ask(script, 0)
    script.dying.add(42)
    script.request(Opcode.INTERRUPT, pack("Q", unique), unique=unique | 1)
    script.host.let_the_dying_go()
    assert script.answers == failed(unique, "EINTR")
    Directory(NAMES, 1000).answer(script.take())
    for name in NAMES:
        again = look_up(script, name.name)
        assert script.answers[-1:] == replied(again, name.entry)


def test_when_the_session_ends_nobody_waits_for_others() -> None:
    script = Script()
    first, second = ask(script, 0), ask(script, 0)
    script.lose_host()
    script.volume.void()
    script.find_host()
    assert sorted(asked.call.unique for asked in calls(script, ListEntries)) == [first, second]  # type: ignore[attr-defined]
    while script.link.asked:
        Directory(NAMES, 1000).answer(script.take())
    for _, _, reply in script.answers:
        assert {record.node for record in shown(reply)} <= {0, *(name.node for name in NAMES)}


# --- ahead -------------------------------------------------------------------------------------------

TREE = [Name(b"d%02d" % number, 100 + number, DIRECTORY) for number in range(40)]


def test_several_lookups_bring_the_directory() -> None:
    script = Script()
    for name in NAMES[:3]:
        look_up(script, name.name)
    lookups, lists = calls(script, Lookup), calls(script, ListEntries)
    assert (len(lookups), len(lists)) == (3, 1)
    Directory(NAMES, 1000).answer(lists[0])
    script.link.asked.clear()
    for name in NAMES[3:]:
        unique = look_up(script, name.name)
        assert script.answers == replied(unique, name.entry)
    assert not script.link.asked


def test_a_guest_that_walks_is_listed_to_ahead() -> None:
    script = learned(TREE)
    asked = []
    for name in (name for _, name in placed(TREE)):
        look_up(script, name.name)
        ask(script, 0, node=name.node)
        while script.link.asked:
            one = script.take()
            asked.append(one.call.node)  # type: ignore[attr-defined]
            Directory(numbered(3, one.call.node * 1000)).answer(one)  # type: ignore[attr-defined]
        records = shown(script.answers[-1][2])
        assert len(records) == 5
        assert 0 not in [record.node for record in records[2:]]
    assert sorted(asked) == sorted(name.node for name in TREE)
    assert asked.index(placed(TREE)[30][1].node) <= 30


def test_what_was_listed_ahead_is_asked_with_numbers_of_its_own() -> None:
    script = learned(TREE)
    order = [name for _, name in placed(TREE)]
    ask(script, 0, node=order[0].node)
    script.link.asked.clear()
    ask(script, 0, node=order[1].node)
    uniques = [asked.call.unique for asked in script.link.asked]  # type: ignore[attr-defined]
    assert len(uniques) == 3
    assert sum(unique > 1 << 62 for unique in uniques) == 2


def test_what_fails_ahead_is_nobodys_trouble() -> None:
    script = learned(TREE)
    order = [name for _, name in placed(TREE)]
    first, second = ask(script, 0, node=order[0].node), ask(script, 0, node=order[1].node)
    while script.link.asked:
        script.take().fail(116)
    assert script.answers == failed(first, "ESTALE") + failed(second, "ESTALE")


def walked() -> tuple[Script, int]:
    """A guest that has looked up a name in each of three directories; and one that nobody has asked for."""
    script = learned(TREE)
    order = [name.node for _, name in placed(TREE)]
    asked_for = set()
    for node in order[:3]:
        look_up(script, b"name-1", node)
        while script.link.asked:
            asked = script.take()
            asked_for.add(asked.call.node)  # type: ignore[attr-defined]
            if isinstance(asked.call, ListEntries):
                Directory(numbered(3, asked.call.node * 100)).answer(asked)
            else:
                asked.answer(Entry(node * 9, ATTRIBUTES))
    script.answers  # noqa: B018  (what was said so far)
    return script, next(node for node in reversed(order) if node not in asked_for)


def test_who_walks_is_given_a_name_from_the_whole_directory() -> None:
    script, node = walked()
    unique = look_up(script, b"name-1", node)
    assert not calls(script, Lookup)
    (asked,) = [asked for asked in calls(script, ListEntries) if asked.call.node == node]  # type: ignore[attr-defined]
    Directory(numbered(3, 7000)).answer(asked)
    assert script.answers == replied(unique, numbered(3, 7000)[1].entry)


def test_who_walks_into_what_cannot_be_listed_asks_by_name() -> None:
    script, node = walked()
    first = look_up(script, b"name-1", node)
    for asked in list(calls(script, ListEntries)):
        asked.fail(13)
    assert [asked.call.unique for asked in calls(script, Lookup)] == [first]  # type: ignore[attr-defined]
    script.link.asked.clear()
    second = look_up(script, b"name-2", node)
    assert [asked.call.unique for asked in calls(script, Lookup)] == [second]  # type: ignore[attr-defined]


def test_a_directory_that_is_not_promised_is_not_listed_for_lookups_again_and_again() -> None:
    script = Script()
    listed = 0
    for number in range(200):
        look_up(script, b"absent-%d" % number)
        while script.link.asked:
            asked = script.take()
            if isinstance(asked.call, ListEntries):
                listed += 1
                unpromised(NAMES).answer(asked)
            else:
                asked.fail(2)
    assert listed <= 7


def test_names_without_nodes_are_not_listed_for_lookups_again_and_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Beyond the files that the host's kernel watches; and there is room here for the names of one directory only."""
    monkeypatch.setattr(directories, "MAX_HELD", 100_000)
    script, host = Script(), Directory([Name(name.name) for name in NAMES], 1000)
    listed = 0
    for number, name in enumerate(NAMES):
        look_up(script, name.name, node=100 + number % 2)
        while script.link.asked:
            asked = script.take()
            if isinstance(asked.call, ListEntries):
                listed += 1
                host.answer(asked)
            else:
                asked.answer(Entry(77, ATTRIBUTES))
    assert listed <= 8


# --- names alone -------------------------------------------------------------------------------------


class Bare:
    """A host that does as it is asked: directories of files, of which the guest has read ``node``."""

    def __init__(self, node: int = D) -> None:
        self.script = Script()
        self.now = 100.0
        self.script.volume.listings._clock = lambda: self.now
        self.listed: list[tuple[int, bool]] = []
        self.read(node)

    def answer_all(self) -> None:
        while self.script.link.asked:
            asked = self.script.take()
            call: Any = asked.call
            if isinstance(call, ListEntries):
                self.listed.append((call.node, call.bare))
                names = [
                    *numbered(20, 0 if call.bare else call.node * 100),
                    Name(b"d", call.node * 50, DIRECTORY),
                ]
                if call.bare:
                    names = [name if name.kind == DIRECTORY else Name(name.name) for name in names]
                asked.answer(*piece_of(placed(names), call.after))
            else:
                asked.fail(2)

    def read(self, node: int) -> list[Shown]:
        ask(self.script, 0, node=node)
        self.answer_all()
        return shown(self.script.answers[-1][2])

    def look_up(self, name: bytes, node: int = D) -> list[tuple[Any, ...]]:
        look_up(self.script, name, node)
        self.answer_all()
        return self.script.answers


def test_who_reads_a_directory_is_given_names_and_directories() -> None:
    it = Bare()
    assert it.listed == [(D, True)]
    assert {record.name for record in it.read(D) if record.node} == set()  # the directory was given already


def test_the_first_name_that_is_looked_up_brings_all_of_it() -> None:
    it = Bare()
    for number in range(20):
        ((kind, _, reply),) = it.look_up(b"name-%d" % number)
        assert (kind, reply) == ("reply", numbered(20, D * 100)[number].entry)
    assert it.listed == [(D, True), (D, False)]


def test_what_is_not_there_needs_no_more_than_names() -> None:
    it = Bare()
    ((kind, _, reply),) = it.look_up(b"absent")
    assert (kind, reply) == ("reply", bodies.ABSENT)
    assert it.listed == [(D, True)]


def test_from_then_on_directories_come_whole_until_nobody_reads_any() -> None:
    it = Bare()
    it.look_up(b"name-1")
    for node in range(10, 20):
        it.now += listing.WHOLE / 2
        it.read(node)
    assert it.listed[2:] == [(node, False) for node in range(10, 20)]
    it.now += listing.WHOLE
    it.read(20)
    assert it.listed[-1] == (20, True)


def test_a_directory_that_cannot_be_listed_again_is_asked_by_name() -> None:
    it = Bare()
    uniques = [look_up(it.script, b"name-1")]
    (asked,) = it.script.link.asked
    assert isinstance(asked.call, ListEntries)
    it.script.take().fail(13)
    uniques += [look_up(it.script, b"name-%d" % number) for number in (2, 3)]
    assert [asked.call.unique for asked in calls(it.script, Lookup)] == uniques  # type: ignore[attr-defined]


# --- names alone, which the kernel keeps -----------------------------------------------------------------

FOLDERS = [Name(b"folder-%02d" % number, 10 + number, DIRECTORY) for number in range(30)]


class Found:
    """All that find(1) has left: the kernel keeps the names of ``D`` and of the folders in it, 20 files in each."""

    def __init__(self, files: int = 20, piece: int = 1000) -> None:
        self.script = Script()
        self.now = 100.0
        self.script.volume.listings._clock = lambda: self.now
        self.files, self.piece = files, piece
        self.listed: list[tuple[int, bool]] = []
        for node in (D, *(folder.node for folder in FOLDERS)):
            self.read(node)
        self.settle()
        self.listed.clear()
        self.now += listing.WHOLE

    def names(self, node: int) -> list[Name]:
        return FOLDERS if node == D else numbered(self.files, node * 100)

    def settle(self) -> list[int]:
        """The host and the kernel do as they are told; returns whose pages were dropped."""
        dropped = []
        while self.script.link.asked or self.script.notifier.sequences or self.script.notifier.waiting:
            while self.script.link.asked:
                self.answer(self.script.take())
            for sequence, then in self.script.notifier.sequences[:]:
                dropped += [node for node, offset in parse(sequence) if offset == 0]
                del self.script.notifier.sequences[0]
                then()
            while self.script.notifier.waiting:
                dropped.append(self.script.notifier.waiting[0][0])
                self.script.notifier.finish()
        return dropped

    def answer(self, asked: Asked) -> None:
        call: Any = asked.call
        if not isinstance(call, ListEntries):
            asked.fail(2)
            return
        self.listed.append((call.node, call.bare))
        names = [
            name if name.kind == DIRECTORY or not call.bare else Name(name.name)
            for name in self.names(call.node)
        ]
        asked.answer(*piece_of(placed(names), call.after, self.piece))

    def read(self, node: int, off: int = 0) -> list[Shown]:
        """To its end, as the kernel does that has no pages of it."""
        found: list[Shown] = []
        while True:
            ask(self.script, off, node=node)
            while self.script.link.asked:
                self.answer(self.script.take())
            if not (page := shown(self.script.answers[-1][2])):
                return found
            found += page
            off = found[-1].off

    def look_up(self, node: int, count: int) -> None:
        for name in placed(self.names(node))[:count]:
            look_up(self.script, name[1].name, node)
            while self.script.link.asked:
                self.answer(self.script.take())


def test_who_looks_at_all_files_of_a_directory_gets_the_next_ones_whole() -> None:
    it = Found()
    first, *others = [folder.node for folder in FOLDERS]
    it.look_up(first, 20)
    dropped = it.settle()
    assert set(others[:4]) <= set(dropped)
    assert first not in dropped
    assert len(dropped) == len(set(dropped)) == bare.USUAL
    for node in others:
        if node not in dropped:
            it.look_up(node, 20)  # its turn had not come: that one is read from the kernel's pages
        else:
            assert all(record.node for record in it.read(node)[2:])
        dropped += it.settle()
    assert sorted(dropped) == sorted(set(dropped)) == others
    assert sorted(it.listed) == [(folder.node, False) for folder in FOLDERS]


def test_one_who_looks_at_a_file_here_and_there_leaves_all_pages_as_they_are() -> None:
    it = Found()
    for folder in FOLDERS:
        it.look_up(folder.node, bare.FEW - 1)
        it.now += listing.WHOLE
    assert it.settle() == []


def test_who_has_the_names_himself_has_few_pages_dropped() -> None:
    """git(1) has an index: it looks up all names of a directory, and the next directory it does not read either."""
    it = Found()
    for folder in FOLDERS:
        it.look_up(folder.node, 20)
    dropped = it.settle()
    assert bare.USUAL < len(dropped) < len(FOLDERS)
    assert it.script.volume.listings._bare.room == bare.FEWEST


def test_of_a_large_directory_the_rest_comes_whole() -> None:
    it = Found(files=300, piece=100)
    first = FOLDERS[0].node
    it.look_up(first, bare.FEW)
    assert first in it.settle()
    after = placed(it.names(first))[99][0]
    assert [record.node for record in it.read(first, after)] == [
        name.node for _, name in placed(it.names(first))[100:]
    ]


@pytest.mark.parametrize("asks", ["a label", "an ACL", "names"])
def test_what_ls_is_about_to_list_is_dropped_before_it_does(asks: str) -> None:
    it = Found()
    node = FOLDERS[7].node

    def ask_as_ls_does(node: int) -> int:
        if asks == "names":
            return it.script.request(Opcode.LISTXATTR, pack("II", 152, 0), node=node)
        name = b"security.selinux\0" if asks == "a label" else b"system.posix_acl_access\0"
        return it.script.request(Opcode.GETXATTR, pack("II", 0, 0) + name, node=node)

    unique = ask_as_ls_does(node)
    assert it.script.answers == []
    if asks == "names":
        it.script.notifier.finish()
        it.answer(it.script.link.asked.pop())  # what the host says of them does not matter
    assert it.settle() == ([] if asks == "names" else [node])
    assert [answer[:2] for answer in it.script.answers if answer[0] == "fail"] == [("fail", unique)]
    assert it.listed == [(node, False)]
    assert all(record.node for record in it.read(node)[2:])
    assert it.listed == [(node, False)]
    assert it.settle() == []  # it may be the only one


def test_ls_of_a_tree_finds_the_first_directory_in_it_whole() -> None:
    it = Found()
    unique = it.script.request(Opcode.GETXATTR, pack("II", 0, 0) + b"security.selinux\0", node=D)
    first = placed(FOLDERS)[0][1].node
    assert sorted(it.settle()) == sorted({FOLDERS[0].node, first})
    assert it.script.answers[-1][:2] == ("fail", unique)
    for folder in FOLDERS:
        assert all(record.node for record in it.read(folder.node)[2:])
        it.settle()


def test_ls_does_not_wait_for_long() -> None:
    it = Found()
    it.script.request(Opcode.GETXATTR, pack("II", 0, 0) + b"security.selinux\0", node=FOLDERS[7].node)
    assert it.script.answers == []
    assert it.script.timers.fire() <= 0.1
    assert it.script.answers[-1][0] == "fail"
    assert it.settle() == [FOLDERS[7].node]


def test_of_what_has_changed_since_nothing_needs_to_be_dropped() -> None:
    it = Found()
    for folder in FOLDERS[1:]:
        it.script.volume.take_back(Changed(7, directories=[folder.node], above=[D]))
    it.settle()
    it.look_up(FOLDERS[0].node, 20)
    assert it.settle() == []


# --- a host that is far away -------------------------------------------------------------------------


def answer_some(script: Script, below: dict[int, list[Name]]) -> list[tuple[int, bool]]:
    """All that is asked now, but not what is asked then: which directories, and whether names alone."""
    listed = []
    for asked in list(script.link.asked):
        script.link.asked.remove(asked)
        call: Any = asked.call
        if isinstance(call, ListEntries):
            listed.append((call.node, call.bare))
            names = [
                name if name.kind == DIRECTORY or not call.bare else Name(name.name)
                for name in below.get(call.node, [])
            ]
            asked.answer(*piece_of(placed(names), call.after))
        elif isinstance(call, GetAttributes):
            asked.answer(Attributes(FOLDER, promise=PROMISED_ATTRIBUTES))
        else:
            asked.fail(2)
    return listed


BELOW = {
    ROOT: [Name(b"a", 2, DIRECTORY), Name(b"b", 3, DIRECTORY)],
    2: [Name(b"c", 4, DIRECTORY), Name(b"f", 9)],
    3: numbered(3, 300),
    4: numbered(3, 400),
}


def test_what_a_path_leads_through_comes_with_the_session() -> None:
    script = Script(round_trip=0.1)
    script.volume.look_around()
    assert [type(asked.call) for asked in script.link.asked] == [GetAttributes]
    answer_some(script, BELOW)
    assert answer_some(script, BELOW) == [(ROOT, True)]
    assert answer_some(script, BELOW) == [(2, True), (3, True)]
    assert answer_some(script, BELOW) == [(4, True)]
    unique = look_up(script, b"a", ROOT)
    assert script.answers[-1][:2] == ("reply", unique)
    unique = script.request(Opcode.GETATTR, pack("IIQ", 0, 0, 0), ROOT)
    assert script.answers[-1][:2] == ("reply", unique)
    assert not script.link.asked


def test_of_a_host_that_is_near_only_its_distance_is_measured() -> None:
    script = Script(round_trip=0.001)
    script.volume.look_around()
    answer_some(script, BELOW)
    assert not script.link.asked
    script = Script()
    script.volume.look_around()
    assert not script.link.asked, "and of one that cannot be far not even that"


def test_a_host_that_goes_while_it_is_looked_at_is_nobodys_trouble() -> None:
    script = Script(round_trip=0.1)
    script.volume.look_around()
    script.take().fail(5)
    assert not script.link.asked


def test_with_a_directory_comes_what_is_below_it() -> None:
    script = Script(round_trip=0.1)
    ask(script, 0, node=ROOT)
    assert answer_some(script, BELOW) == [(ROOT, True)]
    assert answer_some(script, BELOW) == [(2, True), (3, True)]


def test_the_first_name_that_is_looked_up_brings_the_directories_that_follow_whole() -> None:
    script = Script(round_trip=0.1)
    below = {ROOT: [Name(b"d%d" % node, node, DIRECTORY) for node in range(2, 6)]}
    below.update({node: numbered(3, 100 * node) for node in range(2, 6)})
    ask(script, 0, node=ROOT)
    answer_some(script, below)
    answer_some(script, below)
    first, second, *others = (name.node for _, name in placed(below[ROOT]))
    ask(script, 0, node=first)
    unique = look_up(script, b"name-1", first)
    assert answer_some(script, below) == [(node, False) for node in (first, second, *others)]
    assert script.answers[-1] == ("reply", unique, below[first][1].entry)
    look_up(script, b"name-1", second)
    assert not script.link.asked


def test_of_a_far_host_a_directory_is_listed_beside_the_first_lookup_in_it() -> None:
    """Once: if that does not help, it is as with any other."""
    near, far = Script(round_trip=0.001), Script(round_trip=0.1)
    for script, listings in ((near, 0), (far, 1)):
        look_up(script, b"HEAD")
        assert len(calls(script, Lookup)) == 1
        assert [asked.call.bare for asked in calls(script, ListEntries)] == [False] * listings
    Directory(NAMES, 1000).answer(calls(far, ListEntries)[0])
    far.link.asked.clear()
    unique = look_up(far, b"not there")
    assert far.answers == replied(unique, bodies.ABSENT)
    hopeless = Script(round_trip=0.1)
    look_up(hopeless, b"HEAD")
    unpromised(NAMES).answer(calls(hopeless, ListEntries)[0])
    hopeless.link.asked.clear()
    look_up(hopeless, b"HEAD")
    assert not calls(hopeless, ListEntries)


def test_what_is_below_stays_when_a_directory_is_listed_once_more() -> None:
    """Names first, and then all of it: the directories in it have come twice before one lookup is given back."""
    script = Script(round_trip=0.1)
    names = [Name(b"below", 50, DIRECTORY), Name(b"file")]
    below, file = Directory(numbered(3)), names[1].name
    script.volume.listings._list_ahead(D, 0, bare=True)
    Directory(names).answer(script.take())
    script.volume.listings._list_ahead(50, 0)
    coming = calls(script, ListEntries)[-1]
    look_up(script, file)
    whole = [asked for asked in calls(script, ListEntries) if asked.call.node == D]
    Directory([names[0], Name(file, 51)]).answer(whole[-1])
    below.answer(coming)
    script.link.asked.clear()
    look_up(script, b"below")
    look_up(script, numbered(3)[0].name, 50)
    assert not script.link.asked


# --- names that the guest has removed ----------------------------------------------------------------


def removed(script: Script, promise: int = NAME) -> None:
    script.request(Opcode.UNLINK, b"lock\0", D)
    script.take().answer(Removed(promise=promise))
    script.answers  # noqa: B018  (what was said so far)


def test_that_it_is_gone_the_host_need_not_be_asked() -> None:
    script = Script()
    removed(script)
    unique = look_up(script, b"lock")
    assert script.answers == replied(unique, bodies.ABSENT)
    look_up(script, b"other")
    assert len(calls(script, Lookup)) == 1


@pytest.mark.parametrize(("gone", "promise", "asked"), [(True, NAME, 0), (True, 0, 1), (False, NAME, 1)])
def test_nor_for_the_old_name_of_a_file(gone: bool, promise: int, asked: int) -> None:
    script = Script()
    script.volume.renamed((D, b"lock"), (D, b"f"), Renamed(9, promise, True, gone=gone))
    look_up(script, b"lock")
    assert len(calls(script, Lookup)) == asked


REMADE: dict[str, Callable[[Script], object]] = {
    "made again": lambda script: script.volume.name_changed(D, b"lock", b"", NameChange.MADE),
    "renamed to": lambda script: script.volume.renamed((D, b"x"), (D, b"lock"), Renamed(9)),
    "news of the name": lambda script: script.volume.take_back(Changed(7, [D], [b"lock"])),
    "news of the directory": lambda script: script.volume.take_back(Changed(7, directories=[D], above=[0])),
    "the directory is forgotten": lambda script: script.request(Opcode.FORGET, pack("Q", 1), D),
    "the session ends": lambda script: script.volume.void(),
}


@pytest.mark.parametrize("change", REMADE.values(), ids=REMADE)
def test_until_that_may_not_be_so(change: Callable[[Script], object]) -> None:
    script = Script()
    removed(script)
    change(script)
    script.answers  # noqa: B018  (what was said so far)
    look_up(script, b"lock")
    assert len(calls(script, Lookup)) == 1


def test_it_is_not_believed_without_a_promise_or_of_two_mounts() -> None:
    script = Script()
    removed(script, promise=0)
    look_up(script, b"lock")
    assert len(calls(script, Lookup)) == 1
    script = Script()
    removed(script)
    Volume(7, script.host, script.notifier, script.timers, salt=1, volumes=script.volumes)  # type: ignore[arg-type]
    look_up(script, b"lock")
    assert len(calls(script, Lookup)) == 1


def test_what_is_remembered_of_them_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directories, "MAX_GONE", 3)
    monkeypatch.setattr(directories, "MAX_GONE_OF_ONE", 2)
    known = Script().volume.listings.directories
    for node in range(10, 15):
        for name in b"a", b"b", b"c":
            known.gone(node, name)
    assert [known.lookup(node, b"a") for node in range(10, 15)] == [None, None, b"", b"", b""]
    assert [known.lookup(14, name) for name in (b"b", b"c")] == [b"", None]


# --- what the kernel keeps of it ---------------------------------------------------------------------


def finish(script: Script, directory: Directory, node: int = D) -> int:
    """Read to the end, and ask for more; returns the unique of that."""
    reader, off = Reader(script, directory, node), 0
    while page := reader.read(off, 1_000_000):
        off = page[-1].off
        if not directory.names or off == directory.names[-1][0]:
            break
    script.answers  # noqa: B018  (what was said so far)
    return ask(script, off, node=node)


@pytest.mark.parametrize("names", [NAMES, []])
def test_a_promised_listing_costs_no_notification(names: list[Name]) -> None:
    script = Script()
    unique = finish(script, Directory(names, 1000))
    assert script.answers == replied(unique)
    assert not script.notifier.waiting


@pytest.mark.parametrize("names", [NAMES, []])
def test_one_that_is_not_promised_is_dropped_before_its_end_is_said(names: list[Name]) -> None:
    script = Script()
    unique = finish(script, unpromised(names, 1000))
    assert script.answers == []
    script.notifier.finish()
    assert script.answers == [("dropped", 5), *replied(unique)]
    # That was it: the kernel has nothing more of it, and the next may be promised.
    unique = finish(script, Directory(names, 1000))
    assert script.answers == replied(unique)


def test_one_piece_without_a_promise_is_enough() -> None:
    script = Script()
    off = Reader(script, unpromised(NAMES)).read(0)[-1].off
    while not script.notifier.waiting:
        ask(script, off)
        while script.link.asked:
            Directory(NAMES).answer(script.take())
        for _, _, reply in script.answers:
            off = shown(reply)[-1].off
    assert off == ALL[-1].off


def test_what_another_stream_was_given_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has filled the kernel's pages up to somewhere, and this one may fill the rest."""
    monkeypatch.setattr(directories, "MAX_HELD", 0)  # and nothing here remembers its pieces
    script = Script()
    Reader(script, unpromised(NAMES)).read(0)
    Reader(script, Directory(NAMES), node=6).read(0)
    finish(script, Directory(NAMES, 1000))
    assert [node for node, _ in script.notifier.waiting] == [5]


def test_what_is_given_during_a_drop_is_dropped_too() -> None:
    script = Script()
    directory = unpromised(NAMES, 1000)
    unique = finish(script, directory)
    ask(script, 0)
    directory.answer(script.take())
    assert len(script.answers) == 1
    script.notifier.finish()
    assert script.answers == [("dropped", 5)]
    script.notifier.finish()
    assert script.answers == [("dropped", 5), *replied(unique)]


def test_nothing_is_given_of_what_has_changed() -> None:
    script = Script()
    directory = Directory(NAMES, 1000)
    reader = Reader(script, directory)
    page = reader.read(0)
    directory.names = [(off, Name(b"changed", 1)) for off, _ in directory.names]
    script.volume.take_back(Changed(7, directories=[D, 6], above=[0, 0]))
    assert {record.name for record in reader.read_all(page[-1].off)} == {b"changed"}


def test_of_a_predecessors_mount_each_directory_is_dropped_once() -> None:
    script = Script(inherited=True)
    directory = Directory(NAMES, 1000)
    for node in (5, 6):
        unique = finish(script, directory, node)
        assert script.answers == []
        script.notifier.finish()
        assert script.answers == [("dropped", node), *replied(unique)]
    unique = finish(script, directory)
    assert script.answers == replied(unique)


def test_what_is_remembered_to_be_dropped_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "MAX_LOOSE", 3)
    script = Script()
    for node in range(100, 105):
        ask(script, 0, node=node)
        unpromised(NAMES).answer(script.take())
    assert [node for node, _ in script.notifier.waiting] == [100, 101]
    while script.notifier.waiting:
        script.notifier.finish()
    for node in (100, 104):
        finish(script, Directory(NAMES, 1000), node)
    assert [node for node, _ in script.notifier.waiting] == [104]


# --- what the host should not do ---------------------------------------------------------------------


@pytest.mark.parametrize("cut", [1, 21, 100])
def test_a_listing_that_is_none_is_an_error(cut: int) -> None:
    script = Script()
    unique = ask(script, 0)
    answer, data = piece_of(placed(NAMES), 0)
    script.take().answer(answer, data[:-cut])
    assert script.answers == failed(unique, "EIO")


def test_an_error_of_the_host_is_the_readers() -> None:
    script = Script()
    unique = ask(script, 0)
    asked = script.take()
    assert asked.call == ListEntries(7, unique, D, 0, bare=True)
    asked.fail(13)
    assert script.answers == failed(unique, "EACCES")


def test_a_listing_of_nothing_is_the_end() -> None:
    script = Script()
    ask(script, 0)
    script.take().answer(Listing(0, False))
    off = shown(script.answers[-1][2])[-1].off
    unique = ask(script, off)
    script.notifier.finish()
    assert script.answers[-1:] == replied(unique)
