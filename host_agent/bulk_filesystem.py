"""The filesystem on the memory that the VM shares with its host: an ext4 that holds one file.

A guest can only map such a device through a filesystem (Documentation/filesystems/dax.rst). Written here, field by
field as in Documentation/filesystems/ext4/, instead of by mke2fs: seven blocks, and the file is whole from the start,
in one extent that counts as written, at a multiple of 2 MiB. So a guest needs neither to allocate nor to zero
anything, and maps it by huge pages: 25 faults instead of 12,290. The rest of the device is not touched.
"""

from __future__ import annotations

import stat
import struct
from typing import Final

FILE_NAME: Final = "slots"
LABEL: Final = "agentctl-bulk"

FILE_START: Final = 2 << 20
"""Where the file begins in the device, bytes."""

BLOCK: Final = 4096
"""DAX wants blocks of a page."""

_INODES: Final = 16
_INODE_SIZE: Final = 256
_ROOT, _LOST_AND_FOUND, _FILE = 2, 11, 12
_MAGIC: Final = 0xEF53
_BLOCKS_PER_GROUP: Final = 8 * BLOCK

_LONGEST_EXTENT: Final = 32768
"""Blocks of one extent that is initialised."""

# The blocks that are written; all is in one group.
_SUPERBLOCK, _GROUPS, _BLOCK_BITMAP, _INODE_BITMAP, _INODE_TABLE, _ROOT_BLOCK, _LOST_BLOCK, _METADATA = range(
    8
)

_FILETYPE, _EXTENTS = 0x2, 0x40  # incompatible features
_SPARSE_SUPER: Final = 0x1  # a read-only compatible one
_USES_EXTENTS: Final = 0x80000  # flag of an inode
_EXTENT_MAGIC: Final = 0xF30A
_IS_FILE, _IS_DIRECTORY = 1, 2  # types of directory entries
_UUID: Final = bytes.fromhex("0b5a1cf07a9d4f0c9a3e6d1e5f7b2c48")


def blocks(size: int, file_size: int) -> list[tuple[int, bytes]]:
    """What is to be written to a zeroed device of ``size`` bytes: offsets and contents.

    Its one file has ``file_size`` bytes, and is whatever the device holds from ``FILE_START`` on.
    """
    total, length, start = size // BLOCK, file_size // BLOCK, FILE_START // BLOCK
    if size % BLOCK or file_size % BLOCK or start + length > total:
        raise ValueError(f"a file of {file_size} bytes does not fit into a device of {size}")
    if total > _BLOCKS_PER_GROUP or length > _LONGEST_EXTENT:
        raise ValueError(f"a device of {size} bytes needs more than one group or extent")
    free = total - _METADATA - length
    here, above = (_ROOT, b".", _IS_DIRECTORY), (_ROOT, b"..", _IS_DIRECTORY)
    lost = (_LOST_AND_FOUND, b"lost+found", _IS_DIRECTORY)
    contents = {
        _SUPERBLOCK: bytes(1024) + _superblock(total, free),
        _GROUPS: _group(free),
        _BLOCK_BITMAP: _bitmap(total, range(_METADATA), range(start, start + length)),
        _INODE_BITMAP: _bitmap(_INODES, range(_FILE)),
        _INODE_TABLE: _inodes(start, length),
        _ROOT_BLOCK: _directory(here, above, lost, (_FILE, FILE_NAME.encode(), _IS_FILE)),
        _LOST_BLOCK: _directory((_LOST_AND_FOUND, b".", _IS_DIRECTORY), above),
    }
    return [(number * BLOCK, content) for number, content in contents.items()]


def _superblock(total: int, free: int) -> bytes:
    block = bytearray(1024)
    # Inodes, blocks, reserved and free blocks, free inodes, first data block.
    struct.pack_into("<6I", block, 0x00, _INODES, total, 0, free, _INODES - _FILE, 0)
    # Sizes of block and cluster as powers of two KiB; blocks, clusters and inodes of a group.
    struct.pack_into("<5I", block, 0x18, 2, 2, _BLOCKS_PER_GROUP, _BLOCKS_PER_GROUP, _INODES)
    # Mounts so far, and until a check (never); magic; clean; goes on after an error.
    struct.pack_into("<5H", block, 0x34, 0, 0xFFFF, _MAGIC, 1, 1)
    # Revision with features; first inode of no special meaning, inode size.
    struct.pack_into("<I", block, 0x4C, 1)
    struct.pack_into("<IH", block, 0x54, _LOST_AND_FOUND, _INODE_SIZE)
    struct.pack_into("<3I", block, 0x5C, 0, _FILETYPE | _EXTENTS, _SPARSE_SUPER)
    struct.pack_into("<16s16s", block, 0x68, _UUID, LABEL.encode())
    return bytes(block)


def _group(free: int) -> bytes:
    # Where bitmaps and inodes are; free blocks and inodes, directories.
    return struct.pack("<3I3H", _BLOCK_BITMAP, _INODE_BITMAP, _INODE_TABLE, free, _INODES - _FILE, 2)


def _bitmap(total: int, *used: range) -> bytes:
    """A block of bits. Those behind the last of ``total`` are set, too."""
    bits = (1 << 8 * BLOCK) - (1 << total)
    for part in used:
        bits |= (1 << part.stop) - (1 << part.start)
    return bits.to_bytes(BLOCK, "little")


def _inodes(start: int, length: int) -> bytes:
    """The table: inode n is the nth, there is no inode 0."""
    table = bytearray(_INODES * _INODE_SIZE)
    for number, mode, links, first, count in (
        (_ROOT, stat.S_IFDIR | 0o700, 3, _ROOT_BLOCK, 1),
        (_LOST_AND_FOUND, stat.S_IFDIR | 0o700, 2, _LOST_BLOCK, 1),
        (_FILE, stat.S_IFREG | 0o600, 1, start, length),
    ):
        at = (number - 1) * _INODE_SIZE
        struct.pack_into("<HHI", table, at, mode, 0, count * BLOCK)
        struct.pack_into("<HHII", table, at + 0x18, 0, links, count * BLOCK // 512, _USES_EXTENTS)
        # A leaf with one extent of the four that fit: logical block, length, physical block.
        struct.pack_into("<4HI", table, at + 0x28, _EXTENT_MAGIC, 1, 4, 0, 0)
        struct.pack_into("<IHHI", table, at + 0x34, 0, count, 0, first)
    return bytes(table)


def _directory(*entries: tuple[int, bytes, int]) -> bytes:
    """A block of entries (inode, name, type); the last reaches to its end."""
    content = bytearray()
    for inode, name, kind in entries[:-1]:
        content += struct.pack("<IHBB", inode, (8 + len(name) + 3) & ~3, len(name), kind) + name
        content += bytes(-len(content) % 4)
    inode, name, kind = entries[-1]
    content += struct.pack("<IHBB", inode, BLOCK - len(content), len(name), kind) + name
    return bytes(content.ljust(BLOCK, b"\0"))
