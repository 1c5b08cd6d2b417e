"""Names of extended attributes: what is asked, for whom, and until when the answer is believed."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from guest_agent.fuse import xattrs
from guest_agent.fuse.abi import Opcode
from protocol.files import ATTRIBUTES, Attributes, Changed, GetXattr, ListXattr, SetXattr, XattrNames
from tests.guest_agent.fuse.script import ATTRIBUTES as ATTR
from tests.guest_agent.fuse.script import Script, pack, replied

DIRECTORY = [3, 5, 0, 7, 9]
"""Nodes of names in the order of the directory; of one nothing is known."""
ROOM = pack("II", 256, 0)


def script() -> Script:
    made = Script()
    made.volume.xattrs._beside = lambda node: DIRECTORY
    return made


def listed(it: Script, node: int) -> object:
    """What the kernel is told at once; None if the host is asked."""
    before = len(it.link.asked)
    it.request(Opcode.LISTXATTR, ROOM, node=node)
    return it.answers[-1][2] if len(it.link.asked) == before else None


def test_one_question_for_all_that_is_beside() -> None:
    it = script()
    unique = it.request(Opcode.LISTXATTR, ROOM, node=5)
    asked = it.take()
    assert asked.call == ListXattr(7, unique, 5, [7, 9, 3])
    asked.answer(XattrNames(b"user.a\0", ATTRIBUTES, [7, 3]))
    assert it.answers == replied(unique, b"user.a\0")
    assert [listed(it, node) for node in (5, 7, 3)] == [b"user.a\0", b"", b""]
    unique = it.request(Opcode.LISTXATTR, ROOM, node=9)
    assert it.take().call == ListXattr(7, unique, 9, [])


def test_what_is_beside_nothing_is_asked_for_alone() -> None:
    it = script()
    unique = it.request(Opcode.LISTXATTR, ROOM, node=8)
    assert it.take().call == ListXattr(7, unique, 8, [])


def test_what_is_not_promised_is_asked_again() -> None:
    it = script()
    it.request(Opcode.LISTXATTR, ROOM, node=5)
    it.take().answer(XattrNames(b"", 0, []))
    assert listed(it, 5) is None


def test_a_value_of_a_name_that_is_not_there_is_not_asked_for() -> None:
    it = script()
    it.request(Opcode.LISTXATTR, ROOM, node=5)
    it.take().answer(XattrNames(b"user.ab\0", ATTRIBUTES, [7]))
    it.answers.clear()
    for node, name in ((5, b"user.a"), (7, b"user.ab")):
        assert refused(it, Opcode.GETXATTR, ROOM + name + b"\0", node) == errno.ENODATA
    it.request(Opcode.GETXATTR, ROOM + b"user.ab\0", node=5)
    assert isinstance(it.take().call, GetXattr)


def refused(it: Script, opcode: Opcode, body: bytes, node: int) -> object:
    """The errno that the kernel is told at once."""
    it.request(opcode, body, node=node)
    answer = it.answers[-1]
    assert answer[0] == "fail"
    assert not it.link.asked
    return answer[2]


def test_who_looks_for_acls_and_labels_is_told_that_there_are_no_such_things() -> None:
    """ls(1) then asks for no other file's of the same mount, in each of the ways in which its versions ask."""
    it = script()
    it.request(Opcode.LISTXATTR, ROOM, node=5)
    it.take().answer(XattrNames(b"user.a\0", ATTRIBUTES, [7]))
    for name in (
        b"system.posix_acl_access",
        b"system.posix_acl_default",
        b"security.selinux",
        b"security.ima",
    ):
        assert refused(it, Opcode.GETXATTR, ROOM + name + b"\0", 5) == errno.EOPNOTSUPP
    assert refused(it, Opcode.LISTXATTR, pack("II", 152, 0), 7) == errno.EOPNOTSUPP
    for name in (b"security.capability", b"trusted.overlay.opaque"):
        assert refused(it, Opcode.GETXATTR, ROOM + name + b"\0", 5) == errno.ENODATA


def test_names_that_are_there_or_asked_for_are_told() -> None:
    it = script()
    it.request(Opcode.LISTXATTR, ROOM, node=5)
    it.take().answer(XattrNames(b"user.a\0", ATTRIBUTES, [7]))
    for room, node, told in ((152, 5, b"user.a\0"), (0, 7, pack("Q", 0)), (256, 7, b"")):
        it.request(Opcode.LISTXATTR, pack("II", room, 0), node=node)
        assert it.answers[-1][2] == told
    assert refused(it, Opcode.LISTXATTR, pack("II", 6, 0), 5) == errno.ERANGE


def own_value(it: Script) -> None:
    it.request(Opcode.SETXATTR, pack("II", 1, 0) + b"user.k\0v", node=7)
    next(asked for asked in it.link.asked if isinstance(asked.call, SetXattr)).answer()
    it.link.asked[:] = [asked for asked in it.link.asked if isinstance(asked.call, ListXattr)]


def own_mode(it: Script) -> None:
    it.request(Opcode.SETATTR, bytes(88), node=7)
    it.link.asked.pop().answer(Attributes(ATTR))


CHANGES: dict[str, Callable[[Script], None]] = {
    "told": lambda it: it.volume.take_back(Changed(7, nodes=[7], through=[1])),
    "told of attributes": lambda it: it.volume.take_back(Changed(7, attributes_only=[7])),
    "told as a directory": lambda it: it.volume.take_back(Changed(7, directories=[7], above=[1])),
    "an own value": own_value,
    "an own mode": own_mode,
    "forgotten": lambda it: it.request(Opcode.FORGET, pack("Q", 1), node=7) and None,
    "the session over": lambda it: it.volume.void(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_changes_is_asked_for(change: Callable[[Script], None]) -> None:
    it = script()
    it.request(Opcode.LISTXATTR, ROOM, node=5)
    it.take().answer(XattrNames(b"", ATTRIBUTES, [3, 7]))
    change(it)
    assert listed(it, 7) is None


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_changes_while_it_is_asked_for_is_asked_again(change: Callable[[Script], None]) -> None:
    it = script()
    it.request(Opcode.LISTXATTR, ROOM, node=5)
    change(it)
    it.take().answer(XattrNames(b"", ATTRIBUTES, [3, 7]))
    assert listed(it, 7) is None
    it.link.asked.pop().answer(XattrNames(b"", ATTRIBUTES, []))
    assert listed(it, 7) == b"", "and then it is known"


def test_what_is_known_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xattrs, "MAX_KNOWN", 2)
    it = script()
    it.request(Opcode.LISTXATTR, ROOM, node=5)
    it.take().answer(XattrNames(b"", ATTRIBUTES, [3, 7]))
    assert [listed(it, node) for node in (7, 5, 3)] == [b"", b"", None]
