"""What the host tells of what has changed: it answers what the kernel asks next, and nothing that is older than a change."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from guest_agent.fuse import bodies
from guest_agent.fuse.abi import Opcode
from guest_agent.fuse.directories import NameChange
from guest_agent.fuse.renewals import MAX_HELD, Known, Renewals
from guest_agent.fuse.volume import Volume
from protocol.files import ATTRIBUTES, NAME, Attributes, Changed, Forget, GetAttributes, Lookup, Read, Renewed
from tests.guest_agent.fuse.script import ATTRIBUTES as FILE
from tests.guest_agent.fuse.script import Script, pack, replied
from tests.guest_agent.fuse.test_volume import DIRECTORY

ALL = NAME | ATTRIBUTES
READ = pack("QQIIQII", 0, 0, 4096, 0, 0, 0, 0)
GETATTR = pack("IIQ", 0, 0, 0)

RENEWED = Renewed(7, [5, 9], [DIRECTORY, FILE], [5], [b"name"], [9], [9], [b"content"])
"""Directory 5 has other attributes, and \"name\" in it is file 9."""


def renewed() -> Script:
    it = Script()
    it.volume.take_back(Changed(7, [5], [b"name"], directories=[5], above=[1]))
    it.volume.renew(RENEWED)
    return it


def given_back(it: Script) -> list[int]:
    """Of the nodes of which the host is told that lookups are not used."""
    while it.timers.waiting:
        it.timers.fire()
    return [node for call in it.link.calls if isinstance(call, Forget) for node in call.nodes]


def test_all_that_is_asked_next_is_answered() -> None:
    it = renewed()
    unique = it.request(Opcode.GETATTR, GETATTR)
    assert it.answers == replied(unique, bodies.attr_out(DIRECTORY, ALL))
    unique = it.request(Opcode.LOOKUP, b"name\0")
    assert it.answers == replied(unique, bodies.entry_out(9, FILE, ALL))
    unique = it.request(Opcode.READ, READ, node=9)
    assert it.answers == replied(unique, b"content")
    assert not it.link.asked
    it.request(Opcode.LOOKUP, b"name\0")
    assert it.take().call == Lookup(7, 8, 5, b"name"), "the lookup was the kernel's once"
    assert given_back(it) == []


TAKEN_BACK: dict[str, Callable[[Volume], None]] = {
    "the host's word about the name": lambda volume: volume.take_back(Changed(7, [5], [b"name"])),
    "about another name there": lambda volume: volume.take_back(Changed(7, [5], [b"other"], directories=[5])),
    "about the file": lambda volume: volume.take_back(Changed(7, nodes=[9], through=[5])),
    "about a name in it, if it is a directory": lambda volume: volume.take_back(Changed(7, [9], [b"inner"])),
    "about it, if it is a directory": lambda volume: volume.take_back(Changed(7, directories=[9], above=[5])),
    "an own change of names": lambda volume: volume.name_changed(5, b"name", b"", NameChange.MADE),
    "an own write": lambda volume: volume.data_changed(9),
    "the end of the session": lambda volume: volume.void(),
}


@pytest.mark.parametrize("change", TAKEN_BACK.values(), ids=TAKEN_BACK)
def test_nothing_outlives_what_is_newer(change: Callable[[Volume], None]) -> None:
    it = renewed()
    change(it.volume)
    assert given_back(it) == [9]
    it.link.asked.clear()
    unique = it.request(Opcode.LOOKUP, b"name\0")
    assert it.take().call == Lookup(7, unique, 5, b"name")


@pytest.mark.parametrize(
    "change",
    [
        lambda volume: volume.take_back(Changed(7, nodes=[8], through=[5])),
        lambda volume: volume.data_changed(8),
        lambda volume: volume.void(),
    ],
    ids=["the host's word", "an own change", "the end of the session"],
)
def test_of_a_file_that_the_kernel_has(change: Callable[[Volume], None]) -> None:
    it = Script()
    it.volume.renew(Renewed(7, [8], [FILE], files=[8], contents=[b"content"]))
    unique = it.request(Opcode.GETATTR, GETATTR, node=8)
    assert it.answers == replied(unique, bodies.attr_out(FILE, ALL))
    change(it.volume)
    unique = it.request(Opcode.GETATTR, GETATTR, node=8)
    it.take().answer(Attributes(FILE))
    unique = it.request(Opcode.READ, READ, node=8)
    assert it.take().call == Read(7, unique, 8, 0, 4096)


def test_what_the_kernel_has_forgotten_is_asked_for() -> None:
    it = Script()
    it.volume.renew(Renewed(7, [8], [FILE]))
    it.request(Opcode.FORGET, pack("Q", 1), node=8)
    unique = it.request(Opcode.GETATTR, GETATTR, node=8)
    assert GetAttributes(7, unique, 8) in it.link.calls


def test_a_drop_that_is_waited_for_comes_first() -> None:
    it = renewed()
    it.volume.drop(9).begin(lambda _: None)
    unique = it.request(Opcode.LOOKUP, b"name\0")
    assert Lookup(7, unique, 5, b"name") in it.link.calls
    assert given_back(it) == [9]


def test_with_several_volumes_nothing_is_kept() -> None:
    it = Script()
    Volume(7, it.host, it.notifier, it.timers, salt=1, volumes=it.volumes)  # type: ignore[arg-type]
    it.volume.renew(RENEWED)
    assert given_back(it) == [9]
    it.link.asked.clear()
    it.request(Opcode.GETATTR, GETATTR)
    it.request(Opcode.READ, READ, node=9)
    assert len(it.link.asked) == 2


def test_there_are_not_too_many() -> None:
    back: list[int] = []
    renewals = Renewals(back.extend)
    for number in range(MAX_HELD + 2):
        renewals.add(5, b"%d" % number, Known(100 + number, FILE))
    assert back == [100, 101]
    renewals.add(5, b"9", Known(100, FILE))
    assert back == [100, 101, 109], "the same name once more"
    assert renewals.take(5, b"9") == Known(100, FILE)
    assert renewals.take(5, b"9") is None
