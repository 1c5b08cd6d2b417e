"""What is written to the kernel when a promise ends, and that the kernel then asks again."""

from __future__ import annotations

import struct
from collections.abc import Callable
from itertools import chain
from typing import TYPE_CHECKING, Any

import pytest

from guest_agent.fuse import abi, promises
from guest_agent.fuse.promises import BARRIER, MAX_SEQUENCE, MAX_UNDER_WAY, SETTLED, Promises
from protocol.errors import RemoteProtocolError
from protocol.files import Changed

if TYPE_CHECKING:
    from tests.guest_agent.fuse.conftest import Place, Server

# --- sequences -----------------------------------------------------------------------------------------


def parse(sequence: bytes) -> list[tuple[Any, ...]]:
    """(parent, name) of INVAL_ENTRY, with ``expire`` behind it if so; (node, offset) of INVAL_INODE."""
    parsed: list[tuple[Any, ...]] = []
    while sequence:
        length, code = struct.unpack_from("<Ii", sequence)
        one, sequence = sequence[:length], sequence[length:]
        if code == abi.Notify.INVAL_ENTRY:
            parent, size, flags = struct.unpack_from("<QII", one, 16)
            assert one[32:] == one[32 : 32 + size] + b"\0"
            parsed.append((parent, one[32:-1], "expire") if flags else (parent, one[32:-1]))
        else:
            node, offset, size = struct.unpack_from("<Qqq", one, 16)
            assert (code, size) == (abi.Notify.INVAL_INODE, 0)
            parsed.append((node, offset))
    return parsed


class Written:
    """A writer that a test lets finish, and a clock that it sets."""

    def __init__(self) -> None:
        self.waiting: list[tuple[bytes, Callable[[], None]]] = []
        self.now = 100.0
        self.promises = Promises(self, lambda: self.now)

    def sequence(self, notifications: bytes, then: Callable[[], None]) -> None:
        self.waiting.append((notifications, then))

    def take(self) -> list[tuple[Any, ...]]:
        """The oldest sequence; it is done."""
        notifications, then = self.waiting.pop(0)
        then()
        return parse(notifications)

    def take_all(self) -> list[list[tuple[Any, ...]]]:
        taken = []
        while self.waiting:
            taken.append(self.take())
        return taken


def test_names_are_taken_back_by_their_directory() -> None:
    it = Written()
    it.promises.take_back(Changed(7, [1, 5, 1], [b"a", b"b", b"c"]))
    assert [sorted(sequence) for sequence in it.take_all()] == [[(1, b"a"), (1, b"c")], [(5, b"b")]]


def test_a_node_is_taken_back_behind_the_barrier_of_its_directory() -> None:
    it = Written()
    it.promises.take_back(Changed(7, nodes=[9, 8], through=[5, 0]))
    assert it.take_all() == [[(5, BARRIER), (9, 0)], [(8, 0)]]


def test_a_name_is_as_good_as_a_barrier() -> None:
    it = Written()
    it.promises.take_back(Changed(7, [5], [b"n"], nodes=[9], through=[5]))
    assert it.take_all() == [[(5, b"n"), (9, 0)]]


def test_a_directory_is_taken_back_behind_its_own_barrier_and_that_of_the_one_above() -> None:
    it = Written()
    it.promises.take_back(Changed(7, [5], [b"n"], directories=[5, 6, 1], above=[1, 1, 0]))
    assert it.take_all() == [
        [(5, b"n"), (1, BARRIER), (5, 0)],
        [(6, BARRIER), (1, BARRIER), (6, 0)],
        [(1, BARRIER), (1, 0)],
    ]


def test_of_attributes_alone_the_data_stays() -> None:
    it = Written()
    it.promises.take_back(Changed(7, attributes_only=[8]))
    assert it.take_all() == [[(8, -1)]]


def test_pages_that_are_right_go_without_a_barrier_and_behind_what_is_not() -> None:
    it = Written()
    it.promises.drop_pages([7, 8])
    assert it.take_all() == [[(7, 0), (8, 0)]]
    for node in range(MAX_UNDER_WAY):
        it.promises.take_back(Changed(7, nodes=[node], through=[100 + node]))
    it.promises.drop_pages(range(300, 300 + MAX_SEQUENCE + 1))
    it.promises.drop_pages([300])
    it.promises.take_back(Changed(7, nodes=[9], through=[5], attributes_only=[6]))
    *_, second, third, fourth, fifth = it.take_all()
    assert (second, third) == ([(6, -1)], [(5, BARRIER), (9, 0)])
    assert sorted(fourth + fifth) == [(300 + number, 0) for number in range(MAX_SEQUENCE + 1)]


def test_what_waits_is_merged_and_nothing_is_lost() -> None:
    it = Written()
    for node in range(MAX_UNDER_WAY):
        it.promises.take_back(Changed(7, nodes=[node], through=[100 + node]))
    assert len(it.waiting) == MAX_UNDER_WAY
    for _ in range(3):
        it.promises.take_back(Changed(7, [5, 5], [b"a", b"b"], nodes=[9], through=[5], directories=[5]))
    assert len(it.waiting) == MAX_UNDER_WAY
    *_, last = it.take_all()
    assert sorted(last[:2]) == [(5, b"a"), (5, b"b")]
    assert last[2:] == [(9, 0), (5, 0)]


def test_a_large_change_goes_in_parts_and_ends_with_what_needs_the_others() -> None:
    it = Written()
    names = [b"%d" % number for number in range(2 * MAX_SEQUENCE + 1)]
    it.promises.take_back(Changed(7, [5] * len(names), names, directories=[5], above=[1]))
    first, second, third = it.take_all()
    assert sorted(first + second + third[:1]) == sorted((5, name) for name in names)
    assert third[1:] == [(1, BARRIER), (5, 0)]


def test_nodes_of_a_large_change_are_never_without_a_barrier() -> None:
    it = Written()
    nodes = list(range(2 * MAX_SEQUENCE + 1))
    it.promises.take_back(Changed(7, [5], [b"n"], nodes=nodes, through=[5] * len(nodes)))
    sequences = it.take_all()
    assert [sequence[0] for sequence in sequences] == [(5, b"n"), (5, BARRIER), (5, BARRIER)]
    assert sorted(chain.from_iterable(sequence[1:] for sequence in sequences)) == [
        (node, 0) for node in nodes
    ]


def test_too_much_costs_the_session(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(promises, "MAX_WAITING", 100)
    it = Written()
    for directory in range(MAX_UNDER_WAY):
        it.promises.take_back(Changed(7, nodes=[1], through=[directory + 1]))
    for _ in range(3):  # the same again is no more than once
        it.promises.take_back(Changed(7, [5] * 60, [b"%d" % number for number in range(60)]))
    with pytest.raises(RemoteProtocolError, match="more than 100 changes"):
        it.promises.take_back(Changed(7, [6] * 60, [b"%d" % number for number in range(60)]))
    assert len(list(chain.from_iterable(it.take_all()))) == 2 * MAX_UNDER_WAY + 120
    it.promises.take_back(Changed(7, [6] * 60, [b"%d" % number for number in range(60)]))


# --- names that are not there --------------------------------------------------------------------------


def test_names_that_are_not_there_are_taken_back_with_the_session() -> None:
    it = Written()
    it.promises.absent(5, b"a")
    it.promises.absent(6, b"b")
    it.promises.void()
    assert it.take_all() == [[(5, b"a")], [(6, b"b")]]
    it.promises.void()
    assert it.take_all() == []


def test_a_name_that_has_come_is_not_taken_back_again() -> None:
    """What it stands for may be a directory, and something mounted below it."""
    it = Written()
    for name in (b"made", b"told", b"old", b"new", b"stays"):
        it.promises.absent(5, name)
    it.promises.name_changed(5, b"made")
    it.promises.renamed((5, b"old"), (5, b"new"), 0, expire=False)
    it.promises.take_back(Changed(7, [5], [b"told"]))
    it.take_all()
    it.promises.void()
    assert it.take_all() == [[(5, b"stays")]]


def test_a_fresh_name_is_taken_back_only_if_it_was_missing() -> None:
    it = Written()
    it.promises.absent(5, b"a")
    changed = Changed(7, [5, 5, 5], [b"a", b"b", b"c"], fresh=[True, True])
    it.promises.take_back(changed)
    assert [sorted(sequence) for sequence in it.take_all()] == [[(5, b"a"), (5, b"c")]]
    it.promises.take_back(Changed(7, [5], [b"a"], fresh=[True], directories=[5]))
    assert it.take_all() == [[(5, BARRIER), (5, 0)]]


def test_the_oldest_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(promises, "MAX_ABSENT", 128)
    it = Written()
    for number in range(130):
        it.promises.absent(5, b"%d" % number)
    assert [sorted(sequence) for sequence in it.take_all()] == [[(5, b"0"), (5, b"1")]]
    it.promises.void()
    assert sorted(chain.from_iterable(it.take_all())) == sorted(
        (5, b"%d" % number) for number in range(2, 130)
    )


# --- the guest's own changes ---------------------------------------------------------------------------


def test_the_first_own_change_drops_what_was_said_of_the_directory() -> None:
    it = Written()
    assert it.promises.is_settled(5)
    it.promises.name_changed(5, b"a")
    assert it.take_all() == [[(5, -1)]]
    assert [it.promises.is_settled(node) for node in (5, 6)] == [False, True]
    it.now += 0.9 * SETTLED
    it.promises.name_changed(5, b"b")
    assert it.take_all() == []  # nothing was promised since
    it.now += 0.9 * SETTLED
    assert not it.promises.is_settled(5)
    it.now += 0.2 * SETTLED
    assert it.promises.is_settled(5)
    it.promises.name_changed(5, b"c")
    assert it.take_all() == [[(5, -1)]]


def test_a_rename_drops_what_was_said_of_both_directories_and_of_what_was_renamed() -> None:
    it = Written()
    it.promises.renamed((5, b"a"), (6, b"b"), 9, expire=False)
    assert [sorted(sequence) for sequence in it.take_all()] == [[(5, -1), (6, -1), (9, -1)]]


def test_a_new_name_that_is_not_promised_does_not_live_as_long_as_the_old_one() -> None:
    it = Written()
    it.promises.renamed((5, b"a"), (6, b"b"), 0, expire=True)
    attributes, *names = it.take_all()
    assert sorted(attributes) == [(5, -1), (6, -1)]
    assert names == [[(5, b"a", "expire")], [(6, b"b", "expire")]]


def test_only_directories_that_changed_lately_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(promises, "MAX_ABSENT", 10)
    it = Written()
    for directory in range(100):
        it.promises.name_changed(directory, b"n")
        it.now += SETTLED
    assert len(it.promises._unsettled) <= 10


# --- the kernel ----------------------------------------------------------------------------------------


def counts(server: Server) -> dict[str, int]:
    said: dict[str, int] = server.ask("state 1", "counts")["counts"]
    return said


def take_back(server: Server, changed: str) -> None:
    server.ask(f"take_back 1 Changed(7,{changed})", "written")


LOOK = "[ -e hello ] && stat -c %s hello; ! stat missing 2>&-"


def test_what_is_promised_is_not_asked_for(place: Place) -> None:
    server = place.serve("--promise", f"1:{place.path}/m")
    look = f"cd {place.path}/m; {LOOK}"
    assert place.shell(look) == "6\n"
    before = counts(server)
    assert place.shell(look) == "6\n"
    assert counts(server) == before


def test_names_and_attributes_that_are_taken_back_are_asked_for(place: Place) -> None:
    server = place.serve("--promise", f"1:{place.path}/m")
    look = f"cd {place.path}/m; {LOOK}"
    place.shell(look)
    server.ask("set 1 2 longer.than.that", "set")
    server.ask("add 1 1 missing", "added")
    place.shell(look)  # nothing is new before it is said
    take_back(server, "nodes=[2],through=[1]")
    assert place.shell(f"cd {place.path}/m; cat hello; ! stat missing 2>&-") == "longer.than.that\n"
    take_back(server, '[1],[b"missing"],directories=[1]')
    assert place.shell(f"cd {place.path}/m; stat -c %F missing") == "regular empty file\n"


def test_a_node_is_not_taken_back_while_its_directory_is_looked_at(place: Place) -> None:
    server = place.serve("--hold", f"1:{place.path}/m")
    looker = place.popen("stat", f"{place.path}/m/looked.at")
    server.expect("held")
    server.order("take_back 1 Changed(7,nodes=[2],through=[1])")
    server.order("take_back 1 Changed(7,nodes=[2],through=[0])")
    assert server.expect("written") == {"written": len(abi.inval_inode(2, 0, 0))}
    server.order("release 1")
    assert server.expect("written")["written"] > len(abi.inval_entry(1, BARRIER))
    looker.wait(10)


def test_a_renamed_name_is_kept_unless_it_expires(place: Place) -> None:
    server = place.serve("--promise", f"1:{place.path}/m")
    place.shell(f"cd {place.path}/m; stat hello; mv hello new")
    before = counts(server)["LOOKUP"]
    place.shell(f"stat {place.path}/m/new")
    assert counts(server)["LOOKUP"] == before
    server.order("renamed 1 1 hello new")
    for _ in range(2):
        server.expect("written")
    place.shell(f"stat {place.path}/m/new")
    assert counts(server)["LOOKUP"] == before + 1


@pytest.mark.parametrize("options", ["", ":ro"])
def test_a_purge_drops_names_that_are_not_there_and_changes_nothing_else(place: Place, options: str) -> None:
    server = place.serve("--promise", f"1:{place.path}/m{options}")
    mounted = place.mounts()
    reader = place.popen("sh", "-c", f"exec <{place.path}/m/hello; echo; read nothing </dev/stdin; cat")
    place.shell(f"cd {place.path}/m; {LOOK}")
    server.ask("add 1 1 missing", "added")
    place.shell(f"cd {place.path}/m; {LOOK}")
    server.ask("purge 1", "purged")
    assert place.shell(f"cd {place.path}/m; stat -c %F missing") == "regular empty file\n"
    assert place.mounts() == mounted
    place.result(reader)
