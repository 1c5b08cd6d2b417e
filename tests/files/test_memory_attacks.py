"""A guest that lies about the memory that it shares: the session ends or goes on inline, and no slot is lost by it."""

from __future__ import annotations

import dataclasses
import errno
import os
import random
import threading
import typing
from collections.abc import Iterator
from typing import Any

import msgpack
import pytest

from host_agent.bulk_memory import MAX_EXTENTS, SIZE
from protocol import codec, messages
from protocol.bulk import MARK_SIZE, MAX_RUN, SLOT
from protocol.errors import ErrorCode
from protocol.files import (
    CALLS,
    MAX_DATA,
    ROOT,
    Create,
    FileCall,
    GetAttributes,
    GetXattr,
    List,
    Lookup,
    MakeDirectory,
    MakeSymlink,
    Read,
    ReadLink,
    SetXattr,
    Write,
)
from protocol.messages import BulkOffer
from protocol.region import FILE_SIZE, FILES
from tests.files.hostile import (
    ALL,
    OF_A_RUN,
    SHARE,
    Ended,
    HostileGuest,
    bitmap,
    call,
    frame,
    hostile_guest,
    mask_of,
)
from tests.files.memory import START

SECRET = b"what-nobody-in-the-guest-may-see"
LARGE = os.urandom(MAX_RUN)


@pytest.fixture(scope="module")
def shared() -> Iterator[HostileGuest]:
    with hostile_guest() as guest:
        yield guest


@pytest.fixture
def guest(shared: HostileGuest) -> Iterator[HostileGuest]:
    """In a session, and with files ``file`` and ``large``. Afterwards another session has all the memory."""
    secret, share = shared.top / "secret", shared.top / "open"
    secret.write_bytes(SECRET)
    (share / "file").write_bytes(b"public")
    (share / "large").write_bytes(LARGE)
    shared.begin()
    yield shared
    shared.check()
    assert (secret.read_bytes(), sorted(os.listdir(shared.top))) == (SECRET, ["open", "secret"])
    assert (share / "large").read_bytes() == LARGE
    for name in ("file", "large"):
        (share / name).unlink()
    assert os.listdir(share) == [], "only what the test has made, and removed, was there"


def assert_refused(guest: HostileGuest, *frames: bytes) -> None:
    """They end the session, and whose fault that is is said."""
    guest.send(*frames)
    assert guest.ended().code is ErrorCode.PROTOCOL


def outcome(guest: HostileGuest) -> ErrorCode | None:
    """Of what was said: None if the session goes on."""
    try:
        guest.settle()
    except Ended as ended:
        return ended.code
    return None


# --- references ------------------------------------------------------------------------------------

NO_RUNS: list[Any] = [
    [FILES.slots, 1], [FILES.slots - 1, SLOT + 1], [FILES.slots - OF_A_RUN + 1, MAX_RUN], [-1, SLOT], [-1, 1],
    [-FILES.slots, SLOT], [0, 0], [0, -1], [0, MAX_RUN + 1], [0, FILES.slots * SLOT], [0, 2**31], [0, 2**63],
    [2**63 - 1, 1], [2**64 - 1, 2**64 - 1], [], [0], [0, 1, 2], [None, 1], [True, SLOT], ["0", 1], [0.0, SLOT],
    [[0], [1]], "slots", 5, {}, b"\0\1", False,
]  # fmt: skip


def test_a_reference_to_what_is_no_run(guest: HostileGuest) -> None:
    for run in NO_RUNS:
        guest.begin()
        write = codec.encode(Write(SHARE, guest.unique(), guest.node(b"file"), 0))
        assert_refused(guest, call(guest.number(), Write.OP, write, run=run))
    assert (guest.top / "open/file").read_bytes() == b"public"


LENT_TWICE = [
    ([0, 1], [0, 1]), ([0, 1], [0, 3 * SLOT]), ([0, 2 * SLOT], [1, 1]), ([1, SLOT], [0, SLOT + 1]),
    ([0, MAX_RUN], [OF_A_RUN - 1, MAX_RUN]), ([FILES.slots - 1, 1], [FILES.slots - OF_A_RUN, MAX_RUN]),
]  # fmt: skip


def test_a_slot_that_is_lent_already(guest: HostileGuest) -> None:
    for runs in LENT_TWICE:
        guest.begin()
        write = Write(SHARE, 0, guest.node(b"file"), 0)
        arguments = [codec.encode(dataclasses.replace(write, unique=guest.unique())) for _ in runs]
        calls = [
            call(guest.number(), Write.OP, args, run=run) for args, run in zip(arguments, runs, strict=True)
        ]
        assert_refused(guest, *calls)


def test_a_run_and_a_payload(guest: HostileGuest) -> None:
    write = codec.encode(Write(SHARE, guest.unique(), guest.node(b"file"), 0))
    assert_refused(guest, call(guest.number(), Write.OP, write, b"payload", [0, SLOT]))


@pytest.mark.parametrize(
    "wrong",
    [
        frame(messages.Data, 1, [0, SLOT]),
        frame(messages.Result, 2, 0, None, [0, SLOT]),
        frame(messages.BulkBegin, b""),
    ],
    ids=["data of no stream", "result of no call", "the host's own word"],
)
def test_memory_where_nobody_asked_for_any(guest: HostileGuest, wrong: bytes) -> None:
    assert_refused(guest, wrong)


def test_data_of_a_stream_that_is_refused() -> None:
    """In one breath with the question, and behind the answer: dropped, or the end of the session."""
    with hostile_guest() as guest:
        guest.begin()
        data = frame(messages.Data, 1, [0, SLOT])
        for frames in ((frame(messages.Open, 1, "tunnel", [], 1000), data), (data,)):
            guest.send(*frames)
            if (code := outcome(guest)) is not None:
                assert code is ErrorCode.PROTOCOL
                break
            assert guest.use().held == 0
        guest.check()


def test_a_run_that_need_not_begin_or_end_anywhere(guest: HostileGuest) -> None:
    """Lengths are bytes, and every slot may be the first: what is written is that and no more."""
    node = guest.node(b"file")
    with guest.mapped() as mapped:
        for first, length in [(0, 1), (3, SLOT + 1), (FILES.slots - 1, SLOT - 1), (5, MAX_RUN - 7)]:
            content = os.urandom(length)
            mapped.own[first * SLOT : first * SLOT + length] = content
            assert guest.write(node, [first, length]).errno == 0
            assert (guest.top / "open/file").read_bytes()[:length] == content
            (guest.top / "open/file").write_bytes(b"")


# --- giving back -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "slots",
    [
        bitmap(1),
        bitmap(1 << (FILES.slots - 1)),
        bitmap(ALL),
        bytes(16) + b"\1",
        bytes(17),
        bytes(100_000),
        1,
        None,
        "x",
    ],
    ids=lambda slots: repr(slots)[:20],
)
def test_giving_back_what_was_not_lent(guest: HostileGuest, slots: Any) -> None:
    assert_refused(guest, frame(messages.Free, slots))


def test_giving_back_twice(guest: HostileGuest) -> None:
    result = guest.read(guest.node(b"large"))
    assert result.run is not None
    mask = mask_of(result.run)
    guest.free(mask)
    assert_refused(guest, frame(messages.Free, bitmap(mask)))


def test_giving_back_twice_in_one_breath(guest: HostileGuest) -> None:
    guest.read(guest.node(b"large"))
    back = frame(messages.Free, bitmap(guest.lent))
    assert_refused(guest, back, back)


def test_giving_back_more_than_was_lent(guest: HostileGuest) -> None:
    guest.read(guest.node(b"large"))
    assert_refused(guest, frame(messages.Free, bitmap(guest.lent | guest.lent << 1)))


def test_giving_back_what_is_about_to_be_lent(guest: HostileGuest) -> None:
    read = codec.encode(Read(SHARE, guest.unique(), guest.node(b"large"), 0, MAX_RUN))
    assert_refused(guest, call(guest.number(), Read.OP, read), frame(messages.Free, bitmap(ALL)))


def test_giving_back_what_one_has_shown(guest: HostileGuest) -> None:
    """The slots of a call are the guest's own; the result gives them back."""
    write = codec.encode(Write(SHARE, guest.unique(), guest.node(b"file"), 0))
    assert_refused(
        guest, call(guest.number(), Write.OP, write, run=[0, SLOT]), frame(messages.Free, bitmap(1))
    )


def test_giving_back_nothing_and_by_parts(guest: HostileGuest) -> None:
    """Slot by slot, in any order; an empty bitmap is none."""
    guest.read(guest.node(b"large"))
    for slot in random.Random(1).sample(range(FILES.slots), FILES.slots):
        guest.send(frame(messages.Free, b""))
        if guest.lent >> slot & 1:
            guest.free(1 << slot)
    assert guest.use().lent == 0


def test_keeping_everything(guest: HostileGuest) -> None:
    """Then there is nothing more in memory, and all goes on."""
    node = guest.node(b"large")
    results = [guest.read(node) for _ in range(FILES.slots // OF_A_RUN + 8)]
    assert guest.lent == ALL
    assert {result.payload for result in results[-8:]} == {LARGE}


# --- what the slots hold ---------------------------------------------------------------------------


def test_bytes_that_change_while_they_are_written(guest: HostileGuest) -> None:
    """The file gets some of each, and as many as were to be written."""
    node = guest.node(b"file")
    file = guest.top / "open/file"
    over = threading.Event()
    with guest.mapped() as mapped:
        mapped.own[:MAX_RUN] = b"A" * MAX_RUN

        def change() -> None:
            blocks = [letter * SLOT for letter in (b"A", b"B")]
            while not over.is_set():
                for block in blocks:
                    for slot in range(OF_A_RUN):
                        mapped.own[slot * SLOT : (slot + 1) * SLOT] = block

        thread = threading.Thread(target=change)
        thread.start()
        try:
            for number in range(60):
                append = bool(number % 2)
                file.write_bytes(b"")
                unique = guest.unique()
                for again in range(1, 3):  # the same call with other bytes: done again, or answered as before
                    written = guest.say(Write(SHARE, unique, node, 0, append), [0, MAX_RUN])
                    assert written.errno == 0
                    content = file.read_bytes()
                    assert len(content) in {MAX_RUN, again * MAX_RUN if append else MAX_RUN}
                    assert not content.strip(b"AB")
        finally:
            over.set()
            thread.join()
    assert guest.use().held == 0


def values_of(cls: type[FileCall[Any]], guest: HostileGuest) -> list[Any]:
    """A call of the root, or of nothing, that does no harm; encoded."""
    hints = typing.get_type_hints(cls)
    kinds = {int: 0, bytes: b"nothing", bool: False}
    values = {field.name: kinds.get(hints[field.name], []) for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values.update(share=SHARE, unique=guest.unique(), node=999 if cls.CHANGES else ROOT)
    return codec.encode(cls(**values))


@pytest.mark.parametrize("name", [b"stolen", b"../secret", b"/etc/passwd"])
def test_a_run_for_a_call_that_takes_none(guest: HostileGuest, name: bytes) -> None:
    """It is answered as it would be without, and the slots are free with that."""
    with guest.mapped() as mapped:
        for cls in CALLS.values():
            if cls is Write:
                continue
            content = msgpack.packb([SHARE, guest.unique(), ROOT, name, 0o777, 2, 0, 0])
            mapped.own[: len(content)] = content
            values = values_of(cls, guest)
            without = guest.ask(cls.OP, values).errno
            assert guest.ask(cls.OP, values, run=[0, MAX_RUN]).errno == without, cls
            for args in ([], None, values[:1]):  # nothing is taken from the slots that is not in the frame
                assert guest.ask(cls.OP, args, run=[0, len(content)]).errno == errno.EINVAL, cls
    assert guest.use().held == 0


def test_a_run_for_what_is_no_call_and_no_share(guest: HostileGuest) -> None:
    for op, args, expected in [
        (0, [], errno.ENOSYS), (999, [], errno.ENOSYS), (2**40, None, errno.ENOSYS),
        (Write.OP, codec.encode(Write(SHARE + 1, 2, ROOT, 0)), errno.ENODEV),
        (Write.OP, codec.encode(Write(SHARE, guest.unique(), 123456, 0)), errno.ESTALE),
        (Write.OP, codec.encode(Write(SHARE, guest.unique(), ROOT, 0)), errno.EISDIR),
    ]:  # fmt: skip
        assert guest.ask(op, args, run=[0, MAX_RUN]).errno == expected, (op, args)
    assert guest.use().held == 0


def test_names_are_those_of_the_frame(guest: HostileGuest) -> None:
    share = guest.top / "open"
    with guest.mapped() as mapped:
        mapped.own[: 2 * SLOT] = b"../stolen\0".ljust(2 * SLOT, b"x")
        for name in (b"directory", b"link", b"created"):
            made = {
                b"directory": MakeDirectory(SHARE, guest.unique(), ROOT, name, 0o755),
                b"link": MakeSymlink(SHARE, guest.unique(), ROOT, name, b"target"),
                b"created": Create(SHARE, guest.unique(), ROOT, name, 0o644, os.O_RDWR),
            }[name]
            assert guest.say(made, [0, 2 * SLOT]).errno == 0
        value = SetXattr(SHARE, guest.unique(), guest.node(b"created"), b"user.name", b"value")
        assert guest.say(value, [0, SLOT]).errno in (0, errno.EOPNOTSUPP)
    assert sorted(os.listdir(share)) == ["created", "directory", "file", "large", "link"]
    assert os.readlink(share / "link") == "target"
    assert (share / "created").read_bytes() == b""
    (share / "directory").rmdir()
    (share / "link").unlink()
    (share / "created").unlink()


def test_names_and_values_are_never_answered_in_memory(guest: HostileGuest) -> None:
    """Which the guest could change while its agent reads them: not our harm, but no promise of ours either."""
    share = guest.top / "open"
    long = "x" * 200
    for number in range(200):
        (share / f"{long}{number}").touch()
    (share / "link").symlink_to("y" * 4000)
    try:
        for question in (
            List(SHARE, guest.unique(), ROOT, 1, 0),
            List(SHARE, guest.unique(), ROOT, 2, 0, True),
            Lookup(SHARE, guest.unique(), ROOT, b"link"),
            ReadLink(SHARE, guest.unique(), guest.node(b"link")),
            GetXattr(SHARE, guest.unique(), guest.node(b"file"), b"user.none"),
            GetAttributes(SHARE, guest.unique(), ROOT),
        ):
            assert guest.say(question).run is None
        assert guest.use().lent == 0
    finally:
        for path in share.iterdir():
            if path.name.startswith("x") or path.name == "link":
                path.unlink()


# --- offers ----------------------------------------------------------------------------------------

HALF = FILE_SIZE // 2
NOT_THERE: dict[str, list[int]] = {
    "nothing": [],
    "no length": [START],
    "three numbers": [START, HALF, START + HALF],
    "too short": [START, FILE_SIZE - 4096],
    "too long": [START, FILE_SIZE + 4096],
    "beyond the device": [SIZE, FILE_SIZE],
    "ending beyond the device": [SIZE - FILE_SIZE + 4096, FILE_SIZE],
    "far beyond the device": [2**62, FILE_SIZE],
    "the largest numbers": [2**64 - 4096, 2**64 - 4096],
    "before the device": [-4096, FILE_SIZE],
    "no page": [START + 1, FILE_SIZE],
    "a negative piece": [START, FILE_SIZE + 4096, START + FILE_SIZE + 4096, -4096],
    "an empty piece": [START, FILE_SIZE, START + FILE_SIZE, 0],
    "the same piece twice": [START, HALF, START, HALF],
    "overlapping pieces": [START, HALF, START + HALF - 4096, HALF],
    "pieces apart": [START, HALF, START + HALF + 4096, HALF],
    "pieces in another order": [START + HALF, HALF, START, HALF],
    "too many pieces": [
        number for at in range(MAX_EXTENTS + 1) for number in (START + at * 4096, 4096)
    ] + [START + (MAX_EXTENTS + 1) * 4096, FILE_SIZE - (MAX_EXTENTS + 1) * 4096],
}  # fmt: skip


def assert_inline(guest: HostileGuest) -> None:
    """The session goes on without memory, in which there is no reference to any."""
    assert not guest.has_memory
    node = guest.node(b"large")
    result = guest.read(node)
    assert (result.run, result.payload) == (None, LARGE)
    use = guest.use()
    assert (use.active, use.mine, use.held, use.old) == (False, 0, 0, 0)
    with pytest.raises(Ended):
        guest.write(node, [0, SLOT])


@pytest.mark.parametrize("extents", NOT_THERE.values(), ids=NOT_THERE.keys())
def test_an_offer_of_what_is_not_there(guest: HostileGuest, extents: list[int]) -> None:
    guest.begin(BulkOffer(extents, guest.mark()))
    assert_inline(guest)


@pytest.mark.parametrize("length", [0, 1, MARK_SIZE - 1, MARK_SIZE, MARK_SIZE + 1, 4096])
def test_a_mark_that_is_another(guest: HostileGuest, length: int) -> None:
    mark = guest.mark()
    wrong = (mark * 256)[:length] if length != MARK_SIZE else mark[:-1] + bytes([mark[-1] ^ 1])
    guest.begin(BulkOffer([START, FILE_SIZE], wrong))
    assert_inline(guest)


def test_a_mark_of_the_session_before(guest: HostileGuest) -> None:
    old = guest.mark()
    guest.mark()
    guest.begin(BulkOffer([START, FILE_SIZE], old))
    assert_inline(guest)


def test_no_offer_and_references_all_the_same(guest: HostileGuest) -> None:
    guest.begin(None)
    assert_inline(guest)


@pytest.mark.parametrize(
    "offer",
    [
        (),
        (1,),
        ([], b"", b"", "more"),
        ("x", b"m" * 16),
        ([None], b"m" * 16),
        ([START, "x"], b""),
        ([START], 5),
        ({}, {}),
    ],
    ids=lambda offer: repr(offer)[:30],
)
def test_an_offer_of_another_shape(guest: HostileGuest, offer: tuple[Any, ...]) -> None:
    """That is no hello, or one of a later version: the session ends, or has no memory."""
    try:
        guest.begin_with(*offer)
    except Ended as ended:
        code = ended.code
    else:
        code = ErrorCode.PROTOCOL
        assert_inline(guest)
    assert code is ErrorCode.PROTOCOL


@pytest.mark.parametrize("start", [0, 4096, SIZE - FILE_SIZE])
def test_another_place_of_ones_own_device(guest: HostileGuest, start: int) -> None:
    """Be it that of the filesystem: it is the guest's own, and it gets what it asks for."""
    with guest.memory.path.open("rb") as file:
        before = os.pread(file.fileno(), START, 0)
    try:
        guest.begin(BulkOffer([start, FILE_SIZE], guest.mark(start)))
        assert guest.has_memory
        result = guest.read(guest.node(b"large"))
        assert result.run is not None
        with guest.mapped(start) as mapped:
            assert mapped.hosts[result.run[0] * SLOT :][:MAX_RUN] == LARGE
    finally:
        with guest.memory.path.open("r+b") as file:
            os.pwrite(file.fileno(), before, 0)


@pytest.mark.parametrize("busy", [bytes(16) + b"\1", b"\xff" * 17, bytes(17), b"\xff" * 100_000], ids=len)
def test_busy_with_slots_that_do_not_exist(guest: HostileGuest, busy: bytes) -> None:
    with pytest.raises(Ended) as ended:
        guest.begin(busy=busy)
    assert ended.value.code is ErrorCode.PROTOCOL


def test_busy_with_everything(guest: HostileGuest) -> None:
    """There is nothing to fill until some of it comes back; and each slot does so once."""
    guest.begin(busy=b"\xff" * 16)
    node = guest.node(b"large")
    assert (guest.read(node).run, guest.use().busy) == (None, ALL)
    guest.free(ALL >> OF_A_RUN)
    assert guest.read(node).run is not None
    guest.free(guest.lent)
    guest.free(ALL & ~(ALL >> OF_A_RUN))
    assert_refused(guest, frame(messages.Free, bitmap(1)))


def test_what_is_busy_is_not_filled(guest: HostileGuest) -> None:
    """Said by who reads on what an earlier session has lent; and by who does not."""
    node = guest.node(b"large")
    guest.read(node)
    kept = guest.lent
    guest.begin(busy=bitmap(kept))
    while guest.read(guest.node(b"large")).run is not None:
        assert not guest.lent & kept
    assert guest.lent == ALL & ~kept
    guest.free(kept)
    assert guest.read(node).run is not None


# --- all of it -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_anything_in_any_order(guest: HostileGuest, seed: int) -> None:
    chance = random.Random(seed)
    share = guest.top / "open"

    def any_run() -> Any:
        if chance.random() < 0.1:
            return chance.choice(NO_RUNS)
        return [chance.randrange(FILES.slots), chance.choice([1, 5000, SLOT, SLOT + 1, MAX_RUN])]

    def anything() -> bytes:
        number, node = guest.number(), chance.choice([ROOT, file, large, 12345])
        kind = chance.randrange(10)
        if kind < 3:
            write = Write(SHARE, guest.unique(), chance.choice([file, 12345]), chance.randrange(MAX_DATA))
            return call(number, Write.OP, codec.encode(write), run=any_run())
        if kind < 7:
            read = Read(SHARE, guest.unique(), node, 0, chance.choice([0, 1, 4096, MAX_DATA, 2**40]))
            return call(number, Read.OP, codec.encode(read), run=None if chance.random() < 0.8 else any_run())
        if kind < 9:
            back = guest.lent & chance.getrandbits(FILES.slots)
            guest.lent &= ~back
            return frame(messages.Free, bitmap(back))
        return frame(messages.Free, bitmap(1 << chance.randrange(FILES.slots)))

    reasons: list[ErrorCode | None] = []
    for _ in range(15):
        guest.begin(busy=bitmap(guest.lent & chance.getrandbits(FILES.slots)))
        file, large = guest.node(b"file"), guest.node(b"large")
        try:
            for _ in range(10):
                guest.send(*(anything() for _ in range(chance.randrange(1, 8))))
                guest.settle()
                if chance.random() < 0.3:
                    guest.free(guest.lent)
        except Ended as ended:
            reasons.append(ended.code)
    assert set(reasons) == {ErrorCode.PROTOCOL}
    assert sorted(os.listdir(share)) == ["file", "large"]
