"""Locks that are the host's: fcntl(2) and flock(2) on a share with ``host_locks``.

The host never lets a call wait for a lock: it would hold one of its threads for hours. Who waits asks again
from here, and can be interrupted between two times.

The law: who gets a lock sees what was written by those who had it before. A program that locks a file does not
open or stat it again, and reads from the kernel's copy (sqlite: the change counter, with pread(2)); so what is
stale is dropped before the answer. (NFS does the same: nfs(5), "Using file locks with NFS".)
"""

from __future__ import annotations

import errno
from dataclasses import replace
from fcntl import F_UNLCK
from typing import Final

from guest_agent.fuse import bodies
from guest_agent.fuse.abi import Request
from guest_agent.fuse.operation import Pause
from guest_agent.fuse.volume import Volume
from protocol.files import GetAttributes, SetLock, TestLock

FIRST_PAUSE, LONGEST_PAUSE = 0.005, 0.1
"""Seconds between two attempts, doubling."""

_HELD: Final = (errno.EAGAIN, errno.EACCES)


async def getlk(volume: Volume, request: Request) -> bytes:
    handle, owner, start, end, kind, _pid, _flags = bodies.parse_lk(request.body)
    unique = request.unique ^ volume.salt
    call = TestLock(volume.share, unique, request.nodeid, handle, owner, start, end, kind)
    state = await volume.host.ask(call)
    return bodies.lk_out(state.start, state.end, state.kind, state.pid)


async def setlk(volume: Volume, request: Request) -> bytes:
    call = _set_lock(volume, request, request.unique ^ volume.salt)
    await volume.host.ask(call)
    return await _locked(volume, call)


async def setlkw(volume: Volume, request: Request) -> bytes:
    unique, seconds = request.unique, FIRST_PAUSE
    call = _set_lock(volume, request, unique ^ volume.salt)
    pause = Pause(volume.timers, seconds)
    volume.locking[unique] = pause
    try:
        while not await _attempt(volume, call):
            if volume.locking[unique] is None or await pause:
                raise OSError(errno.EINTR, "")
            seconds = min(LONGEST_PAUSE, seconds * 2)
            pause = volume.locking[unique] = Pause(volume.timers, seconds)
            # Another question, not the same one sent again: that would get the same answer.
            call = replace(call, unique=next(volume.uniques))
    finally:
        del volume.locking[unique]
    return await _locked(volume, call)


async def _locked(volume: Volume, call: SetLock) -> bytes:
    """What follows a lock that was got, or given back."""
    if call.kind == F_UNLCK:
        return b""
    if not call.whole:
        volume.lockers[call.node, call.owner] = call.handle
    try:
        attributes = await volume.host.ask(GetAttributes(volume.share, next(volume.uniques), call.node))
        stale = attributes.stale or volume.is_dropping(call.node)
    except OSError:
        stale = True  # unknown; but the lock is held
    if stale:
        await volume.drop(call.node)
    return b""


async def _attempt(volume: Volume, call: SetLock) -> bool:
    try:
        await volume.host.ask(call)
    except OSError as error:
        if error.errno not in _HELD:
            raise
        return False
    return True


def _set_lock(volume: Volume, request: Request, unique: int) -> SetLock:
    handle, owner, start, end, kind, _pid, flags = bodies.parse_lk(request.body)
    whole = bool(flags & bodies.LK_FLOCK)
    return SetLock(volume.share, unique, request.nodeid, handle, owner, start, end, kind, whole)
