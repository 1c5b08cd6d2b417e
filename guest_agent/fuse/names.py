"""Operations on directories and names."""

from __future__ import annotations

import os
from collections.abc import Sequence

from guest_agent.fuse import bodies
from guest_agent.fuse.abi import Opcode, Request
from guest_agent.fuse.directories import NameChange
from guest_agent.fuse.volume import Volume
from protocol.files import (
    NAME,
    Create,
    CreateUnnamed,
    Entry,
    FileCall,
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
    directory, name = request.nodeid, bodies.parse_name(request.body)
    unique = request.unique ^ volume.salt
    if (found := volume.renewed(directory, name)) is None:
        found = volume.listings.lookup(directory, name)
    if found is None and volume.listings.is_coming(directory):
        await volume.listings.wait(unique, directory)
        found = volume.listings.lookup(directory, name)
    if found is None and volume.listings.asked(directory, name):
        await volume.listings.wait(unique, directory)
        found = volume.listings.lookup(directory, name)
    if found is None:
        found = await volume.entry_out(Lookup(volume.share, unique, directory, name), request.pid)
    return found or volume.absent_out(directory, name)


def forget(volume: Volume, request: Request) -> None:
    _forgotten(volume, (request.nodeid,))
    volume.forgets.add(request.nodeid, bodies.parse_forget(request.body))


def _forgotten(volume: Volume, nodes: Sequence[int]) -> None:
    """Nothing that is kept for the kernel's sake is of use any more."""
    volume.listings.forgotten(nodes)
    volume.xattrs.drop(*nodes)
    volume.written.drop(*nodes)
    volume.behind.forgotten(nodes)
    volume.adrift.difference_update(nodes)
    volume.unlearned.difference_update(nodes)


def batch_forget(volume: Volume, request: Request) -> None:
    nodes, counts = bodies.parse_batch_forget(request.body)
    _forgotten(volume, nodes)
    for node, count in zip(nodes, counts, strict=True):
        volume.forgets.add(node, count)


async def symlink(volume: Volume, request: Request) -> bytes:
    name, target = bodies.parse_symlink(request.body)
    unique = request.unique ^ volume.salt
    call = MakeSymlink(volume.share, unique, request.nodeid, name, target)
    return await _made(volume, call, request.nodeid, name)


async def mknod(volume: Volume, request: Request) -> bytes:
    mode, _rdev, _umask, name = bodies.parse_mknod(request.body)
    unique = request.unique ^ volume.salt
    call = MakeNode(volume.share, unique, request.nodeid, name, mode)
    return await _made(volume, call, request.nodeid, name)


async def mkdir(volume: Volume, request: Request) -> bytes:
    mode, _umask, name = bodies.parse_mkdir(request.body)
    unique = request.unique ^ volume.salt
    call = MakeDirectory(volume.share, unique, request.nodeid, name, mode)
    return await _made(volume, call, request.nodeid, name)


async def link(volume: Volume, request: Request) -> bytes:
    node, name = bodies.parse_link(request.body)
    unique = request.unique ^ volume.salt
    entry = await volume.made(
        MakeLink(volume.share, unique, node, request.nodeid, name), request.nodeid, name
    )
    volume.data_changed(node)
    # The kernel takes these attributes whatever it has been told since they were asked for, and holds no lock
    # meanwhile of the directory that the node is known by.
    valid = volume.valid(entry.node, entry.attr, entry.promise & NAME)
    return bodies.entry_out(entry.node, entry.attr, valid)


async def _made(volume: Volume, call: FileCall[Entry], directory: int, name: bytes) -> bytes:
    entry = await volume.made(call, directory, name)
    return bodies.entry_out(entry.node, entry.attr, volume.valid(entry.node, entry.attr, entry.promise))


async def unlink(volume: Volume, request: Request) -> bytes:
    name = bodies.parse_name(request.body)
    removed = await volume.host.ask(Unlink(volume.share, request.unique ^ volume.salt, request.nodeid, name))
    volume.name_removed(request.nodeid, name, removed, NameChange.UNLINKED)
    return b""


async def rmdir(volume: Volume, request: Request) -> bytes:
    name = bodies.parse_name(request.body)
    call = RemoveDirectory(volume.share, request.unique ^ volume.salt, request.nodeid, name)
    removed = await volume.host.ask(call)
    volume.name_removed(request.nodeid, name, removed, NameChange.MOVED)
    return b""


async def rename(volume: Volume, request: Request) -> bytes:
    parse = bodies.parse_rename if request.opcode == Opcode.RENAME else bodies.parse_rename2
    parent, flags, name, new_name = parse(request.body)
    unique = request.unique ^ volume.salt
    call = Rename(volume.share, unique, request.nodeid, name, parent, new_name, flags)
    volume.renamed((request.nodeid, name), (parent, new_name), await volume.host.ask(call))
    return b""


async def create(volume: Volume, request: Request) -> bytes:
    flags, mode, _umask, _kill, name = bodies.parse_create(request.body)
    unique = request.unique ^ volume.salt
    call = Create(volume.share, unique, request.nodeid, name, mode, flags)
    entry = await volume.made(call, request.nodeid, name)
    return await _created(volume, entry, unique, flags)


async def tmpfile(volume: Volume, request: Request) -> bytes:
    flags, mode, _umask, _kill, _name = bodies.parse_create(request.body)
    unique = request.unique ^ volume.salt
    entry = await volume.host.ask(CreateUnnamed(volume.share, unique, request.nodeid, mode, flags))
    return await _created(volume, entry, unique, flags)


async def _created(volume: Volume, entry: Entry, unique: int, flags: int) -> bytes:
    """The reply to whatever makes and opens. Handle 0: there is none, as after an open(2) that was not asked."""
    volume.data_changed(entry.node)
    volume.behind.made(entry.node)
    valid = volume.valid(entry.node, entry.attr, entry.promise)
    if not volume.host_locks:
        return bodies.create_out(entry.node, entry.attr, 0, bodies.FOPEN_KEEP_CACHE, valid)
    try:
        # Requests have even numbers (FUSE_REQ_ID_STEP is 2), so the next one up is free.
        call = OpenForLocks(volume.share, unique | 1, entry.node, flags & os.O_ACCMODE)
        opened = await volume.host.ask(call)
    except OSError:
        volume.forgets.add(entry.node, 1)
        raise
    return bodies.create_out(entry.node, entry.attr, opened.handle, bodies.FOPEN_KEEP_CACHE, valid)


async def readlink(volume: Volume, request: Request) -> bytes:
    content = await volume.host.ask(ReadLink(volume.share, request.unique ^ volume.salt, request.nodeid))
    return content.data


async def readdirplus(volume: Volume, request: Request) -> bytes:
    _fh, offset, size, *_ = bodies.parse_read(request.body)
    return await volume.listings.read(request.unique ^ volume.salt, request.nodeid, offset, size)


async def fsync(volume: Volume, request: Request) -> bytes:
    """FSYNC, FSYNCDIR. The host's answer comes behind those to all writes that were answered here before."""
    data_only = bool(bodies.parse_fsync(request.body)[1] & bodies.FSYNC_FDATASYNC)
    try:
        await volume.host.ask(Sync(volume.share, request.unique ^ volume.salt, request.nodeid, data_only))
    finally:
        lost = volume.behind.take_error(request.nodeid)
    if lost:
        raise OSError(lost, "")
    return b""
