from __future__ import annotations

import stat

import pytest

from fileserver import nodes
from fileserver.nodes import Identity, Node, NodeTable, RestoredNode
from protocol.files import ROOT
from tests.fileserver.served import Journal, refused

DIRECTORY, FILE = stat.S_IFDIR, stat.S_IFREG


class Table(NodeTable):
    """With the journal at hand, and files that are named by their inode numbers."""

    def __init__(self, sealed: frozenset[tuple[int, int]] = frozenset()) -> None:
        self.journal = Journal()
        super().__init__(self.journal, None, sealed)
        self.root_is((1, 2, 0), DIRECTORY)

    def put(self, ino: int, directory: Node, name: bytes, kind: int = FILE) -> Node:
        node = self.found((1, ino, 0), kind)
        self.name(node, directory, name, only=kind == DIRECTORY)
        self.count(node)
        return node

    def links(self, node: Node) -> list[tuple[int, bytes]]:
        """As the table and the journal say, which is the same."""
        assert self.journal.records[node.number].links == list(node.links)
        assert all(self.by_name[link] is node for link in node.links)
        return list(node.links)


def test_a_number_is_never_used_again() -> None:
    table = Table()
    first = table.put(10, table.root, b"a")
    table.forget(first.number, 1)
    second = table.put(10, table.root, b"a")
    assert second.number > first.number > ROOT
    assert first.number not in table.by_number


def test_two_names_of_one_file_are_one_node() -> None:
    table = Table()
    node = table.put(10, table.root, b"a")
    assert table.put(10, table.root, b"b") is node
    assert table.links(node) == [(ROOT, b"a"), (ROOT, b"b")]
    assert node.lookups == 2


def test_a_directory_has_one_name() -> None:
    table = Table()
    node = table.put(10, table.root, b"a", DIRECTORY)
    table.put(10, table.root, b"b", DIRECTORY)
    assert table.links(node) == [(ROOT, b"b")]


def test_only_so_many_names_are_remembered() -> None:
    table = Table()
    for index in range(nodes.MAX_LINKS + 5):
        node = table.put(10, table.root, b"%d" % index)
    assert len(table.links(node)) == nodes.MAX_LINKS
    assert table.links(node)[-1] == (ROOT, b"%d" % (nodes.MAX_LINKS + 4))


def test_a_name_that_means_another_file_now() -> None:
    table = Table()
    old = table.put(10, table.root, b"a")
    new = table.put(11, table.root, b"a")
    assert (table.links(old), table.links(new)) == ([], [(ROOT, b"a")])


def test_a_directory_forgotten_before_what_is_in_it_is_kept_for_that() -> None:
    table = Table()
    outer = table.put(10, table.root, b"outer", DIRECTORY)
    inner = table.put(11, outer, b"inner", DIRECTORY)
    file = table.put(12, inner, b"file")
    table.forget(outer.number, 1)
    table.forget(inner.number, 1)
    assert set(table.by_number) == {ROOT, outer.number, inner.number, file.number}
    table.forget(file.number, 1)
    assert set(table.by_number) == {ROOT}
    assert set(table.dropped) == {outer, inner, file}
    assert set(table.journal.records) == {ROOT}
    assert table.root.below == 0


def test_a_shelved_directory_that_is_looked_up_again_is_recorded_again() -> None:
    table = Table()
    outer = table.put(10, table.root, b"outer", DIRECTORY)
    table.put(12, outer, b"file")
    table.forget(outer.number, 1)
    assert outer.number not in table.journal.records
    assert table.put(10, table.root, b"outer", DIRECTORY) is outer
    assert table.links(outer) == [(ROOT, b"outer")]


def test_lookups_are_given_back_in_any_portion_and_never_too_many() -> None:
    table = Table()
    for _ in range(5):
        node = table.put(10, table.root, b"a")
    table.forget(node.number, 3)
    assert table.journal.records[node.number].lookups == 2
    table.forget(node.number, -1)
    table.forget(node.number, 0)
    table.forget(ROOT, 1)
    table.forget(999, 1)
    assert node.lookups == 2
    table.forget(node.number, 1 << 60)
    assert node.dead


def test_renaming_a_directory_leaves_what_is_in_it_alone() -> None:
    table = Table()
    a = table.put(10, table.root, b"a", DIRECTORY)
    b = table.put(11, table.root, b"b", DIRECTORY)
    file = table.put(12, a, b"file")
    assert table.moved((ROOT, b"a"), (b.number, b"moved"), b, exchange=False) is None
    assert table.links(a) == [(b.number, b"moved")]
    assert table.links(file) == [(a.number, b"file")]
    assert (table.root.below, b.below) == (1, 1)


def test_renaming_over_a_file_takes_its_name() -> None:
    table = Table()
    a, b = table.put(10, table.root, b"a"), table.put(11, table.root, b"b")
    assert table.moved((ROOT, b"a"), (ROOT, b"b"), table.root, exchange=False) is b
    assert (table.links(a), table.links(b)) == ([(ROOT, b"b")], [])


def test_renaming_what_is_not_known() -> None:
    table = Table()
    b = table.put(11, table.root, b"b")
    assert table.moved((ROOT, b"a"), (ROOT, b"b"), table.root, exchange=False) is b
    assert table.links(b) == []


def test_exchanging_names_across_directories() -> None:
    table = Table()
    directory = table.put(9, table.root, b"d", DIRECTORY)
    a, b = table.put(10, table.root, b"a"), table.put(11, directory, b"b")
    table.moved((ROOT, b"a"), (directory.number, b"b"), directory, exchange=True)
    assert (table.links(a), table.links(b)) == ([(directory.number, b"b")], [(ROOT, b"a")])
    assert (table.root.below, directory.below) == (2, 1)


def test_renaming_one_name_of_a_file_to_another_of_the_same_file_does_nothing() -> None:
    table = Table()
    node = table.put(10, table.root, b"a")
    table.put(10, table.root, b"b")
    assert table.moved((ROOT, b"a"), (ROOT, b"b"), table.root, exchange=False) is None
    assert table.links(node) == [(ROOT, b"a"), (ROOT, b"b")]


def test_there_is_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "MAX_NODES", 2)
    table = Table()
    node = table.put(10, table.root, b"a")
    assert refused(lambda: table.put(11, table.root, b"b")) == "ENFILE"
    assert table.put(10, table.root, b"a") is node


def test_sealed_is_told_by_device_and_inode() -> None:
    table = Table(frozenset({(1, 10)}))
    assert table.put(10, table.root, b"a", DIRECTORY).sealed
    assert not table.put(11, table.root, b"b", DIRECTORY).sealed


def test_another_root_abandons_everything() -> None:
    table = Table()
    directory = table.put(10, table.root, b"d", DIRECTORY)
    file = table.put(11, directory, b"f")
    assert set(table.abandon()) == {directory, file}
    assert directory.dead
    assert file.dead
    again = table.put(10, table.root, b"d", DIRECTORY)
    assert again.number not in (directory.number, file.number)
    table.forget(file.number, 1)
    table.forget(directory.number, 1)
    assert table.links(again) == [(ROOT, b"d")]
    assert table.by_key[again.key] is again


def test_restored_nodes_are_what_the_journal_said() -> None:
    before = Table()
    directory = before.put(10, before.root, b"d", DIRECTORY)
    file = before.put(11, directory, b"f")
    before.put(11, before.root, b"g")
    after = Table()
    after.restore(before.journal.restored())
    found = after.by_number[file.number]
    assert (found.key, found.links, found.lookups) == (file.key, file.links, 2)
    assert after.by_number[directory.number].below == 1
    assert after.root.below == 2
    assert after.put(99, after.root, b"new").number > file.number


def test_nothing_forged_is_restored() -> None:
    table = Table()
    identity = Identity(1, 50, 0)
    table.restore([RestoredNode(ROOT, 5, identity, [(ROOT, b"x")]), RestoredNode(7, 0, identity, [])])
    assert set(table.by_number) == {ROOT}
    table.restore([RestoredNode(7, 1, identity, [(0, b"")])])
    assert table.by_number[7].links == ()
