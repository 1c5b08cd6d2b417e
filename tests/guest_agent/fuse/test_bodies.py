"""Bodies against the kernel's own header, where it is installed, and against messages packed by hand."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guest_agent.fuse import bodies
from protocol.files import ATTRIBUTES, FOREVER
from protocol.files import NAME as NAME_BIT
from tests.guest_agent.fuse.kernel_header import header_structs, needs_header

U64 = st.integers(0, 2**64 - 1)
U32 = st.integers(0, 2**32 - 1)
NAME = st.binary(min_size=1, max_size=255).filter(lambda name: b"\0" not in name)


@needs_header
@pytest.mark.parametrize(
    ("struct_name", "size"),
    [
        ("fuse_forget_one", bodies._FORGET_ONE.size),
        ("fuse_getattr_in", bodies._GETATTR.size),
        ("fuse_setattr_in", bodies._SETATTR.size),
        ("fuse_mknod_in", bodies._MKNOD.size),
        ("fuse_rename2_in", bodies._RENAME2.size),
        ("fuse_create_in", bodies._CREATE.size),
        ("fuse_read_in", bodies._READ.size),
        ("fuse_write_in", bodies._READ.size),
        ("fuse_release_in", bodies._RELEASE.size),
        ("fuse_flush_in", bodies._FLUSH.size),
        ("fuse_fsync_in", bodies._FSYNC.size),
        ("fuse_lk_in", bodies._LK.size),
        ("fuse_fallocate_in", bodies._FALLOCATE.size),
        ("fuse_lseek_in", bodies._LSEEK.size),
        ("fuse_copy_file_range_in", bodies._COPY_FILE_RANGE.size),
        ("fuse_ioctl_in", bodies._IOCTL.size),
        ("fuse_entry_out", len(bodies.entry_out(1, bytes(88)))),
        ("fuse_attr_out", len(bodies.attr_out(bytes(88)))),
        ("fuse_open_out", len(bodies.open_out(1))),
        ("fuse_write_out", len(bodies.write_out(1))),
        ("fuse_statfs_out", len(bodies.statfs_out(1, 2, 3, 4, 5, 6, 7, 8))),
        ("fuse_getxattr_out", len(bodies.getxattr_out(1))),
        ("fuse_lk_out", len(bodies.lk_out(1, 2, 3, 4))),
        ("fuse_lseek_out", len(bodies.lseek_out(1))),
    ],
)
def test_sizes_are_the_headers(struct_name: str, size: int) -> None:
    assert header_structs()[struct_name] == size


# --- requests ----------------------------------------------------------------------------------------


@given(NAME, NAME, U64, U32)
def test_names(first: bytes, second: bytes, node: int, number: int) -> None:
    def view(data: bytes) -> memoryview:
        return memoryview(bytearray(data))

    one, two = first + b"\0", first + b"\0" + second + b"\0"
    assert bodies.parse_name(view(one)) == first
    assert bodies.parse_symlink(view(two)) == (first, second)
    assert bodies.parse_link(view(struct.pack("<Q", node) + one)) == (node, first)
    assert bodies.parse_mkdir(view(struct.pack("<II", number, 0o22) + one)) == (number, 0o22, first)
    assert bodies.parse_mknod(view(struct.pack("<IIII", number, 5, 0o22, 0) + one)) == (
        number,
        5,
        0o22,
        first,
    )
    assert bodies.parse_create(view(struct.pack("<IIII", 2, number, 0o22, 1) + one)) == (
        2,
        number,
        0o22,
        1,
        first,
    )
    assert bodies.parse_rename(view(struct.pack("<Q", node) + two)) == (node, 0, first, second)
    assert bodies.parse_rename2(view(struct.pack("<QII", node, 2, 0) + two)) == (node, 2, first, second)
    assert bodies.parse_getxattr(view(struct.pack("<II", number, 0) + one)) == (number, first)
    assert bodies.parse_listxattr(view(struct.pack("<II", number, 0))) == number


@given(NAME, st.binary(max_size=300), U32)
def test_an_xattrs_value_may_have_any_bytes(name: bytes, value: bytes, flags: int) -> None:
    body = struct.pack("<II", len(value), flags) + name + b"\0" + value
    assert bodies.parse_setxattr(memoryview(body)) == (flags, name, value)


@given(U64, U64, st.integers(0, 500), U32, U64, U32, st.binary(max_size=500))
def test_reads_and_writes(
    fh: int, offset: int, size: int, flags: int, owner: int, mode: int, data: bytes
) -> None:
    fixed = struct.pack("<QQIIQII", fh, offset, len(data), flags, owner, mode, 0)
    assert bodies.parse_read(memoryview(fixed)) == (fh, offset, len(data), flags, owner, mode)
    *fields, written = bodies.parse_write(memoryview(fixed + data))
    assert tuple(fields) == (fh, offset, len(data), flags, owner, mode)
    assert written == data


def test_a_writes_data_is_not_copied() -> None:
    message = bytearray(struct.pack("<QQIIQII", 0, 0, 3, 0, 0, 0, 0) + b"abc")
    data = bodies.parse_write(memoryview(message))[-1]
    message[-3:] = b"xyz"
    assert data == b"xyz"


@pytest.mark.parametrize(
    ("seconds", "nanoseconds", "ns"),
    [
        (0, 0, 0),
        (1_700_000_000, 5, 1_700_000_000_000_000_005),
        (2**64 - 1, 0, -1_000_000_000),
        (2**64 - 1, 999_999_999, -1),
    ],
)
def test_times_may_be_before_1970(seconds: int, nanoseconds: int, ns: int) -> None:
    body = struct.pack(
        "<IIQQQQQQIIIIIIII",
        0x1FF, 0, 1, 2, 3, seconds, seconds, seconds, nanoseconds, nanoseconds, nanoseconds, 0o644, 0, 10, 20, 0,
    )  # fmt: skip
    assert bodies.parse_setattr(memoryview(body)) == (0x1FF, 1, 2, 3, ns, ns, ns, 0o644, 10, 20)


def test_the_rest() -> None:
    def view(layout: str, *values: int) -> memoryview:
        return memoryview(struct.pack(layout, *values))

    assert bodies.parse_forget(view("<Q", 7)) == 7
    assert bodies.parse_batch_forget(view("<IIQQQQ", 2, 0, 11, 1, 12, 2)) == ([11, 12], [1, 2])
    assert bodies.parse_getattr(view("<IIQ", 1, 0, 9)) == (1, 9)
    assert bodies.parse_open(view("<II", 2, 1)) == (2, 1)
    assert bodies.parse_release(view("<QIIQ", 1, 2, 3, 4)) == (1, 2, 3, 4)
    assert bodies.parse_flush(view("<QIIQ", 1, 0, 0, 4)) == (1, 4)
    assert bodies.parse_fsync(view("<QII", 1, 1, 0)) == (1, 1)
    assert bodies.parse_lk(view("<QQQQIIII", 1, 2, 3, 4, 5, 6, 1, 0)) == (1, 2, 3, 4, 5, 6, 1)
    assert bodies.parse_access(view("<II", 4, 0)) == 4
    assert bodies.parse_fallocate(view("<QQQII", 1, 2, 3, 4, 0)) == (1, 2, 3, 4)
    assert bodies.parse_lseek(view("<QQII", 1, 2, 3, 0)) == (1, 2, 3)
    assert bodies.parse_copy_file_range(view("<7Q", 1, 2, 3, 4, 5, 6, 0)) == (1, 2, 3, 4, 5, 6, 0)
    assert bodies.parse_ioctl(view("<QIIQII", 1, 2, 3, 4, 5, 6)) == (1, 2, 3, 4, 5, 6)


@pytest.mark.parametrize("unique", [6, 6 | 1 << 63])
def test_an_interrupt_names_a_request_as_the_handler_knows_it(unique: int) -> None:
    assert bodies.parse_interrupt(memoryview(struct.pack("<Q", unique))) == 6


# --- replies -----------------------------------------------------------------------------------------


def test_an_entry_without_a_promise_may_not_be_kept() -> None:
    attr = bytes(range(88))
    assert bodies.entry_out(9, attr) == struct.pack("<QQQQII", 9, 0, 0, 0, 0, 0) + attr
    assert bodies.attr_out(attr) == bytes(16) + attr
    assert bodies.create_out(9, attr, 5, 2) == bodies.entry_out(9, attr) + struct.pack("<QII", 5, 2, 0)


@pytest.mark.parametrize(
    ("valid", "name", "attributes", "ns"),
    [
        (0, 0, 0, 0),
        (NAME_BIT, FOREVER, 0, 0),
        (ATTRIBUTES, 0, FOREVER, 0),
        (NAME_BIT | ATTRIBUTES, FOREVER, FOREVER, 0),
        (bodies.TICK, 0, 0, 1),
        (NAME_BIT | bodies.TICK, FOREVER, 0, 1),
        (ATTRIBUTES | bodies.TICK, 0, FOREVER, 0),
    ],
)
def test_what_is_promised_is_kept_for_ever(valid: int, name: int, attributes: int, ns: int) -> None:
    attr = bytes(range(88))
    entry = struct.pack("<QQQQII", 9, 0, name, attributes, 0, ns) + attr
    assert bodies.entry_out(9, attr, valid) == entry
    assert bodies.attr_out(attr, valid) == struct.pack("<QII", attributes, ns, 0) + attr
    assert bodies.create_out(9, attr, 5, 2, valid) == entry + struct.pack("<QII", 5, 2, 0)


def test_that_there_is_no_such_name_is_kept_for_ever() -> None:
    assert struct.pack("<QQQQII", 0, 0, FOREVER, 0, 0, 0) + bytes(88) == bodies.ABSENT


def test_statfs_has_the_fields_in_the_kernels_order() -> None:
    out = struct.unpack("<5Q4I6I", bodies.statfs_out(1, 2, 3, 4, 5, 6, 7, 8))
    assert out == (1, 2, 3, 4, 5, 6, 7, 8, *[0] * 7)
