"""The ABI against the kernel's own header, where it is installed, and against messages packed by hand."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guest_agent.fuse import abi
from guest_agent.fuse.abi import Init, Negotiated, Opcode
from protocol.files import ATTR

HEADER = Path("/usr/include/linux/fuse.h")
needs_header = pytest.mark.skipif(not HEADER.exists(), reason="linux-libc-dev is not installed")

WIDTH = {"uint64_t": 8, "int64_t": 8, "uint32_t": 4, "int32_t": 4, "uint16_t": 2, "char": 1}

U64 = st.integers(0, 2**64 - 1)
U32 = st.integers(0, 2**32 - 1)
NAME = st.binary(min_size=1, max_size=255).filter(lambda name: b"\0" not in name)


def header_structs() -> dict[str, int]:
    """Size in bytes of each struct of the header. Padding is explicit there, so it is the sum of its fields."""
    text = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.DOTALL)
    sizes: dict[str, int] = {}
    for name, body in re.findall(r"struct (\w+) \{(.*?)\n\};", text, re.DOTALL):
        size = 0
        for kind, count in re.findall(r"(\w+)\s+\w+(\[\w*\])?;", body):
            number = 1 if not count else int(count[1:-1] or 0)
            size += number * (WIDTH[kind] if kind in WIDTH else sizes[kind])
        sizes[name] = size
    return sizes


@needs_header
@pytest.mark.parametrize(
    ("struct_name", "size"),
    [
        ("fuse_in_header", abi.IN_HEADER.size),
        ("fuse_out_header", abi.OUT_HEADER.size),
        ("fuse_attr", ATTR.size),
        ("fuse_forget_one", abi._FORGET_ONE.size),
        ("fuse_getattr_in", abi._GETATTR.size),
        ("fuse_setattr_in", abi._SETATTR.size),
        ("fuse_mknod_in", abi._MKNOD.size),
        ("fuse_rename2_in", abi._RENAME2.size),
        ("fuse_create_in", abi._CREATE.size),
        ("fuse_read_in", abi._READ.size),
        ("fuse_write_in", abi._READ.size),
        ("fuse_release_in", abi._RELEASE.size),
        ("fuse_flush_in", abi._FLUSH.size),
        ("fuse_fsync_in", abi._FSYNC.size),
        ("fuse_lk_in", abi._LK.size),
        ("fuse_fallocate_in", abi._FALLOCATE.size),
        ("fuse_lseek_in", abi._LSEEK.size),
        ("fuse_copy_file_range_in", abi._COPY_FILE_RANGE.size),
        ("fuse_ioctl_in", abi._IOCTL.size),
        ("fuse_entry_out", len(abi.entry_out(1, bytes(88)))),
        ("fuse_attr_out", len(abi.attr_out(bytes(88)))),
        ("fuse_open_out", len(abi.open_out(1))),
        ("fuse_write_out", len(abi.write_out(1))),
        ("fuse_statfs_out", len(abi.statfs_out(1, 2, 3, 4, 5, 6, 7, 8))),
        ("fuse_getxattr_out", len(abi.getxattr_out(1))),
        ("fuse_lk_out", len(abi.lk_out(1, 2, 3, 4))),
        ("fuse_lseek_out", len(abi.lseek_out(1))),
        ("fuse_init_out", len(abi.init_out(Negotiated(41, 0)))),
        ("fuse_notify_inval_inode_out", len(abi.inval_inode(1, 2, 3)) - 16),
        ("fuse_notify_inval_entry_out", len(abi.inval_entry(1, b"")) - 16 - 1),
    ],
)
def test_sizes_are_the_headers(struct_name: str, size: int) -> None:
    assert header_structs()[struct_name] == size


@needs_header
def test_numbers_are_the_headers() -> None:
    text = HEADER.read_text()
    opcodes = {name: int(value) for name, value in re.findall(r"\bFUSE_(\w+)\s*=\s*(\d+),", text)}
    for opcode in Opcode:
        if opcode.name in opcodes:  # an older header does not know the newest
            assert opcodes[opcode.name] == opcode
    flags = dict(re.findall(r"#define FUSE_(\w+)\s+\(1(?:ULL)? << (\d+)\)", text))
    known = [flag for flag in Init if flag.name in flags]
    assert len(known) > 20
    for flag in known:
        assert flag.name is not None
        assert int(flag) == 1 << int(flags[flag.name])


# --- requests ----------------------------------------------------------------------------------------


@given(U32, st.integers(2, 2**63 - 1), U64, U32, U32, U32, st.binary(max_size=64), st.booleans())
def test_a_request_is_its_header_and_its_body(
    opcode: int, unique: int, node: int, uid: int, gid: int, pid: int, body: bytes, resent: bool
) -> None:
    wire_unique = unique | (1 << 63 if resent else 0)
    header = struct.pack("<IIQQIIIHH", 40 + len(body), opcode, wire_unique, node, uid, gid, pid, 0, 0)
    request = abi.parse_request(memoryview(header + body))
    assert (request.opcode, request.unique, request.nodeid) == (opcode, unique, node)
    assert (request.uid, request.gid, request.pid) == (uid, gid, pid)
    assert request.body == body
    assert request.resent is resent


def test_a_request_says_what_it_is() -> None:
    again = abi.Request(Opcode.MKDIR, 4, 1, 0, 0, 77, memoryview(b"abc"), resent=True)
    assert repr(again) == "<MKDIR unique=4 node=1 pid=77 3 B resent>"
    assert repr(abi.Request(999, 4, 1, 0, 0, 77, memoryview(b""))) == "<999 unique=4 node=1 pid=77 0 B>"


@given(NAME, NAME, U64, U32)
def test_names(first: bytes, second: bytes, node: int, number: int) -> None:
    def view(data: bytes) -> memoryview:
        return memoryview(bytearray(data))

    one, two = first + b"\0", first + b"\0" + second + b"\0"
    assert abi.parse_name(view(one)) == first
    assert abi.parse_symlink(view(two)) == (first, second)
    assert abi.parse_link(view(struct.pack("<Q", node) + one)) == (node, first)
    assert abi.parse_mkdir(view(struct.pack("<II", number, 0o22) + one)) == (number, 0o22, first)
    assert abi.parse_mknod(view(struct.pack("<IIII", number, 5, 0o22, 0) + one)) == (number, 5, 0o22, first)
    assert abi.parse_create(view(struct.pack("<IIII", 2, number, 0o22, 1) + one)) == (
        2,
        number,
        0o22,
        1,
        first,
    )
    assert abi.parse_rename(view(struct.pack("<Q", node) + two)) == (node, 0, first, second)
    assert abi.parse_rename2(view(struct.pack("<QII", node, 2, 0) + two)) == (node, 2, first, second)
    assert abi.parse_getxattr(view(struct.pack("<II", number, 0) + one)) == (number, first)
    assert abi.parse_listxattr(view(struct.pack("<II", number, 0))) == number


@given(NAME, st.binary(max_size=300), U32)
def test_an_xattrs_value_may_have_any_bytes(name: bytes, value: bytes, flags: int) -> None:
    body = struct.pack("<II", len(value), flags) + name + b"\0" + value
    assert abi.parse_setxattr(memoryview(body)) == (flags, name, value)


@given(U64, U64, st.integers(0, 500), U32, U64, U32, st.binary(max_size=500))
def test_reads_and_writes(
    fh: int, offset: int, size: int, flags: int, owner: int, mode: int, data: bytes
) -> None:
    fixed = struct.pack("<QQIIQII", fh, offset, len(data), flags, owner, mode, 0)
    assert abi.parse_read(memoryview(fixed)) == (fh, offset, len(data), flags, owner, mode)
    *fields, written = abi.parse_write(memoryview(fixed + data))
    assert tuple(fields) == (fh, offset, len(data), flags, owner, mode)
    assert written == data


def test_a_writes_data_is_not_copied() -> None:
    message = bytearray(struct.pack("<QQIIQII", 0, 0, 3, 0, 0, 0, 0) + b"abc")
    data = abi.parse_write(memoryview(message))[-1]
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
    assert abi.parse_setattr(memoryview(body)) == (0x1FF, 1, 2, 3, ns, ns, ns, 0o644, 10, 20)


def test_the_rest() -> None:
    def view(layout: str, *values: int) -> memoryview:
        return memoryview(struct.pack(layout, *values))

    assert abi.parse_forget(view("<Q", 7)) == 7
    assert abi.parse_batch_forget(view("<IIQQQQ", 2, 0, 11, 1, 12, 2)) == ([11, 12], [1, 2])
    assert abi.parse_getattr(view("<IIQ", 1, 0, 9)) == (1, 9)
    assert abi.parse_open(view("<II", 2, 1)) == (2, 1)
    assert abi.parse_release(view("<QIIQ", 1, 2, 3, 4)) == (1, 2, 3, 4)
    assert abi.parse_flush(view("<QIIQ", 1, 0, 0, 4)) == (1, 4)
    assert abi.parse_fsync(view("<QII", 1, 1, 0)) == (1, 1)
    assert abi.parse_lk(view("<QQQQIIII", 1, 2, 3, 4, 5, 6, 1, 0)) == (1, 2, 3, 4, 5, 6, 1)
    assert abi.parse_access(view("<II", 4, 0)) == 4
    assert abi.parse_fallocate(view("<QQQII", 1, 2, 3, 4, 0)) == (1, 2, 3, 4)
    assert abi.parse_lseek(view("<QQII", 1, 2, 3, 0)) == (1, 2, 3)
    assert abi.parse_copy_file_range(view("<7Q", 1, 2, 3, 4, 5, 6, 0)) == (1, 2, 3, 4, 5, 6, 0)
    assert abi.parse_ioctl(view("<QIIQII", 1, 2, 3, 4, 5, 6)) == (1, 2, 3, 4, 5, 6)


@pytest.mark.parametrize("unique", [6, 6 | 1 << 63])
def test_an_interrupt_names_a_request_as_the_handler_knows_it(unique: int) -> None:
    assert abi.parse_interrupt(memoryview(struct.pack("<Q", unique))) == 6


# --- replies -----------------------------------------------------------------------------------------


def test_an_entry_without_a_promise_may_not_be_kept() -> None:
    attr = bytes(range(88))
    assert abi.entry_out(9, attr) == struct.pack("<QQQQII", 9, 0, 0, 0, 0, 0) + attr
    assert (
        abi.entry_out(9, attr, 1_500_000_000, 2) == struct.pack("<QQQQII", 9, 0, 1, 0, 500_000_000, 2) + attr
    )
    assert abi.attr_out(attr) == bytes(16) + attr
    assert abi.attr_out(attr, 3_000_000_001) == struct.pack("<QII", 3, 1, 0) + attr
    assert abi.create_out(9, attr, 5, 2) == abi.entry_out(9, attr) + struct.pack("<QII", 5, 2, 0)


def test_statfs_has_the_fields_in_the_kernels_order() -> None:
    out = struct.unpack("<5Q4I6I", abi.statfs_out(1, 2, 3, 4, 5, 6, 7, 8))
    assert out == (1, 2, 3, 4, 5, 6, 7, 8, *[0] * 7)


# --- INIT --------------------------------------------------------------------------------------------


def init_in(minor: int, flags: int, major: int = 7) -> memoryview:
    return memoryview(struct.pack("<5I44x", major, minor, 131072, flags & 0xFFFFFFFF, flags >> 32))


def test_flags_above_32_count_only_where_the_kernel_says_so() -> None:
    offered = int(Init.HAS_RESEND | Init.ASYNC_READ)
    assert abi.parse_init(init_in(41, offered)) == (7, 41, 131072, int(Init.ASYNC_READ))
    offered |= Init.INIT_EXT
    assert abi.parse_init(init_in(41, offered)) == (7, 41, 131072, offered)
    assert abi.parse_init(init_in(31, offered)[:16])[3] == offered & 0xFFFFFFFF  # before Linux 5.17


@given(st.integers(31, 60), U64, U64)
def test_only_what_both_sides_have_is_negotiated(minor: int, offered: int, wanted: int) -> None:
    negotiated = abi.negotiate(7, minor, offered, wanted)
    assert negotiated.minor == min(minor, abi.MINOR)
    assert negotiated.flags == offered & wanted
    fields = struct.unpack("<IIIIHHIIHHI28x", abi.init_out(negotiated))
    assert fields[:2] == (7, negotiated.minor)
    assert fields[3] | fields[10] << 32 == negotiated.flags
    assert fields[6:9] == (1 << 20, 1, 256)


@pytest.mark.parametrize(("major", "minor"), [(7, 30), (6, 41), (8, 0)])
def test_another_protocol_is_refused_with_both_versions(major: int, minor: int) -> None:
    with pytest.raises(abi.Unsupported, match=rf"speaks FUSE {major}\.{minor}; 7\.31"):
        abi.negotiate(major, minor, 0, abi.WANTED)


def test_what_would_break_coherence_is_never_wanted() -> None:
    harmful = (
        Init.WRITEBACK_CACHE | Init.AUTO_INVAL_DATA | Init.EXPLICIT_INVAL_DATA | Init.ATOMIC_O_TRUNC
        | Init.DO_READDIRPLUS | Init.POSIX_ACL | Init.DONT_MASK | Init.NO_OPENDIR_SUPPORT | Init.SETXATTR_EXT
        | Init.SECURITY_CTX | Init.CREATE_SUPP_GROUP
    )  # fmt: skip
    assert (abi.WANTED | abi.WANTED_FOR_LOCKS) & harmful == 0


# --- notifications -----------------------------------------------------------------------------------


def test_notifications() -> None:
    assert abi.inval_inode(5, 4096, -1) == struct.pack("<IiQQqq", 40, 2, 0, 5, 4096, -1)
    assert abi.inval_entry(1, b"name") == struct.pack("<IiQQII", 37, 3, 0, 1, 4, 0) + b"name\0"
    assert struct.pack("<IiQ", 16, 7, 0) == abi.RESEND
