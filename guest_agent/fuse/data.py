"""Operations on the data of files, and their being open."""

from __future__ import annotations

import errno
import os
from functools import partial

from guest_agent.fuse import bodies
from guest_agent.fuse.abi import Request
from guest_agent.fuse.volume import Volume
from protocol.bulk import Loan
from protocol.files import (
    Allocate,
    CopyRange,
    OpenForLocks,
    Read,
    Release,
    ReleaseOwner,
    Seek,
    Write,
)


async def open_(volume: Volume, request: Request) -> bytes:
    """ENOSYS, once: from then on the kernel opens without asking, and keeps what it has cached. Nor does it say when a
    file is closed (RELEASE), not even one that it has made. Where locks are the host's they need an open file there."""
    if not volume.host_locks:
        raise OSError(errno.ENOSYS, "")
    flags = bodies.parse_open(request.body)[0] & os.O_ACCMODE
    unique = request.unique ^ volume.salt
    opened = await volume.host.ask(OpenForLocks(volume.share, unique, request.nodeid, flags))
    return bodies.open_out(opened.handle, bodies.FOPEN_KEEP_CACHE)


async def read(volume: Volume, request: Request) -> bytes | Loan:
    _fh, offset, size, *_ = bodies.parse_read(request.body)
    node, contents = request.nodeid, volume.contents
    unique = request.unique ^ volume.salt
    if node in volume.written and (end := volume.read_written(node, offset, size)) is not None:
        return end
    if node in contents and (data := await contents.read(unique, node, offset, size)) is not None:
        return data
    if (ahead := await volume.readahead.read(unique, node, offset, size)) is not None:
        return ahead
    ask = volume.host.ask(Read(volume.share, unique, node, offset, size))
    ask.may_lend = True
    ask.after = partial(volume.readahead.asked if offset else contents.missed, node)
    await ask
    return ask.received if ask.lent is None else ask.lent


async def write(volume: Volume, request: Request) -> bytes | None:
    _fh, offset, _size, write_flags, _owner, flags, view = bodies.parse_write(request.body)
    # Without a run the buffer is read into again, and its content copied.
    data = bytes(view) if request.run is None else request.run
    node = request.nodeid
    if lost := volume.behind.take_error(node):
        if request.run is not None:
            request.run.give_back()
        raise OSError(lost, "")
    # The kernel chose the offset of an append by what it knows of the size. Dirty pages of a mapping
    # (WRITE_CACHE) are where they are, however the file was opened.
    append = bool(flags & os.O_APPEND) and not write_flags & bodies.WRITE_CACHE
    kill = bool(write_flags & bodies.WRITE_KILL_SUIDGID)
    unique = request.unique ^ volume.salt
    ahead = volume.may_answer_ahead(node, len(data), flags) and not write_flags & bodies.WRITE_CACHE
    ask = volume.host.ask(Write(volume.share, unique, node, offset, append, kill, ahead), data, lasting=ahead)
    if ahead:
        volume.is_writing_ahead(node)
        ask.answers_ahead = True
        ask.after = partial(volume.answer_ahead, ask, request.unique, node)
    volume.written.begin(node, -1 if write_flags & bodies.WRITE_CACHE else offset)
    try:
        written = await ask
    except BaseException as error:
        volume.written.end(node)
        if ask.answered and isinstance(error, Exception):
            volume.has_lost(ask, node, error)
            return None
        raise
    else:
        content = data if isinstance(data, bytes) else data.content
        if ask.answered:
            volume.has_landed(ask, node, content, offset, written)
            return None
        volume.has_written(node, content, offset, written)
    finally:
        if request.run is not None:
            request.run.give_back()
    if written.offset != offset:
        await volume.drop_for_append(node)
    elif append:
        volume.adrift.discard(node)
    return bodies.write_out(written.size)


async def fallocate(volume: Volume, request: Request) -> bytes:
    _fh, offset, length, mode = bodies.parse_fallocate(request.body)
    node = request.nodeid
    unique = request.unique ^ volume.salt
    await volume.host.ask(Allocate(volume.share, unique, node, mode, offset, length))
    volume.data_changed(node)
    return b""


async def lseek(volume: Volume, request: Request) -> bytes:
    _fh, offset, whence = bodies.parse_lseek(request.body)
    unique = request.unique ^ volume.salt
    position = await volume.host.ask(Seek(volume.share, unique, request.nodeid, offset, whence))
    return bodies.lseek_out(position.offset)


async def copy_file_range(volume: Volume, request: Request) -> bytes:
    _fh, offset, to_node, _to_fh, to_offset, length, flags = bodies.parse_copy_file_range(request.body)
    if flags:
        raise OSError(errno.EINVAL, "")
    unique = request.unique ^ volume.salt
    call = CopyRange(volume.share, unique, request.nodeid, offset, to_node, to_offset, length)
    written = await volume.host.ask(call)
    volume.data_changed(to_node)
    return bodies.write_out(written.size)


async def flush(volume: Volume, request: Request) -> bytes:
    """At each close(2) where locks are the host's. Elsewhere it is ENOSYS, once: what was written is on the host."""
    if not volume.host_locks:
        raise OSError(errno.ENOSYS, "")
    node, (handle, owner) = request.nodeid, bodies.parse_flush(request.body)
    volume.lockers.pop((node, owner), None)
    unique = request.unique ^ volume.salt
    await volume.host.ask(ReleaseOwner(volume.share, unique, node, handle, owner), lasting=True)
    return b""


def release(volume: Volume, request: Request) -> bytes:
    """The kernel waits for no answer. Handle 0: of CREATE, or before it knew that OPEN is not needed."""
    handle, _flags, _release_flags, owner = bodies.parse_release(request.body)
    if handle:
        node, unique = request.nodeid, request.unique ^ volume.salt
        for left in volume.take_lockers(node, handle):
            volume.host.tell(ReleaseOwner(volume.share, next(volume.uniques), node, handle, left))
        volume.host.tell(Release(volume.share, unique, node, handle, owner))
    return b""
