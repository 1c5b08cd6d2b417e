"""Operations on attributes, extended attributes and the file system's size."""

from __future__ import annotations

import errno
from typing import Final

from guest_agent.fuse import bodies
from guest_agent.fuse.abi import Request
from guest_agent.fuse.volume import Volume, attr_ns
from protocol.files import (
    SET_SIZE,
    GetAttributes,
    GetFilesystemSize,
    GetXattr,
    ListXattr,
    RemoveXattr,
    SetAttributes,
    SetXattr,
)

PASSED_ON: Final = b"user."
"""The extended attributes that are the host's; all others mean something to one kernel only."""
_LOCAL_ONLY: Final = bodies.FATTR_FH | bodies.FATTR_LOCKOWNER | bodies.FATTR_CTIME


async def getattr_(volume: Volume, request: Request) -> bytes:
    node = request.nodeid
    attributes = await volume.host.ask(GetAttributes(volume.share, request.unique ^ volume.salt, node))
    if attributes.stale or volume.is_dropping(node):
        await volume.drop(node)
    return bodies.attr_out(attributes.attr, attr_ns(attributes.attr))


async def setattr_(volume: Volume, request: Request) -> bytes:
    valid, _fh, size, _owner, atime, mtime, _ctime, mode, uid, gid = bodies.parse_setattr(request.body)
    node, unique = request.nodeid, request.unique ^ volume.salt
    attributes = await volume.host.ask(
        SetAttributes(volume.share, unique, node, valid & ~_LOCAL_ONLY, mode, uid, gid, size, atime, mtime)
    )
    if valid & SET_SIZE:
        volume.written.add(node)
    return bodies.attr_out(attributes.attr)


async def statfs(volume: Volume, request: Request) -> bytes:
    call = GetFilesystemSize(volume.share, request.unique ^ volume.salt, request.nodeid)
    size = await volume.host.ask(call)
    return bodies.statfs_out(
        size.blocks, size.bfree, size.bavail, size.files, size.ffree, size.bsize, size.namelen, size.frsize
    )


async def getxattr(volume: Volume, request: Request) -> bytes:
    room, name = bodies.parse_getxattr(request.body)
    if not name.startswith(PASSED_ON):
        # Before each write(2) the kernel itself asks for security.capability, so this must cost nothing.
        raise OSError(errno.EOPNOTSUPP if name.startswith(b"system.") else errno.ENODATA, "")
    call = GetXattr(volume.share, request.unique ^ volume.salt, request.nodeid, name)
    return _fitted((await volume.host.ask(call)).data, room)


async def listxattr(volume: Volume, request: Request) -> bytes:
    room = bodies.parse_listxattr(request.body)
    call = ListXattr(volume.share, request.unique ^ volume.salt, request.nodeid)
    return _fitted((await volume.host.ask(call)).data, room)


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
    return b""


async def removexattr(volume: Volume, request: Request) -> bytes:
    name = bodies.parse_name(request.body)
    _check_changeable(name)
    await volume.host.ask(RemoveXattr(volume.share, request.unique ^ volume.salt, request.nodeid, name))
    return b""


def _check_changeable(name: bytes) -> None:
    if not name.startswith(PASSED_ON):
        raise OSError(errno.EOPNOTSUPP, "")
