"""Operations on the content of files.

The law: what is answered is on the host. A write has reached the host's page cache when it returns (so every
program there sees it), and its disk when ``Sync`` does.
"""

from __future__ import annotations

import errno
import os
import resource
import stat
from collections.abc import Callable
from typing import Any, Final

from fileserver import linux
from fileserver.core import Core, Outcome
from fileserver.linux import (
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE,
    FALLOC_FL_ZERO_RANGE,
    failure,
)
from fileserver.nodes import Node
from fileserver.root import Fullness
from fileserver.signatures import giving, written
from protocol.api import Done
from protocol.bulk import Run
from protocol.files import (
    MAX_DATA,
    Allocate,
    Attributes,
    CopyRange,
    FileCall,
    Position,
    Read,
    Seek,
    Sync,
    Write,
    Written,
)

MAX_COPY: Final = 64 << 20
"""Bytes of one ``CopyRange``: a disk needs less than a second for them. The guest asks for the rest again."""

RESERVE: Final = 64 << 20
"""Bytes of a filesystem that are promised to nobody: for what programs of the host write meanwhile, and for what the
filesystem itself needs to know of it all. As much as a guest has under way at the most."""

MAX_ROOM: Final = 1 << 62
"""What a number on the link can say."""

_ALLOCATIONS: Final = frozenset(
    {
        0,
        FALLOC_FL_KEEP_SIZE,
        FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
        FALLOC_FL_ZERO_RANGE,
        FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE,
    }
)
"""What FUSE passes on; each may be done twice with the same effect."""


class DataOperations:
    """One share's."""

    def __init__(self, core: Core, fullness: Fullness) -> None:
        self._core = core
        self._fullness = fullness
        self._is_limited = resource.getrlimit(resource.RLIMIT_FSIZE)[0] != resource.RLIM_INFINITY
        self._reach = core.reach
        self._files = core.files

    def methods(self) -> dict[type[FileCall[Any]], Callable[[Any, Any], Outcome]]:
        return {
            Read: self.read,
            Write: self.write,
            Allocate: self.allocate,
            Seek: self.seek,
            CopyRange: self.copy_range,
            Sync: self.sync,
        }

    # --- reading -----------------------------------------------------------------------------------

    def read(self, call: Read, payload: object) -> Outcome:
        """``payload`` may be the run to read into."""
        if call.offset < 0 or not 0 <= call.size <= MAX_DATA:
            raise failure(errno.EINVAL)
        node = self._reach.acquire(call.node)
        try:
            sharing = self._core.sharing
            if looks := sharing is not None and (node.base is None or sharing.is_due(node)):
                self._files.close_writer(node)
            file = self._files.reader(node)
            try:
                if sharing is not None and looks:
                    sharing.look(node, file.descriptor)
                if node.base is None:
                    device = self._reach.devices.of(node.key[0], file.descriptor)
                    heard = self._core.promises.heard(node)
                    giving(node, linux.fstatx(file.descriptor), device.unsettled_ns, heard)
                if isinstance(payload, Run):
                    payload.length = _read_into(payload.view[: call.size], file.descriptor, call.offset)
                    return Outcome(Done(), payload)
                return Outcome(Done(), _read_fully(file.descriptor, call.size, call.offset))
            finally:
                self._files.release(file)
        finally:
            self._reach.release(node)

    def seek(self, call: Seek, payload: object) -> Outcome:
        if call.whence not in (os.SEEK_DATA, os.SEEK_HOLE):
            raise failure(errno.EINVAL)
        if call.offset < 0:
            raise failure(errno.ENXIO)
        with self._reach.use(call.node) as node:
            file = self._files.reader(node)
            try:
                with node.lock:  # an append uses the position of the descriptor
                    return Outcome(Position(os.lseek(file.descriptor, call.offset, call.whence)))
            finally:
                self._files.release(file)

    # --- writing -----------------------------------------------------------------------------------

    def write(self, call: Write, payload: bytes | memoryview) -> Outcome:
        if call.offset < 0 or len(payload) > MAX_DATA:
            raise failure(errno.EINVAL)
        node = self._reach.acquire(call.node)
        try:
            file = self._files.writer(node)
            try:
                return self._write(node, file.descriptor, call, payload)
            finally:
                self._files.release(file, wrote=True)
        finally:
            self._reach.release(node)

    def _write(self, node: Node, descriptor: int, call: Write, payload: bytes | memoryview) -> Outcome:
        with node.lock:
            heard = self._core.promises.heard(node)
            before = linux.fstatx(descriptor)
            if call.append:
                size, offset = append(descriptor, payload)
            else:
                size, offset = _write_fully(descriptor, payload, call.offset), call.offset
            after = linux.fstatx(descriptor)
            if call.kill_privilege and self._core.kill_privilege(descriptor, after):
                after = linux.fstatx(descriptor)
            written(node, before, after, call.offset + size, heard)
        room = self._room(node, descriptor) if size == len(payload) else 0
        return Outcome(Written(size, offset, self._core.attr(after), room))

    def _room(self, node: Node, descriptor: int) -> int:
        """Bytes of which it can be said now that there is space for them. None where that is only seen later, and none
        while something was refused lately: it may be a quota, which nobody can be asked about."""
        if self._fullness.full or self._is_limited:
            return 0
        try:
            if not self._reach.devices.of(node.key[0], descriptor).accounts:
                return 0
            size = os.fstatvfs(descriptor)
        except OSError:  # the write itself is done
            return 0
        return min(max(0, size.f_bavail * size.f_frsize - RESERVE), MAX_ROOM)

    def allocate(self, call: Allocate, payload: object) -> Outcome:
        if call.mode not in _ALLOCATIONS:
            raise failure(errno.EOPNOTSUPP)
        with self._core.changing(call.node) as node:
            file = self._files.writer(node)
            try:
                with node.lock:
                    heard = self._core.promises.heard(node)
                    before = linux.fstatx(file.descriptor)
                    linux.fallocate(file.descriptor, call.mode, call.offset, call.length)
                    after = linux.fstatx(file.descriptor)
                    end = 0 if call.mode & FALLOC_FL_KEEP_SIZE else call.offset + call.length
                    written(node, before, after, end, heard)
            finally:
                self._files.release(file, wrote=True)
        return Outcome(Attributes(self._core.attr(after)))

    def copy_range(self, call: CopyRange, payload: object) -> Outcome:
        if min(call.offset, call.to_offset, call.length) < 0:
            raise failure(errno.EINVAL)
        with self._reach.use(call.node) as node, self._core.changing(call.to_node) as target:
            source = self._files.reader(node)
            try:
                return self._copy(source.descriptor, target, call)
            finally:
                self._files.release(source)

    def _copy(self, source: int, target: Node, call: CopyRange) -> Outcome:
        length = min(call.length, MAX_COPY)
        file = self._files.writer(target)
        try:
            with target.lock:
                heard = self._core.promises.heard(target)
                before = linux.fstatx(file.descriptor)
                copied = os.copy_file_range(source, file.descriptor, length, call.offset, call.to_offset)
                after = linux.fstatx(file.descriptor)
                written(target, before, after, call.to_offset + copied, heard)
        finally:
            self._files.release(file, wrote=True)
        return Outcome(Written(copied, call.to_offset, self._core.attr(after)))

    # --- to disk -----------------------------------------------------------------------------------

    def sync(self, call: Sync, payload: object) -> Outcome:
        flush = os.fdatasync if call.data_only else os.fsync
        with self._reach.use(call.node) as node:
            if node.kind == stat.S_IFDIR:
                self._sync_directory(node, flush)
            else:
                file = self._files.any(node)
                try:
                    flush(file.descriptor)
                finally:
                    self._files.release(file)
        return Outcome(Done())

    def _sync_directory(self, node: Node, flush: Callable[[int], None]) -> None:
        if node.sealed:
            return
        flags = os.O_RDONLY | os.O_DIRECTORY
        descriptor = self._reach.opening(lambda: linux.reopen(node.descriptor, flags))
        try:
            flush(descriptor)
        finally:
            os.close(descriptor)


def _read_fully(descriptor: int, size: int, offset: int) -> bytes:
    """Fewer than ``size`` bytes mean the end of the file to the guest, so a short read is continued."""
    data = os.pread(descriptor, size, offset)
    while data and len(data) < size:
        more = os.pread(descriptor, size - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


def _read_into(view: memoryview, descriptor: int, offset: int) -> int:
    """As ``_read_fully``, into ``view``; returns the number of bytes."""
    count = 0
    while count < len(view):
        if not (more := os.preadv(descriptor, [view[count:]], offset + count)):
            break
        count += more
    return count


def _write_fully(descriptor: int, payload: bytes | memoryview, offset: int) -> int:
    """The number of bytes taken: fewer than all if the disk is full, an error only if there are none."""
    return _continued(payload, lambda rest, done: os.pwrite(descriptor, rest, offset + done))


def append(descriptor: int, payload: bytes | memoryview) -> tuple[int, int]:
    """Bytes taken, and where they went. Each write(2) goes to what is the end at that moment, also if programs
    on the host append at the same time. The caller holds the node's lock: the descriptor's position is used."""
    first = 0

    def write(rest: memoryview, done: int) -> int:
        nonlocal first
        taken = os.pwritev(descriptor, [rest], -1, os.RWF_APPEND)
        if not done:
            first = os.lseek(descriptor, 0, os.SEEK_CUR) - taken
        return taken

    return _continued(payload, write), first


def _continued(payload: bytes | memoryview, write: Callable[[memoryview, int], int]) -> int:
    rest = memoryview(payload)
    done = 0
    while True:
        try:
            taken = write(rest, done)
        except OSError:
            if done:
                return done
            raise
        done += taken
        rest = rest[taken:]
        if not rest or not taken:
            return done
