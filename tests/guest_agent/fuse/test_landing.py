"""Where requests land: every one as the kernel said it, data of writes in slots, and no slot lost."""

from __future__ import annotations

import errno
import os
import random
import struct
from collections.abc import Iterator

import pytest

from guest_agent.fuse import abi, bodies
from guest_agent.fuse.abi import Opcode, Request
from guest_agent.fuse.device import Connection
from guest_agent.fuse.landing import HEAD, Landing
from guest_agent.fuse.mounting import MountSpec
from protocol.bulk import INLINE_BELOW, MAX_RUN, SLOT, Bulk, Run

SLOTS = 20
OF_A_REQUEST = MAX_RUN // SLOT
LONGEST_NAME = 255
LONGEST_VALUE = 64 << 10


class Device:
    """What is read from /dev/fuse: one request at a time, whole."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("device")

    def holds(self, opcode: int, body: bytes, unique: int = 6) -> None:
        os.ftruncate(self.fd, 0)
        header = struct.pack("<IIQQIIIHH", 40 + len(body), opcode, unique, 5, 1000, 1001, 42, 0, 0)
        os.pwrite(self.fd, header + body, 0)
        os.lseek(self.fd, 0, os.SEEK_SET)


@pytest.fixture
def device() -> Iterator[Device]:
    device = Device()
    yield device
    os.close(device.fd)


def memory(slots: int = SLOTS) -> Bulk:
    bulk = Bulk()
    bulk.attach(memoryview(bytearray(slots * SLOT)), memoryview(b""))
    bulk.begin(b"")
    return bulk


def write_body(data: bytes) -> bytes:
    return struct.pack("<QQIIQII", 1, 4096, len(data), 0, 0, 0, 0) + data


def noise(size: int) -> bytes:
    return random.Random(size).randbytes(size)


def read(landing: Landing, device: Device, opcode: int, body: bytes, unique: int = 6) -> Request:
    device.holds(opcode, body, unique)
    return landing.read(device.fd)


def data_of(request: Request) -> bytes:
    return bytes(bodies.parse_write(request.body)[-1]) if request.run is None else bytes(request.run.content)


SIZES = [
    0, 1, 40, HEAD, INLINE_BELOW - 1, INLINE_BELOW, INLINE_BELOW + 1, 4096, SLOT - HEAD, SLOT - 1, SLOT, SLOT + 1,
    4 * SLOT + 5, MAX_RUN - 1, MAX_RUN,
]  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
def test_a_write_of_any_size(device: Device, size: int) -> None:
    bulk = memory()
    landing = Landing(bulk)
    data = noise(size)
    request = read(landing, device, Opcode.WRITE, write_body(data), unique=(1 << 63) + 8)
    assert (request.unique, request.resent, request.nodeid, request.pid) == (8, True, 5, 42)
    fh, offset, said, *_ = bodies.parse_write(request.body)
    assert (fh, offset, said) == (1, 4096, size)
    assert data_of(request) == data
    assert (request.run is not None) == (size >= INLINE_BELOW)
    slots = 0 if request.run is None else -(-size // SLOT)
    kept = 0 if request.run is not None else OF_A_REQUEST
    assert bulk.free == SLOTS - slots - kept, "what a request does not need is free at once"
    if request.run is not None:
        request.run.give_back()
    assert bulk.free == SLOTS - kept


@pytest.mark.parametrize("size", SIZES)
def test_without_memory_a_write_is_in_its_body(device: Device, size: int) -> None:
    data = noise(size)
    request = read(Landing(), device, Opcode.WRITE, write_body(data))
    assert request.run is None
    assert data_of(request) == data


@pytest.mark.parametrize("landing", [Landing(), Landing(memory())], ids=["private", "shared"])
@pytest.mark.parametrize("size", [0, 1, 8, 39, 40, 41, 48, 300, INLINE_BELOW + 40, LONGEST_VALUE + 300])
def test_what_is_no_write_is_whole_in_one_piece(device: Device, landing: Landing, size: int) -> None:
    body = noise(size)
    request = read(landing, device, Opcode.SETXATTR, body)
    assert request.run is None
    assert bytes(request.body) == body


@pytest.mark.parametrize("landing", [Landing(), Landing(memory())], ids=["private", "shared"])
def test_the_longest_names_and_values(device: Device, landing: Landing) -> None:
    old, new = b"o" * LONGEST_NAME, b"n" * LONGEST_NAME
    request = read(landing, device, Opcode.RENAME2, struct.pack("<QII", 9, 1, 0) + old + b"\0" + new + b"\0")
    assert bodies.parse_rename2(request.body) == (9, 1, old, new)
    value = noise(LONGEST_VALUE)
    body = struct.pack("<II", len(value), 2) + b"user.name\0" + value
    assert bodies.parse_setxattr(read(landing, device, Opcode.SETXATTR, body).body) == (
        2,
        b"user.name",
        value,
    )
    body = b"link\0" + b"t" * 4095 + b"\0"
    assert bytes(read(landing, device, Opcode.SYMLINK, body).body) == body


def test_requests_in_a_row_do_not_disturb_each_other(device: Device) -> None:
    """Whatever was kept of one stays as it is while the next ones are read."""
    bulk = memory(64)
    landing = Landing(bulk)
    chance = random.Random(1)
    kept: list[tuple[Run, bytes]] = []
    for _ in range(300):
        data = chance.randbytes(chance.choice([10, 3000, SLOT, SLOT + 1, 3 * SLOT, MAX_RUN]))
        opcode = chance.choice([Opcode.WRITE, Opcode.WRITE, Opcode.SETXATTR])
        request = read(landing, device, opcode, write_body(data))
        assert (data_of(request) if opcode is Opcode.WRITE else bytes(request.body[40:])) == data
        if request.run is not None:
            kept.append((request.run, data))
        while kept and chance.random() < 0.4:
            run, data = kept.pop(chance.randrange(len(kept)))
            assert bytes(run.content) == data
            run.give_back()
    for run, data in kept:
        assert bytes(run.content) == data
        run.give_back()
    assert bulk.free in (64, 64 - OF_A_REQUEST)


def test_when_no_run_is_free_it_lands_in_private_and_then_in_slots_again(device: Device) -> None:
    bulk = memory(OF_A_REQUEST)
    landing = Landing(bulk)
    data = noise(MAX_RUN)
    first = read(landing, device, Opcode.WRITE, write_body(data))
    assert first.run is not None
    other = noise(SLOT)
    second = read(landing, device, Opcode.WRITE, write_body(other))
    assert second.run is None
    assert data_of(second) == other
    assert bytes(first.run.content) == data
    first.run.give_back()
    third = read(landing, device, Opcode.WRITE, write_body(other))
    assert third.run is not None
    assert data_of(third) == other


def test_many_short_writes_in_flight_have_slots_each(device: Device) -> None:
    """Each takes a long run and keeps the first slot of it; that must not leave holes that no other fits into."""
    bulk = memory(128)
    landing = Landing(bulk)
    requests = [
        read(landing, device, Opcode.WRITE, write_body(noise(4096))) for _ in range(128 - OF_A_REQUEST)
    ]
    assert all(request.run is not None for request in requests)


def test_a_session_that_ends_takes_nothing_of_what_has_landed(device: Device) -> None:
    bulk = memory(40)
    landing = Landing(bulk)
    data = noise(SLOT)
    request = read(landing, device, Opcode.WRITE, write_body(data))
    read(landing, device, Opcode.GETATTR, bytes(16))  # a run waits for the next write
    bulk.end()
    between = read(landing, device, Opcode.WRITE, write_body(data))
    assert data_of(between) == data
    without = read(landing, device, Opcode.WRITE, write_body(data))
    assert (without.run, data_of(without)) == (None, data)
    bulk.begin(b"")
    after = read(landing, device, Opcode.WRITE, write_body(noise(MAX_RUN)))
    assert data_of(after) == noise(MAX_RUN)
    for one in (request, between):
        assert one.run is not None
        assert bytes(one.run.content) == data
        one.run.give_back()
    assert after.run is not None
    after.run.give_back()
    assert bulk.free == 40


def test_what_the_host_still_reads_is_not_read_into(device: Device) -> None:
    """It said so when the session began: a thread of its writes slots 0 to 7 to a disk."""
    bulk = memory(2 * OF_A_REQUEST)
    bulk.end()
    bulk.begin(b"\xff")
    landing = Landing(bulk)
    taken = [read(landing, device, Opcode.WRITE, write_body(noise(SLOT))).run for _ in range(4)]
    assert [run.first // OF_A_REQUEST for run in taken if run is not None] == [1]
    bulk.freed(b"\xff")
    assert read(landing, device, Opcode.WRITE, write_body(noise(SLOT))).run is not None


def test_nothing_to_read_costs_nothing(device: Device) -> None:
    bulk = memory()
    landing = Landing(bulk)
    theirs, ours = os.pipe2(os.O_NONBLOCK)
    try:
        for _ in range(5):
            with pytest.raises(BlockingIOError):
                landing.read(theirs)
    finally:
        os.close(theirs)
        os.close(ours)
    with pytest.raises(OSError, match="Bad file descriptor"):
        landing.read(-1)
    assert bulk.free == SLOTS - OF_A_REQUEST
    assert read(landing, device, Opcode.WRITE, write_body(noise(SLOT))).run is not None


def test_there_is_room_for_the_largest_request(device: Device) -> None:
    """The kernel reads out nothing (EINVAL) to who has less than the headers and ``max_write`` bytes."""
    assert abi.IN_HEADER.size + 40 + abi.MAX_WRITE <= HEAD + MAX_RUN
    assert abi.IN_HEADER.size + 40 + abi.MAX_WRITE <= abi.BUFFER_BYTES


@pytest.mark.parametrize("gives_back", [False, True])
def test_a_handler_that_fails_keeps_no_slots(
    device: Device, caplog: pytest.LogCaptureFixture, gives_back: bool
) -> None:
    bulk = memory()
    landing = Landing(bulk)

    def handle(request: Request) -> None:
        assert request.run is not None
        if gives_back:
            request.run.give_back()
        raise RuntimeError("a bug")

    answers: list[tuple[int, int]] = []

    class Failing(Connection):
        def fail(self, unique: int, error: int) -> None:
            answers.append((unique, error))

    with Failing(os.dup(device.fd), MountSpec(1, "/nowhere")) as connection:
        for unique in (2, 4, 6):
            connection._dispatch(
                read(landing, device, Opcode.WRITE, write_body(noise(MAX_RUN)), unique), handle
            )
    assert answers == [(unique, errno.EIO) for unique in (2, 4, 6)]
    assert caplog.text.count("RuntimeError: a bug") == 3
    assert bulk.free == SLOTS
