"""Operations on directories and names."""

from __future__ import annotations

import os

from guest_agent.fuse import bodies
from guest_agent.fuse.abi import Opcode, Request
from guest_agent.fuse.volume import Volume
from protocol.files import (
    Create,
    CreateUnnamed,
    Entry,
    Lookup,
    MakeDirectory,
    MakeLink,
    MakeNode,
    MakeSymlink,
    OpenForLocks,
    ReadLink,
    RemoveDirectory,
    Rename,
    Sync,
    Unlink,
)


async def lookup(volume: Volume, request: Request) -> bytes:
    name = bodies.parse_name(request.body)
    return await volume.entry_out(Lookup(volume.share, request.unique ^ volume.salt, request.nodeid, name))


def forget(volume: Volume, request: Request) -> None:
    volume.written.discard(request.nodeid)
    volume.adrift.discard(request.nodeid)
    volume.forgets.add(request.nodeid, bodies.parse_forget(request.body))


def batch_forget(volume: Volume, request: Request) -> None:
    nodes, counts = bodies.parse_batch_forget(request.body)
    volume.written.difference_update(nodes)
    volume.adrift.difference_update(nodes)
    for node, count in zip(nodes, counts, strict=True):
        volume.forgets.add(node, count)


async def symlink(volume: Volume, request: Request) -> bytes:
    name, target = bodies.parse_symlink(request.body)
    unique = request.unique ^ volume.salt
    return await volume.entry_out(MakeSymlink(volume.share, unique, request.nodeid, name, target))


async def mknod(volume: Volume, request: Request) -> bytes:
    mode, _rdev, _umask, name = bodies.parse_mknod(request.body)
    unique = request.unique ^ volume.salt
    return await volume.entry_out(MakeNode(volume.share, unique, request.nodeid, name, mode))


async def mkdir(volume: Volume, request: Request) -> bytes:
    mode, _umask, name = bodies.parse_mkdir(request.body)
    unique = request.unique ^ volume.salt
    return await volume.entry_out(MakeDirectory(volume.share, unique, request.nodeid, name, mode))


async def link(volume: Volume, request: Request) -> bytes:
    node, name = bodies.parse_link(request.body)
    unique = request.unique ^ volume.salt
    return await volume.entry_out(MakeLink(volume.share, unique, node, request.nodeid, name))


async def unlink(volume: Volume, request: Request) -> bytes:
    name = bodies.parse_name(request.body)
    await volume.host.ask(Unlink(volume.share, request.unique ^ volume.salt, request.nodeid, name))
    return b""


async def rmdir(volume: Volume, request: Request) -> bytes:
    name = bodies.parse_name(request.body)
    await volume.host.ask(RemoveDirectory(volume.share, request.unique ^ volume.salt, request.nodeid, name))
    return b""


async def rename(volume: Volume, request: Request) -> bytes:
    parse = bodies.parse_rename if request.opcode == Opcode.RENAME else bodies.parse_rename2
    parent, flags, name, new_name = parse(request.body)
    unique = request.unique ^ volume.salt
    await volume.host.ask(Rename(volume.share, unique, request.nodeid, name, parent, new_name, flags))
    return b""


async def create(volume: Volume, request: Request) -> bytes:
    flags, mode, _umask, _kill, name = bodies.parse_create(request.body)
    unique = request.unique ^ volume.salt
    entry = await volume.entry(Create(volume.share, unique, request.nodeid, name, mode, flags))
    return await _created(volume, entry, unique, flags)


async def tmpfile(volume: Volume, request: Request) -> bytes:
    flags, mode, _umask, _kill, _name = bodies.parse_create(request.body)
    unique = request.unique ^ volume.salt
    entry = await volume.entry(CreateUnnamed(volume.share, unique, request.nodeid, mode, flags))
    return await _created(volume, entry, unique, flags)


async def _created(volume: Volume, entry: Entry, unique: int, flags: int) -> bytes:
    """The reply to whatever makes and opens. Handle 0: there is none, as after an open(2) that was not asked."""
    volume.written.add(entry.node)
    if not volume.host_locks:
        return bodies.create_out(entry.node, entry.attr, 0, bodies.FOPEN_KEEP_CACHE)
    try:
        # Requests have even numbers (FUSE_REQ_ID_STEP is 2), so the next one up is free.
        call = OpenForLocks(volume.share, unique | 1, entry.node, flags & os.O_ACCMODE)
        opened = await volume.host.ask(call)
    except OSError:
        volume.forgets.add(entry.node, 1)
        raise
    return bodies.create_out(entry.node, entry.attr, opened.handle, bodies.FOPEN_KEEP_CACHE)


async def readlink(volume: Volume, request: Request) -> bytes:
    content = await volume.host.ask(ReadLink(volume.share, request.unique ^ volume.salt, request.nodeid))
    return content.data


def opendir(volume: Volume, request: Request) -> bytes:
    return bodies.open_out(volume.listings.open())


async def readdir(volume: Volume, request: Request) -> bytes:
    handle, offset, size, *_ = bodies.parse_read(request.body)
    unique = request.unique ^ volume.salt
    return await volume.listings.read(unique, request.nodeid, handle, offset, size)


def releasedir(volume: Volume, request: Request) -> bytes:
    volume.listings.close(bodies.parse_release(request.body)[0])
    return b""


async def fsync(volume: Volume, request: Request) -> bytes:
    """FSYNC, FSYNCDIR."""
    data_only = bool(bodies.parse_fsync(request.body)[1] & bodies.FSYNC_FDATASYNC)
    await volume.host.ask(Sync(volume.share, request.unique ^ volume.salt, request.nodeid, data_only))
    return b""
