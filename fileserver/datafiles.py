"""Files that are open for their data: at most one reader and one writer for each, opened when needed.

The guest's opens and closes do not arrive here, so descriptors are kept for a while. The laws:
- Only regular files are opened; what a file is was seen before through its O_PATH descriptor.
- A writer is not kept long: who watches the file on the host waits for IN_CLOSE_WRITE, and a program that
  is open for writing cannot be executed (ETXTBSY). And as long as this process has a file open for writing it cannot
  tell whether others have (``sharing``): so an idle one is closed when that is asked.
- A file that the guest has open stays readable and writable to it whatever its mode is by now (git makes
  its objects 0444 before it has written them). The guest's kernel has checked permissions when it was
  opened; here the mode is widened for the moment of opening, if the file is ours. Never on a read-only share.
- A descriptor in use is not closed; while one is open, its node stays reachable.
"""

from __future__ import annotations

import errno
import math
import os
import stat
import threading
import time
from collections import OrderedDict
from itertools import islice
from typing import Final

from fileserver import linux
from fileserver.budget import Budget
from fileserver.linux import failure
from fileserver.nodes import Node
from fileserver.reach import Reach
from fileserver.workers import waiting

AFTER_WRITE: Final = 0.3
"""Seconds that a writer stays open after the last write. Who goes on then pays for another open(2), some 20 us."""

AFTER_READ: Final = 10.0
"""Seconds that a reader stays open after the last read."""

LOOK: Final = 10.0
"""Seconds after which to look again when nothing is due."""

MAX_OPEN: Final = 512
"""Descriptors for data of one share (fewer if there are many: ``budget``), least recently used first out."""

_OPEN: Final = os.O_NOCTTY | os.O_NONBLOCK


class OpenFile:
    """A descriptor for data. ``due``: when it may be closed (``time.monotonic``)."""

    __slots__ = ("closing", "descriptor", "due", "node", "readable", "uses", "writable")

    def __init__(self, node: Node, descriptor: int, access: int) -> None:
        self.node = node
        self.descriptor = descriptor
        self.readable = access != os.O_WRONLY
        self.writable = access != os.O_RDONLY
        self.uses = 0
        self.due = math.inf
        self.closing = False


class DataFiles:
    """The open files of one share. Thread-safe. The node passed in is acquired by the caller."""

    def __init__(self, reach: Reach, budget: Budget, *, read_only: bool) -> None:
        self._reach = reach
        self._budget = budget
        self._read_only = read_only
        self._lock = threading.Lock()
        self._open: OrderedDict[OpenFile, None] = OrderedDict()
        self._user = os.geteuid()
        reach.registry.close_data = self.close
        reach.registry.shed_data = self.shed
        reach.registry.trim_data = self.trim

    @property
    def descriptors(self) -> int:
        return len(self._open)

    # --- using -------------------------------------------------------------------------------------

    def reader(self, node: Node) -> OpenFile:
        """To be released. Raises EISDIR, ENXIO and the like for what has no data, EACCES."""
        with self._lock:
            file = node.reader or node.writer
            if file is not None and file.readable:
                return self._use(file)
        return self._install(node, self._open_data(node, os.O_RDONLY), os.O_RDONLY)

    def writer(self, node: Node) -> OpenFile:
        """As ``reader``; also ETXTBSY, EROFS."""
        with self._lock:
            if node.writer is not None:
                return self._use(node.writer)
        try:
            return self._install(node, self._open_data(node, os.O_RDWR), os.O_RDWR)
        except PermissionError:  # mode 0200 of somebody else's: it can be written all the same
            return self._install(node, self._open_data(node, os.O_WRONLY), os.O_WRONLY)

    def any(self, node: Node) -> OpenFile:
        """What is open already, the writer first: fsync(2) tells a descriptor of the errors since *it* was opened."""
        with self._lock:
            file = node.writer or node.reader
            if file is not None:
                return self._use(file)
        return self.reader(node)

    def adopt(self, node: Node, descriptor: int) -> None:
        """A file that was just created, open for reading and writing; ``descriptor`` is taken over."""
        self.release(self._install(node, descriptor, os.O_RDWR))

    def release(self, file: OpenFile, *, wrote: bool = False) -> None:
        with self._lock:
            file.uses -= 1
            if wrote or not file.writable or file.due == math.inf:
                file.due = time.monotonic() + (AFTER_WRITE if file.writable else AFTER_READ)
            done = file.closing and not file.uses
            if done:
                self._open.pop(
                    file, None
                )  # whoever looks for what is idle must not find it, and close it as well
        if done:
            self._close([file])

    def open_separately(self, node: Node, access: int) -> int:
        """A descriptor of its own, not kept here."""
        if access != os.O_RDONLY and self._read_only:
            raise failure(errno.EROFS)
        return self._open_data(node, access)

    def _use(self, file: OpenFile) -> OpenFile:
        file.uses += 1
        self._open.move_to_end(file)
        return file

    def _install(self, node: Node, descriptor: int, access: int) -> OpenFile:
        file = OpenFile(node, descriptor, access)
        file.uses = 1
        self._reach.hold(node)
        with self._lock:
            mine = (node.writer if file.writable else node.reader) is None
            if mine and file.writable:
                node.writer = file
            elif mine:
                node.reader = file
            else:  # another thread was faster: this one serves its call and goes
                file.closing = True
            self._open[file] = None
            closing = self._surplus(self._most())
        self._close(closing)
        return file

    # --- opening -----------------------------------------------------------------------------------

    def _open_data(self, node: Node, access: int) -> int:
        if node.kind != stat.S_IFREG:
            raise failure(errno.EISDIR if node.kind == stat.S_IFDIR else errno.ENXIO)
        try:
            return self._reopen(node, access)
        except PermissionError:
            status = linux.fstatx(node.descriptor)
            wanted = {os.O_RDONLY: 0o400, os.O_WRONLY: 0o200, os.O_RDWR: 0o600}[access]
            if self._read_only or status.uid != self._user or status.mode & wanted == wanted:
                raise
        return self._open_widened(node, access, wanted)

    def _open_widened(self, node: Node, access: int, wanted: int) -> int:
        """The file is ours but its mode refuses: change it for as long as open(2) takes."""
        path = linux.magic_link(node.descriptor)
        with node.lock:
            mode = stat.S_IMODE(linux.fstatx(node.descriptor).mode)
            os.chmod(path, mode | wanted)
            try:
                return self._reopen(node, access)
            finally:
                os.chmod(path, mode)

    def _reopen(self, node: Node, access: int) -> int:
        try:
            return self._reach.opening(lambda: linux.reopen(node.descriptor, access | _OPEN))
        except BlockingIOError:
            # Somebody has a lease on it (F_SETLEASE of fcntl(2): samba). Wait until it is given up, as any open(2), for
            # /proc/sys/fs/lease-break-time at most, which is 45 s.
            with waiting():
                return linux.reopen(node.descriptor, access | os.O_NOCTTY)

    # --- closing -----------------------------------------------------------------------------------

    def close_writer(self, node: Node) -> None:
        """If it is idle."""
        with self._lock:
            if node.writer is None or node.writer.uses:
                return
            idle = [node.writer]
            self._detach(idle)
        self._close(idle)

    def close_idle(self, now: float) -> float:
        """Close what is due; returns when to look again."""
        with self._lock:
            due = [file for file in self._open if file.due <= now and not file.uses]
            self._detach(due)
            following = min((file.due for file in self._open if not file.uses), default=math.inf)
        self._close(due)
        return min(following, now + LOOK)

    def close(self, node: Node) -> None:
        """The node is gone: close what it has open, as soon as nobody uses it."""
        with self._lock:
            files = [file for file in (node.reader, node.writer) if file is not None]
            idle = [file for file in files if not file.uses]
            self._detach(files)
        self._close(idle)

    def shed(self) -> None:
        """Half of what is not in use: the process has run out of descriptors."""
        with self._lock:
            closing = self._surplus(len(self._open) // 2)
        self._close(closing)

    def trim(self) -> None:
        """There may be fewer from now on."""
        with self._lock:
            closing = self._surplus(self._most())
        self._close(closing)

    def _most(self) -> int:
        return min(MAX_OPEN, self._budget.data)

    def close_all(self) -> None:
        with self._lock:
            files = list(self._open)
            self._detach(files)
        self._close(files)

    def _surplus(self, limit: int) -> list[OpenFile]:
        surplus = len(self._open) - limit
        if surplus <= 0:
            return []
        closing = list(islice((file for file in self._open if not file.uses), surplus))
        self._detach(closing)
        return closing

    def _detach(self, files: list[OpenFile]) -> None:
        """They serve no further call."""
        for file in files:
            node = file.node
            file.closing = True
            if node.reader is file:
                node.reader = None
            if node.writer is file:
                node.writer = None
            if not file.uses:
                self._open.pop(file, None)

    def _close(self, files: list[OpenFile]) -> None:
        """close(2) may wait for a disk (NFS), so without the lock."""
        for file in files:
            with self._lock:
                self._open.pop(file, None)
            try:
                os.close(file.descriptor)
            finally:
                self._reach.release(file.node)
