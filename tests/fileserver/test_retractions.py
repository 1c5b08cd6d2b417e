"""What is said about changes, how much at once, and what of it again."""

from __future__ import annotations

import stat

from fileserver import fanotify
from fileserver.nodes import Link, Node
from fileserver.retractions import AT_ONCE, Name, Retraction, Retractions
from fileserver.watches import Changes
from protocol.files import MAX_NAME, ROOT, Changed
from protocol.frames import MAX_HEADER, encode_frame


def made(number: int, kind: int, *links: Link) -> Node:
    node = Node(number, (1, number, 0), kind, sealed=False)
    node.links = links
    return node


ROOT_NODE = made(ROOT, stat.S_IFDIR)
DIRECTORY = made(2, stat.S_IFDIR, (ROOT, b"d"))
FILE = made(3, stat.S_IFREG, (2, b"f"))
TABLE: dict[Link, Node] = {(ROOT, b"d"): DIRECTORY, (2, b"f"): FILE}


def said(changes: Changes) -> list[Changed]:
    return Retractions(TABLE).of(changes).notices(7)


def test_nothing() -> None:
    assert said(Changes()) == []


def test_names() -> None:
    FILE.base = (1, 2, 3)
    assert said(Changes(names={DIRECTORY: {b"f"}})) == [
        Changed(
            7, parents=[2], names=[b"f"], fresh=[False], nodes=[3], through=[2], directories=[2], above=[ROOT]
        )
    ]
    assert FILE.base is None, "the guest has no data of it"
    assert said(Changes(names={ROOT_NODE: {b"new"}})) == [
        Changed(7, parents=[ROOT], names=[b"new"], fresh=[True], directories=[ROOT], above=[0])
    ]
    [notice] = said(Changes(names={ROOT_NODE: {b"d"}}))
    assert (notice.directories, notice.above) == ([ROOT, 2], [0, ROOT])
    assert not notice.nodes


def test_what_has_changed_itself() -> None:
    assert said(Changes(selves={DIRECTORY})) == [Changed(7, directories=[2], above=[ROOT])]
    assert said(Changes(files={FILE: fanotify.MODIFY | fanotify.OPEN})) == [
        Changed(7, nodes=[3], through=[2])
    ]
    assert said(Changes(files={FILE: fanotify.OPEN})) == [], "that is no change"
    nameless = made(4, stat.S_IFREG)
    assert said(Changes(files={nameless: fanotify.ATTRIB})) == [Changed(7, nodes=[4], through=[0])]


def test_much_is_said_in_parts_that_fit_into_frames() -> None:
    names = [
        Name(ROOT, b"%d" % number + b"x" * (MAX_NAME - 9), None) for number in range(10**6, 10**6 + 1300)
    ]
    nodes = [(made(number, stat.S_IFREG), 1 << 62) for number in range(1 << 62, (1 << 62) + 1100)]
    told = Retraction(names, nodes, [(1 << 62, 1 << 62)] * 10, [5] * 600)
    assert told.weight == 3010
    notices = told.notices(7)
    assert len(notices) == -(-1300 // AT_ONCE)
    assert [name for notice in notices for name in notice.names] == [name.name for name in names]
    assert [node for notice in notices for node in notice.nodes] == [node.number for node, _ in nodes]
    assert [node for notice in notices for node in notice.attributes_only] == [5] * 600
    for notice in notices:
        [header, *_] = encode_frame(
            [6, "changed", [7, notice.parents, notice.names, notice.nodes, notice.through]]
        )
        assert len(header) < MAX_HEADER // 1.5


def test_what_is_said_again() -> None:
    """In another session only names that have got another file since: the guest's kernel unmounts what is there."""
    table = dict(TABLE)
    retractions = Retractions(table)
    told = Retraction(
        [Name(2, b"f", FILE), Name(ROOT, b"d", DIRECTORY), Name(ROOT, b"new", None)], [(FILE, 2)], [(2, 1)]
    )
    assert retractions.again(told) == Retraction([], told.nodes, told.directories)
    table[2, b"f"] = made(5, stat.S_IFREG, (2, b"f"))
    del table[ROOT, b"d"]
    assert retractions.again(told).names == told.names[:2]
