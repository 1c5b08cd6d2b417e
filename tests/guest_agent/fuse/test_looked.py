"""A stat(2) of what nothing is promised of is one message, and never what was before it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from guest_agent.fuse import bodies, looked
from guest_agent.fuse.abi import Opcode
from guest_agent.fuse.looked import Looked
from protocol.files import ATTR, ATTRIBUTES, Attributes, Changed, Entry, Removed
from tests.guest_agent.fuse.script import Script, pack, replied

NODE, THREAD = 9, 42
OLD, NEW, SET_UID, DIRECTORY = (
    ATTR.pack(6, size, 8, 1, 2, 3, 4, 5, 6, mode, 1, 1000, 1000, 0, 4096, 0)
    for size, mode in ((1, 0o100644), (2, 0o100644), (1, 0o104755), (1, 0o40755))
)
GETATTR = pack("IIQ", 0, 0, 0)


@pytest.fixture
def it(monkeypatch: pytest.MonkeyPatch) -> Script:
    """Time stands still, unless ``clock`` says otherwise."""
    return Script()


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(looked.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(Looked.__init__, "__defaults__", (lambda: now[0],))
    return now


def look_up(it: Script, attr: bytes = OLD, **told: object) -> None:
    it.request(Opcode.LOOKUP, b"name\0")
    it.take().answer(Entry(NODE, attr, **told))  # type: ignore[arg-type]
    assert len(it.answers) == 1


def is_asked(it: Script, pid: int = THREAD, node: int = NODE) -> bool:
    """Whether the host is asked for the node's attributes; else they are the old ones."""
    unique = it.request(Opcode.GETATTR, GETATTR, node=node, pid=pid)
    if it.link.asked:
        it.take().answer(Attributes(NEW))
        assert it.answers == replied(unique, bodies.attr_out(NEW))
        return True
    assert it.answers == replied(unique, bodies.attr_out(OLD)), "it is not promised"
    return False


def test_the_same_thread_is_answered_once(it: Script) -> None:
    look_up(it)
    assert not is_asked(it)
    assert is_asked(it)


def test_another_thread_is_not(it: Script) -> None:
    look_up(it)
    assert is_asked(it, pid=THREAD + 1)
    assert is_asked(it)


def test_a_thread_that_is_not_known_is_not(it: Script) -> None:
    it.request(Opcode.LOOKUP, b"name\0", pid=0)
    it.take().answer(Entry(NODE, OLD))
    assert len(it.answers) == 1
    assert is_asked(it, pid=0)


def test_after_a_tick_it_is_another_call(it: Script, clock: list[float]) -> None:
    look_up(it)
    clock[0] += 0.0039
    assert not is_asked(it)
    look_up(it)
    clock[0] += 0.0041
    assert is_asked(it)


def test_what_is_promised_or_stale_is_not_remembered(it: Script) -> None:
    look_up(it, promise=ATTRIBUTES)
    assert it.volume.looked.take(THREAD, NODE) is None
    it.request(Opcode.GETATTR, GETATTR, node=NODE)
    assert not it.link.asked, "it is promised"
    it.answers  # noqa: B018  (what was said so far)
    it.volume.take_back(Changed(7, nodes=[NODE], through=[5]))
    assert is_asked(it)
    it.request(Opcode.LOOKUP, b"name\0")
    it.take().answer(Entry(NODE, OLD, stale=True))
    it.notifier.finish()
    assert [kind for kind, *_ in it.answers] == ["dropped", "reply"]
    assert is_asked(it)


def test_a_directory_has_its_tick_in_the_kernel(it: Script) -> None:
    look_up(it, DIRECTORY)
    it.request(Opcode.GETATTR, GETATTR, node=NODE)
    assert len(it.link.asked) == 1


def write(it: Script) -> None:
    it.request(Opcode.SETATTR, pack("IIQQQQQQIIIIIIII", 1, 0, 0, *[0] * 5, *[0] * 3, 0o600, 0, 0, 0, 0), 77)
    it.take().answer(Attributes(NEW))


def unlink(it: Script) -> None:
    it.request(Opcode.UNLINK, b"other\0")
    it.take().answer(Removed())


def hear(it: Script) -> None:
    it.volume.take_back(Changed(7, nodes=[77], through=[5]))


@pytest.mark.parametrize("happens", [write, unlink, hear, lambda it: it.volume.void()])
def test_whatever_happens_ends_it(it: Script, happens: Callable[[Script], None]) -> None:
    look_up(it)
    happens(it)
    it.kernel.log.clear()
    assert is_asked(it)
    # Also before the answer has come: it may have been read before.
    it.request(Opcode.LOOKUP, b"name\0")
    asked = it.take()
    happens(it)
    asked.answer(Entry(NODE, OLD))
    it.kernel.log.clear()
    assert is_asked(it)


def test_a_file_whose_data_is_being_dropped_is_asked_for(it: Script) -> None:
    look_up(it)
    it.volume.drop(NODE).begin(lambda _: None)
    it.request(Opcode.GETATTR, GETATTR, node=NODE)
    assert len(it.link.asked) == 1


def test_it_is_bounded(it: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(looked, "MAX_LOOKED", 2)
    kept = it.volume.looked
    for node in (1, 2, 1, 3):
        kept.remember(THREAD, node, OLD, kept.changes)
    assert kept.take(THREAD, 2) is None
    assert kept.take(THREAD, 1) == kept.take(THREAD, 3) == OLD
