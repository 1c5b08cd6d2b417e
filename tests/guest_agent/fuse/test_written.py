from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from guest_agent.fuse import written
from guest_agent.fuse.abi import Opcode
from guest_agent.fuse.bodies import WRITE_CACHE
from guest_agent.fuse.written import PAGE, Ends
from protocol.files import ATTR, ATTRIBUTES, NAME, Attributes, Changed, Renamed, Written
from tests.guest_agent.fuse.script import Script, pack, replied

NODE, DIRECTORY = 9, 5
GETATTR = pack("IIQ", 0, 0, 0)


def attr(size: int, mtime: int = 7, nsec: int = 8) -> bytes:
    return ATTR.pack(1, size, 8, 0, mtime, 9, 0, nsec, 0, 0o100644, 1, 0, 0, 0, 4096, 0)


def write(it: Ends, data: bytes, offset: int, of: bytes | None = None, node: int = NODE) -> None:
    it.begin(node, offset)
    end = it.end(node, data, attr(offset + len(data)) if of is None else of)
    if end is not None:
        it.keep(node, end)


def test_the_end_is_what_the_kernel_has_no_whole_page_of() -> None:
    it = Ends()
    write(it, b"a" * PAGE + b"end", 0)
    assert it.read(NODE, PAGE, PAGE, attr(PAGE + 3)) == b"end"
    assert NODE not in it, "now the kernel has it"


def test_it_grows_with_what_is_written_behind_it() -> None:
    it = Ends()
    write(it, b"one", 0)
    write(it, b"two", 3)
    assert it.read(NODE, 0, PAGE, attr(6)) == b"onetwo"
    write(it, b"three", 2 * PAGE)
    write(it, b"x" * PAGE, 2 * PAGE + 5)
    assert it.read(NODE, 3 * PAGE, PAGE, attr(3 * PAGE + 5)) == b"x" * 5


@pytest.mark.parametrize(
    ("data", "offset", "of"),
    [
        (b"whole" * PAGE, 0, None),
        (b"nothing is known of what is before it", 1, None),
        (b"the file is longer", 0, attr(100)),
        (b"shorter", 0, attr(1)),
        (b"", 0, None),
    ],
)
def test_what_is_not_known_to_be_the_end_is_not_kept(data: bytes, offset: int, of: bytes | None) -> None:
    it = Ends()
    write(it, data[:PAGE] if data.startswith(b"whole") else data, offset, of)
    assert NODE not in it


@pytest.mark.parametrize(
    ("offset", "size", "promised"),
    [
        (1, PAGE, attr(3)),
        (0, 2, attr(3)),
        (0, PAGE, None),
        (0, PAGE, attr(4)),
        (0, PAGE, attr(3, mtime=6)),
        (0, PAGE, attr(3, nsec=9)),
    ],
)
def test_it_is_given_as_it_is_and_while_the_file_is_promised_to_be_that(
    offset: int, size: int, promised: bytes | None
) -> None:
    it = Ends()
    write(it, b"end", 0)
    assert it.read(NODE, offset, size, promised) is None
    assert it.read(NODE, 0, PAGE, attr(3)) == b"end"


def test_of_two_writes_at_once_none_is_the_last() -> None:
    it = Ends()
    it.begin(NODE, 0)
    it.begin(NODE, 0)
    assert it.end(NODE, b"one", attr(3)) is None
    it.begin(NODE, 0)
    assert it.end(NODE, b"two", attr(3)) is None
    assert it.end(NODE, b"three", attr(5)) is None, "the second may have come after it"
    write(it, b"four", 0)
    assert NODE in it


@pytest.mark.parametrize(
    "change",
    [
        lambda it: it.drop(NODE),
        lambda it: it.void(),
        lambda it: it.changed(Changed(7, nodes=[NODE], through=[1])),
    ],
)
def test_nothing_is_kept_over_another_change(change: Callable[[Ends], None]) -> None:
    it = Ends()
    write(it, b"end", 0)
    change(it)
    assert NODE not in it
    it.begin(NODE, 0)
    change(it)
    assert it.end(NODE, b"end", attr(3)) is None, "it may have been before that"


def test_the_number_of_files_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(written, "MAX_FILES", 2)
    it = Ends()
    for node in (1, 2, 3):
        write(it, b"end", 0, node=node)
    assert [node in it for node in (1, 2, 3)] == [False, True, True]


# --- of a mount --------------------------------------------------------------------------------------


def begin_write(it: Script, data: bytes = b"content", flags: int = 0) -> int:
    return it.request(Opcode.WRITE, pack("QQIIQII", 0, 0, len(data), flags, 0, 0, 0) + data, NODE)


def know(it: Script, size: int = 7) -> None:
    """The kernel asks for attributes, which the host promises."""
    it.request(Opcode.GETATTR, GETATTR, NODE)
    it.take().answer(Attributes(attr(size), promise=ATTRIBUTES))


def read(it: Script) -> int:
    return it.request(Opcode.READ, pack("QQIIQII", 0, 0, PAGE, 0, 0, 0, 0), NODE)


def test_what_was_written_is_read_without_a_message() -> None:
    it = Script()
    begin_write(it)
    it.take().answer(Written(7, 0, attr(7)))
    know(it)
    it.answers  # noqa: B018  (what was said so far)
    unique = read(it)
    assert it.answers == replied(unique, b"content")
    read(it)
    assert len(it.link.asked) == 1


def test_also_once_it_has_another_name() -> None:
    it = Script()
    begin_write(it)
    it.take().answer(Written(7, 0, attr(7)))
    it.request(Opcode.RENAME, pack("Q", DIRECTORY) + b"f.lock\0f\0", DIRECTORY)
    it.take().answer(Renamed(NODE, NAME | ATTRIBUTES, True, attr(7), 8, gone=True))
    it.request(Opcode.GETATTR, GETATTR, NODE)
    it.request(Opcode.LOOKUP, b"f.lock\0", DIRECTORY)
    read(it)
    assert not it.link.asked


def test_without_the_promise_it_is_the_host_s_to_say() -> None:
    it = Script()
    begin_write(it)
    it.take().answer(Written(7, 0, attr(7)))
    read(it)
    assert len(it.link.asked) == 1


CHANGES: dict[str, Callable[[Script], object]] = {
    "by the host": lambda it: it.volume.take_back(Changed(7, nodes=[NODE], through=[1])),
    "the session ends": lambda it: it.volume.void(),
    "forgotten": lambda it: it.request(Opcode.FORGET, pack("Q", 1), NODE),
    "dropped": lambda it: it.volume._drop(NODE, lambda: None),
    "by the guest": lambda it: it.volume.data_changed(NODE),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_nor_after_another_change(change: Callable[[Script], object]) -> None:
    it = Script()
    begin_write(it)
    it.take().answer(Written(7, 0, attr(7)))
    change(it)
    while it.notifier.waiting:
        it.notifier.finish()
    it.link.asked.clear()
    know(it)
    read(it)
    assert len(it.link.asked) == 1


def test_pages_of_a_mapping_are_the_kernel_s_business() -> None:
    it = Script()
    begin_write(it, flags=WRITE_CACHE)
    it.take().answer(Written(7, 0, attr(7)))
    know(it)
    read(it)
    assert len(it.link.asked) == 1


def test_what_was_not_written_is_not_there() -> None:
    for answer in (Written(3, 0, attr(3)), Written(7, 10, attr(17)), errno.ENOSPC):
        it = Script()
        begin_write(it)
        asked = it.take()
        asked.fail(answer) if isinstance(answer, int) else asked.answer(answer)
        know(it)
        read(it)
        assert len(it.link.asked) == 1, answer
