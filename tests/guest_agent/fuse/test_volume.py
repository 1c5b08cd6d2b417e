"""What of the host's promises reaches the kernel, and what the guest's own changes take back."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable

import pytest

from guest_agent.fuse import bodies, volume
from guest_agent.fuse.abi import Opcode
from guest_agent.fuse.volume import Volume
from protocol.files import (
    ATTR,
    ATTRIBUTES,
    EMPTY,
    NAME,
    Attributes,
    Changed,
    Entry,
    GetAttributes,
    ListEntries,
    Lookup,
    Removed,
    Renamed,
    Written,
)
from tests.guest_agent.fuse.script import ATTRIBUTES as FILE
from tests.guest_agent.fuse.script import Script, ScriptedKernel, ScriptedNotifier, failed, pack, replied
from tests.guest_agent.fuse.test_promises import parse

DIRECTORY = ATTR.pack(6, 12, 8, 1, 2, 3, 4, 5, 6, 0o40755, 1, 1000, 1000, 0, 4096, 0)
ALL = NAME | ATTRIBUTES

CREATE = pack("IIII", os.O_RDWR, 0o100644, 0, 0) + b"f\0"
MKDIR = pack("II", 0o755, 0) + b"f\0"
MKNOD = pack("IIII", 0o10600, 0, 0, 0) + b"f\0"
LINK = pack("Q", 8) + b"f\0"
RENAME = pack("Q", 6) + b"old\0new\0"


def taken_back(notifier: ScriptedNotifier) -> list[list[tuple[object, ...]]]:
    """What was written to the kernel, and is done."""
    said = []
    while notifier.sequences:
        notifications, then = notifier.sequences.pop(0)
        then()
        said.append(parse(notifications))
    return said


@pytest.mark.parametrize(
    ("attr", "promise", "valid"),
    [
        (FILE, 0, 0),
        (FILE, ATTRIBUTES, ATTRIBUTES),
        (FILE, ALL, ALL),
        (DIRECTORY, 0, bodies.TICK),
        (DIRECTORY, NAME, NAME | bodies.TICK),
        (DIRECTORY, ALL, ALL),
    ],
)
def test_what_is_promised_is_passed_on(attr: bytes, promise: int, valid: int) -> None:
    it = Script()
    looked = it.request(Opcode.LOOKUP, b"name\0")
    it.take().answer(Entry(9, attr, promise=promise))
    asked = it.request(Opcode.GETATTR, pack("IIQ", 0, 0, 0), node=8, pid=43)
    it.take().answer(Attributes(attr, promise=promise))
    assert it.answers == replied(looked, bodies.entry_out(9, attr, valid)) + replied(
        asked, bodies.attr_out(attr, valid & ~NAME)
    )


def test_that_there_is_no_such_name_is_passed_on_and_remembered() -> None:
    it = Script()
    unique = it.request(Opcode.LOOKUP, b"name\0")
    it.take().answer(Entry(0, b"", promise=NAME))
    assert it.answers == replied(unique, bodies.ABSENT)
    it.volume.promises.void()
    assert taken_back(it.notifier) == [[(5, b"name")]]


def test_a_name_that_nobody_heard_is_missing_is_no_node_to_forget() -> None:
    it = Script()
    unique = it.request(Opcode.LOOKUP, b"name\0")
    it.dying.add(42)
    it.request(Opcode.INTERRUPT, pack("Q", unique), pid=0)
    it.host.let_the_dying_go()
    it.take().answer(Entry(0, b"", promise=NAME))
    assert it.answers[0] == failed(unique, "EINTR")[0]
    assert it.timers.waiting == []


@pytest.mark.parametrize(
    ("opcode", "body", "result"),
    [
        (Opcode.CREATE, CREATE, Entry(9, FILE, promise=ALL)),
        (Opcode.MKDIR, MKDIR, Entry(9, DIRECTORY, promise=ALL)),
        (Opcode.MKNOD, MKNOD, Entry(9, FILE, promise=ALL)),
        (Opcode.SYMLINK, b"f\0to\0", Entry(9, FILE, promise=ALL)),
        (Opcode.LINK, LINK, Entry(9, FILE, promise=ALL)),
        (Opcode.UNLINK, b"f\0", None),
        (Opcode.RMDIR, b"f\0", None),
    ],
)
def test_an_own_change_takes_back_what_was_said_of_the_directory(
    opcode: Opcode, body: bytes, result: object
) -> None:
    it = Script()
    it.volume.promises.absent(5, b"f")
    unique = it.request(opcode, body)
    assert taken_back(it.notifier) == []  # the host has not done it yet
    it.take().answer(result)
    assert it.answers[0][1] == unique
    assert taken_back(it.notifier) == [[(5, -1)]]
    it.request(Opcode.GETATTR, pack("IIQ", 0, 0, 0))
    it.take().answer(Attributes(DIRECTORY, promise=ATTRIBUTES))
    assert it.answers[0][2] == bodies.attr_out(DIRECTORY, bodies.TICK)
    it.volume.promises.void()
    assert taken_back(it.notifier) == []  # the name is not missing any more


@pytest.mark.parametrize(
    ("opcode", "body", "result"),
    [
        (Opcode.CREATE, CREATE, Entry(9, FILE, above=DIRECTORY)),
        (Opcode.MKDIR, MKDIR, Entry(9, DIRECTORY, above=DIRECTORY)),
        (Opcode.LINK, LINK, Entry(9, FILE, above=DIRECTORY)),
        (Opcode.UNLINK, b"f\0", Removed(DIRECTORY)),
        (Opcode.RMDIR, b"f\0", Removed(DIRECTORY)),
    ],
)
def test_what_came_with_it_answers_what_the_kernel_asks_then(
    opcode: Opcode, body: bytes, result: object
) -> None:
    it = Script()
    it.request(opcode, body)
    it.take().answer(result)
    for _ in range(2):
        asked = it.request(Opcode.GETATTR, pack("IIQ", 0, 0, 0))
        assert it.answers[-1:] == replied(asked, bodies.attr_out(DIRECTORY, bodies.TICK))
    it.volume.take_back(Changed(7, directories=[5], above=[1]))
    it.request(Opcode.GETATTR, pack("IIQ", 0, 0, 0))
    assert it.take().call == GetAttributes(7, 8, 5)


def test_what_the_host_says_while_a_drop_is_waited_for_is_the_newer() -> None:
    it = Script()
    it.request(Opcode.CREATE, CREATE)
    it.take().answer(Entry(9, FILE, stale=True, above=DIRECTORY))
    it.volume.take_back(Changed(7, directories=[5], above=[1]))
    it.notifier.finish()
    it.request(Opcode.GETATTR, pack("IIQ", 0, 0, 0))
    assert it.take().call == GetAttributes(7, 4, 5)


@pytest.mark.parametrize("bit", [0o4000, 0o2000])
def test_a_mode_that_a_write_clears_is_not_promised(bit: int) -> None:
    it = Script()
    attr = ATTR.pack(11, 12, 8, 1, 2, 3, 4, 5, 6, 0o100755 | bit, 1, 1000, 1000, 0, 4096, 0)
    looked = it.request(Opcode.LOOKUP, b"name\0")
    it.take().answer(Entry(9, attr, promise=ALL))
    assert it.answers == replied(looked, bodies.entry_out(9, attr, NAME))


def test_an_own_change_that_fails_changes_nothing() -> None:
    it = Script()
    it.request(Opcode.MKDIR, MKDIR)
    it.take().fail(17)
    assert taken_back(it.notifier) == []


def test_what_is_made_is_promised_at_once() -> None:
    it = Script()
    created = it.request(Opcode.CREATE, CREATE)
    it.take().answer(Entry(9, FILE, promise=ALL))
    made = it.request(Opcode.MKDIR, MKDIR)
    it.take().answer(Entry(10, DIRECTORY, promise=ALL))
    entry = bodies.create_out(9, FILE, 0, bodies.FOPEN_KEEP_CACHE, ALL)
    assert it.answers == replied(created, entry) + replied(made, bodies.entry_out(10, DIRECTORY, ALL))


def test_in_a_directory_that_was_just_made_is_nothing() -> None:
    it = Script()
    made = it.request(Opcode.MKDIR, MKDIR)
    it.take().answer(Entry(9, DIRECTORY, promise=ALL | EMPTY))
    looked = it.request(Opcode.LOOKUP, b"name\0", node=9)
    assert it.answers == replied(made, bodies.entry_out(9, DIRECTORY, ALL)) + replied(looked, bodies.ABSENT)
    it.request(Opcode.CREATE, CREATE, node=9)
    it.take().answer(Entry(10, FILE, promise=ALL))
    it.answers.clear()
    looked = it.request(Opcode.LOOKUP, b"another\0", node=9)
    assert it.answers == replied(looked, bodies.ABSENT)
    it.request(Opcode.LOOKUP, b"f\0", node=9)
    assert it.take().call == Lookup(7, 10, 9, b"f")
    it.request(Opcode.READDIRPLUS, pack("QQIIQII", 0, 0, 4096, 0, 0, 0, 0), node=9)
    assert isinstance(it.take().call, ListEntries)


@pytest.mark.parametrize(
    "change",
    [
        lambda it: it.volume.take_back(Changed(7, parents=[9], names=[b"name"], directories=[9], above=[5])),
        lambda it: it.volume.void(),
        lambda it: it.request(Opcode.FORGET, pack("Q", 1), node=9),
    ],
)
def test_until_the_host_says_otherwise(change: Callable[[Script], object]) -> None:
    it = Script()
    it.request(Opcode.MKDIR, MKDIR)
    it.take().answer(Entry(9, DIRECTORY, promise=ALL | EMPTY))
    change(it)
    it.request(Opcode.LOOKUP, b"name\0", node=9)
    assert isinstance(it.take().call, Lookup)


def test_of_what_is_linked_the_attributes_are_asked_for() -> None:
    """The kernel would store them whatever it was told meanwhile."""
    it = Script()
    unique = it.request(Opcode.LINK, LINK)
    it.take().answer(Entry(8, FILE, promise=ALL))
    assert it.answers == replied(unique, bodies.entry_out(8, FILE, NAME))


def test_of_what_is_set_the_attributes_are_asked_for() -> None:
    it = Script()
    unique = it.request(Opcode.SETATTR, struct.pack("<I4x80x", 1))
    it.take().answer(Attributes(FILE, promise=ATTRIBUTES))
    assert it.answers == replied(unique, bodies.attr_out(FILE))


@pytest.mark.parametrize(
    ("outcome", "names"),
    [
        (Renamed(node=9, promise=NAME), []),
        (Renamed(node=9), [[(5, b"old", "expire")], [(6, b"new", "expire")]]),
    ],
)
def test_a_rename_takes_back_what_the_kernel_would_take_along(
    outcome: Renamed, names: list[list[tuple[object, ...]]]
) -> None:
    it = Script()
    it.request(Opcode.RENAME, RENAME)
    it.take().answer(outcome)
    attributes, *others = taken_back(it.notifier)
    assert sorted(attributes, key=str) == [(5, -1), (6, -1), (9, -1)]
    assert others == names


@pytest.mark.parametrize("files", [True, False])
def test_a_directorys_attributes_outlive_renames_of_files(files: bool) -> None:
    it = Script()
    it.request(Opcode.GETATTR, pack("IIQ", 0, 0, 0), node=8)
    it.take().answer(Attributes(DIRECTORY, promise=ATTRIBUTES))
    it.request(Opcode.RENAME, RENAME)
    it.take().answer(Renamed(9, promise=NAME, files=files))
    it.request(Opcode.GETATTR, pack("IIQ", 0, 0, 0), node=8)
    assert len(it.link.calls) == (0 if files else 1)


# --- several volumes of a share ------------------------------------------------------------------------


class Twice(Script):
    """A share that is still in use in another superblock, ``other``."""

    def __init__(self) -> None:
        super().__init__()
        self.other = ScriptedNotifier(ScriptedKernel())
        Volume(7, self.host, self.other, self.timers, salt=1, volumes=self.volumes)  # type: ignore[arg-type]


def test_nothing_is_promised_twice() -> None:
    it = Twice()
    looked = it.request(Opcode.LOOKUP, b"name\0")
    it.take().answer(Entry(9, FILE, promise=ALL))
    missed = it.request(Opcode.LOOKUP, b"name\0")
    it.take().answer(Entry(0, b"", promise=NAME))
    assert it.answers == replied(looked, bodies.entry_out(9, FILE)) + failed(missed, "ENOENT")
    it.volume.promises.void()
    assert it.notifier.sequences == []


@pytest.mark.parametrize(
    ("opcode", "body", "result", "told"),
    [
        (Opcode.MKDIR, MKDIR, Entry(9, DIRECTORY), [[(5, b"f"), (5, 0)]]),
        (Opcode.UNLINK, b"f\0", None, [[(5, b"f"), (5, 0)]]),
        (Opcode.RENAME, RENAME, Renamed(), [[(5, b"old"), (5, 0)], [(6, b"new"), (6, 0)]]),
        (Opcode.WRITE, pack("QQIIQII", 0, 0, 1, 0, 0, 0, 0) + b"x", Written(1, 0, FILE), [[(5, 0)]]),
        (Opcode.SETATTR, struct.pack("<I4x80x", 1), Attributes(FILE), [[(5, 0)]]),
        (Opcode.FALLOCATE, pack("QQQII", 0, 0, 1, 0, 0), Attributes(FILE), [[(5, 0)]]),
        (Opcode.COPY_FILE_RANGE, pack("QQQQQQQ", 0, 0, 6, 0, 0, 1, 0), Written(1, 0, FILE), [[(6, 0)]]),
    ],
)
def test_what_is_changed_through_one_is_taken_back_from_the_other(
    opcode: Opcode, body: bytes, result: object, told: list[list[tuple[object, ...]]]
) -> None:
    it = Twice()
    it.request(opcode, body)
    it.take().answer(result)
    assert taken_back(it.other) == told


# --- an answer that the kernel would not store -----------------------------------------------------------


def test_a_node_that_is_asked_for_is_taken_back_after_the_answer() -> None:
    it = Script()
    it.request(Opcode.GETATTR, pack("IIQ", 0, 0, 0), node=9)
    it.request(Opcode.GETATTR, pack("IIQ", 0, 0, 0), node=9)
    it.volume.take_back(Changed(7, nodes=[9, 8, 9], through=[5, 5, 6]))
    assert taken_back(it.notifier) == [[(5, b"\x01barrier"), (8, 0)]]
    it.take().answer(Attributes(FILE))
    it.take().answer(Attributes(FILE))
    assert it.timers.waiting.pop(0)[0] == volume.MOST_HELD_BACK
    assert it.timers.fire() == volume.AFTER_ANSWER
    assert taken_back(it.notifier) == [[(5, b"\x01barrier"), (9, 0)], [(6, b"\x01barrier"), (9, 0)]]
    it.volume.take_back(Changed(7, nodes=[9], through=[5]))
    assert taken_back(it.notifier) == [[(5, b"\x01barrier"), (9, 0)]]


def test_no_answer_holds_it_back_for_long() -> None:
    it = Script()
    it.request(Opcode.GETATTR, pack("IIQ", 0, 0, 0), node=9)
    it.volume.take_back(Changed(7, nodes=[9], through=[5]))
    assert taken_back(it.notifier) == []
    assert it.timers.fire() == volume.MOST_HELD_BACK
    assert taken_back(it.notifier) == [[(5, b"\x01barrier"), (9, 0)]]
    it.take().fail(5)
    assert it.timers.waiting == []


def test_what_comes_after_an_answer_waits_until_the_caller_was_given_a_processor() -> None:
    it = Script()
    it.runs[42] = 3
    it.request(Opcode.GETATTR, pack("IIQ", 0, 0, 0), node=9)
    it.volume.take_back(Changed(7, nodes=[9], through=[5]))
    it.take().answer(Attributes(FILE))
    it.timers.waiting.pop(0)
    for _ in range(5):
        assert it.timers.fire() == volume.AFTER_ANSWER
        assert taken_back(it.notifier) == []
    it.runs[42] = 4
    it.timers.fire()
    assert taken_back(it.notifier) == [[(5, b"\x01barrier"), (9, 0)]]
    assert it.timers.waiting == []


def test_nor_does_it_wait_for_ever() -> None:
    it = Script()
    it.runs[42] = 3
    it.request(Opcode.GETATTR, pack("IIQ", 0, 0, 0), node=9)
    it.volume.take_back(Changed(7, nodes=[9], through=[5]))
    it.take().answer(Attributes(FILE))
    it.timers.waiting.pop(0)
    waited = 0.0
    while it.timers.waiting:
        assert taken_back(it.notifier) == []
        waited += it.timers.fire()
    assert taken_back(it.notifier) == [[(5, b"\x01barrier"), (9, 0)]]
    assert volume.MOST_HELD_BACK < waited < 2 * volume.MOST_HELD_BACK


def test_the_second_alarm_drops_once_its_answer_is_stored() -> None:
    """The first answer is dropped before, and the kernel did not learn the size from it."""
    it = Script()
    it.runs[42] = 3
    it.request(Opcode.GETATTR, pack("IIQ", 0, 0, 0), node=9)
    it.take().answer(Attributes(FILE, stale=True))
    it.notifier.finish()
    second = it.request(Opcode.GETATTR, pack("IIQ", 0, 0, 0), node=9)
    it.take().answer(Attributes(FILE, stale=True))
    assert it.kernel.log[-1][1] == second
    it.timers.fire()
    assert it.notifier.waiting == []
    it.runs[42] = 4
    it.timers.fire()
    assert [node for node, _ in it.notifier.waiting] == [9]


# --- what the host says --------------------------------------------------------------------------------


def test_what_the_host_says_reaches_the_kernel_behind_the_answers_that_came_before() -> None:
    it = Script()
    it.request(Opcode.LOOKUP, b"name\0")
    assert it.take().call == Lookup(7, 2, 5, b"name")
    it.volume.take_back(Changed(7, [5], [b"name"], [9], [5], [5], above=[1]))
    assert taken_back(it.notifier) == [[(5, b"name"), (9, 0), (1, b"\x01barrier"), (5, 0)]]
