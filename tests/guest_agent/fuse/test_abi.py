"""The framing against the kernel's own header, where it is installed, and against messages packed by hand."""

from __future__ import annotations

import re
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guest_agent.fuse import abi
from guest_agent.fuse.abi import Init, Negotiated, Opcode
from protocol.files import ATTR
from tests.guest_agent.fuse.kernel_header import HEADER, header_structs, needs_header

U64 = st.integers(0, 2**64 - 1)
U32 = st.integers(0, 2**32 - 1)


@needs_header
@pytest.mark.parametrize(
    ("struct_name", "size"),
    [
        ("fuse_in_header", abi.IN_HEADER.size),
        ("fuse_out_header", abi.OUT_HEADER.size),
        ("fuse_attr", ATTR.size),
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
        | Init.READDIRPLUS_AUTO | Init.POSIX_ACL | Init.DONT_MASK | Init.SETXATTR_EXT
        | Init.SECURITY_CTX | Init.CREATE_SUPP_GROUP
    )  # fmt: skip
    assert (abi.WANTED | abi.WANTED_FOR_LOCKS) & harmful == 0


# --- notifications -----------------------------------------------------------------------------------


def test_notifications() -> None:
    assert abi.inval_inode(5, 4096, -1) == struct.pack("<IiQQqq", 40, 2, 0, 5, 4096, -1)
    assert abi.inval_entry(1, b"name") == struct.pack("<IiQQII", 37, 3, 0, 1, 4, 0) + b"name\0"
    assert struct.pack("<IiQ", 16, 7, 0) == abi.RESEND
