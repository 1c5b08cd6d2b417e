"""Operations on attributes, extended attributes and the file system's size."""

from __future__ import annotations

import errno
from typing import Final

from guest_agent.fuse import bodies
from guest_agent.fuse.abi import Request
from guest_agent.fuse.volume import Volume
from protocol.files import (
    ATTRIBUTES,
    NAME,
    GetAttributes,
    GetFilesystemSize,
    GetXattr,
    RemoveXattr,
    SetAttributes,
    SetXattr,
)

PASSED_ON: Final = b"user."
"""The extended attributes that are the host's; all others mean something to one kernel only."""
CAPABILITY: Final = b"security.capability"
ASKED_BY_LS: Final = (b"security.selinux", b"system.posix_acl_access")
"""Of what ls(1) is given first, before it reads it, up to coreutils 9.5."""
ROOM_FOR_NAMES: Final = 256
"""XATTR_NAME_MAX and a NUL. Who offers less does not want the names of any attributes, but looks for the system's:
ls(1) since coreutils 9.6 (gnulib's file-has-acl.c, 152 bytes)."""
_LOCAL_ONLY: Final = bodies.FATTR_FH | bodies.FATTR_LOCKOWNER | bodies.FATTR_CTIME


async def getattr_(volume: Volume, request: Request) -> bytes:
    """The kernel asks for what it was promised, too: reading a directory or a file has changed the time of access, it
    thinks (fuse_invalidate_atime)."""
    node, known = request.nodeid, volume.listings.directories
    if (attr := known.attributes(node)) is not None and not volume.is_dropping(node):
        return bodies.attr_out(attr, volume.valid(node, attr, NAME | ATTRIBUTES))
    if (attr := volume.looked.take(request.pid, node)) is not None and not volume.is_dropping(node):
        return bodies.attr_out(attr, volume.valid(node, attr, 0))
    asking, asked = volume.asking, known.begin()
    asking[node] = asking.get(node, 0) + 1
    try:
        attributes = await volume.host.ask(GetAttributes(volume.share, request.unique ^ volume.salt, node))
        if attributes.stale or volume.is_dropping(node):
            await volume.drop_for_attributes(node, request.pid)
        if attributes.promise & ATTRIBUTES and volume.is_alone:
            known.learn(node, attributes.attr, asked)
    finally:
        known.end()
        volume.asked(node, request.pid)
    return bodies.attr_out(attributes.attr, volume.valid(node, attributes.attr, attributes.promise))


async def setattr_(volume: Volume, request: Request) -> bytes:
    valid, _fh, size, _owner, atime, mtime, _ctime, mode, uid, gid = bodies.parse_setattr(request.body)
    node, unique = request.nodeid, request.unique ^ volume.salt
    attributes = await volume.host.ask(
        SetAttributes(volume.share, unique, node, valid & ~_LOCAL_ONLY, mode, uid, gid, size, atime, mtime)
    )
    volume.data_changed(node)
    # For no time, whatever is promised: the kernel takes this answer also when it was told meanwhile that the
    # attributes have changed (fuse_do_setattr), and holds no directory's lock that would make it wait with telling.
    return bodies.attr_out(attributes.attr)


async def statfs(volume: Volume, request: Request) -> bytes:
    if volume.host.is_far and (known := volume.room.known()) is not None:
        return known
    changes = volume.room.changes
    call = GetFilesystemSize(volume.share, request.unique ^ volume.salt, request.nodeid)
    size = await volume.host.ask(call)
    answer = bodies.statfs_out(
        size.blocks, size.bfree, size.bavail, size.files, size.ffree, size.bsize, size.namelen, size.frsize
    )
    volume.room.keep(answer, changes)
    return answer


async def getxattr(volume: Volume, request: Request) -> bytes:
    room, name = bodies.parse_getxattr(request.body)
    if not name.startswith(PASSED_ON):
        # Before each write(2) the kernel itself asks for security.capability, so this must cost nothing.
        if name in ASKED_BY_LS:
            await volume.listings.listed_at_length(request.nodeid)
        raise OSError(_absence(name), "")
    names = volume.xattrs.known(request.nodeid)
    if names is not None and name not in names.split(b"\0"):
        raise OSError(errno.ENODATA, "")
    call = GetXattr(volume.share, request.unique ^ volume.salt, request.nodeid, name)
    return _fitted((await volume.host.ask(call)).data, room)


def _absence(name: bytes) -> int:
    """Why nothing has an attribute that is not passed on. ACLs and labels this filesystem does not have at all, and
    ls(1) asks no further of one that says so (EOPNOTSUPP); getcap(8) calls that an error, and ENODATA none."""
    if name.startswith((b"system.", b"security.")) and name != CAPABILITY:
        return errno.EOPNOTSUPP
    return errno.ENODATA


async def listxattr(volume: Volume, request: Request) -> bytes:
    room = bodies.parse_listxattr(request.body)
    if 0 < room < ROOM_FOR_NAMES:
        await volume.listings.listed_at_length(request.nodeid)
    names = volume.xattrs.known(request.nodeid)
    if names is None:
        unique = request.unique ^ volume.salt
        names = await volume.xattrs.ask(unique, request.nodeid, keep=volume.is_alone)
    if not names and 0 < room < ROOM_FOR_NAMES:
        # None, and none of the system's here or elsewhere: so ls(1) asks for no other file's. A program that has room
        # for names is told that there are none, since it may take this for all files' (rclone(1) does).
        raise OSError(errno.EOPNOTSUPP, "")
    return _fitted(names, room)


def _fitted(data: bytes, room: int) -> bytes:
    if room == 0:
        return bodies.getxattr_out(len(data))
    if len(data) > room:
        raise OSError(errno.ERANGE, "")
    return data


async def setxattr(volume: Volume, request: Request) -> bytes:
    flags, name, value = bodies.parse_setxattr(request.body)
    _check_changeable(name)
    unique = request.unique ^ volume.salt
    await volume.host.ask(SetXattr(volume.share, unique, request.nodeid, name, value, flags))
    volume.data_changed(request.nodeid)
    return b""


async def removexattr(volume: Volume, request: Request) -> bytes:
    name = bodies.parse_name(request.body)
    _check_changeable(name)
    await volume.host.ask(RemoveXattr(volume.share, request.unique ^ volume.salt, request.nodeid, name))
    volume.data_changed(request.nodeid)
    return b""


def _check_changeable(name: bytes) -> None:
    if not name.startswith(PASSED_ON):
        raise OSError(errno.EOPNOTSUPP, "")
