"""The contents of many small files in one answer, before a program of the guest asks for them.

The laws:
- What is given is the whole file, as it is when the answer is sent or as it was before a change that is told after
  it; else it is not given.
- Nothing is done for it that the host could notice: no mode is widened, and nobody's lease is waited for.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from typing import Any

from fileserver import linux
from fileserver.core import Core, Outcome
from fileserver.linux import failure
from fileserver.promises import Many, Promise, remembered
from fileserver.signatures import giving
from protocol.bulk import Run
from protocol.files import ATTRIBUTES, MAX_CONTENT, MAX_DATA, MAX_MANY, Contents, FileCall, ReadMany


class Data(Many):
    """Of each file that is to be given, its number among those asked for."""

    __slots__ = ()

    def settled(self, result: Contents, kept: Callable[[Promise], int]) -> Contents:
        sizes = list(result.sizes)
        for index, promise in self.files:
            if not kept(promise) & ATTRIBUTES:
                sizes[index] = ~sizes[index]
        return Contents(sizes)


class ContentOperations:
    """One share's."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._reach = core.reach

    def methods(self) -> dict[type[FileCall[Any]], Callable[[Any, Any], Outcome]]:
        return {ReadMany: self.read_many}

    def read_many(self, call: ReadMany, payload: object) -> Outcome:
        """``payload`` may be the run to read into."""
        if not 0 <= call.most <= MAX_DATA or len(call.nodes) > MAX_MANY:
            raise failure(errno.EINVAL)
        room = payload.view[: call.most] if isinstance(payload, Run) else memoryview(bytearray(call.most))
        sizes, given, filled = [-1] * len(call.nodes), [], 0
        for index, number in enumerate(call.nodes):
            try:
                size, promise = self._read_file(number, room[filled:])
            except OSError:
                continue
            sizes[index] = size
            given.append((index, promise))
            filled += size
        if isinstance(payload, Run):
            payload.length = filled
        content = payload if isinstance(payload, Run) else bytes(room[:filled])
        return Outcome(Contents(sizes), content, Data(given))

    def _read_file(self, number: int, room: memoryview) -> tuple[int, Promise]:
        """Its size, and what was sampled before. Raises ``OSError`` if it is not to be given."""
        with self._reach.use(number) as node:
            promise = self._core.promises.look_at(node)
            if promise is None or node.kind != stat.S_IFREG or self._core.sharing is None:
                raise failure(errno.EINVAL)
            self._core.files.close_writer(node)
            descriptor = self._reach.opening(
                lambda: linux.reopen(node.descriptor, os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK)
            )
            try:
                self._core.sharing.look(node, descriptor)
                heard = self._core.promises.heard(node)
                status = linux.fstatx(descriptor)
                if node.shared or status.size > min(len(room), MAX_CONTENT):
                    raise failure(errno.EFBIG)
                if node.base is None:
                    giving(node, status, self._reach.devices.of(node.key[0], descriptor).unsettled_ns, heard)
                if os.preadv(descriptor, [room[: status.size]], 0) != status.size:
                    raise failure(errno.ESTALE)  # it has become shorter
            finally:
                os.close(descriptor)
        promise.given = remembered(self._core.attr(status))
        return status.size, promise
