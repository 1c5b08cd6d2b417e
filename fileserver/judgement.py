"""Was it done already? For a call that an earlier process of this server began and may not have finished.

That process wrote down what it meant to do and what the world was like before (``precondition``), and was killed.
The guest asks again and must get the answer that it would have got, so what is found now is judged as an NFS
server judges a retransmission: a name that is gone is the success of the removal that was begun. Calls that have
the same effect twice are simply done.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Callable
from typing import Any, Final, TypeAlias

from fileserver import linux
from fileserver.core import Core, Outcome
from fileserver.data import append
from fileserver.linux import failure
from fileserver.nodes import Key, Node
from fileserver.signatures import written
from protocol.api import Done
from protocol.files import (
    Create,
    Entry,
    FileCall,
    Forget,
    GetXattr,
    Lookup,
    MakeDirectory,
    MakeLink,
    MakeNode,
    MakeSymlink,
    Removed,
    RemoveDirectory,
    RemoveXattr,
    Rename,
    Renamed,
    SetXattr,
    Unlink,
    Write,
    Written,
)

_Make: TypeAlias = MakeNode | MakeDirectory | MakeSymlink | MakeLink | Create
_Remove: TypeAlias = Unlink | RemoveDirectory
_Payload: TypeAlias = bytes | memoryview

_KEY: Final = struct.Struct("<QQQ")
_COUNT: Final = struct.Struct("<Q")
_ABSENT: Final = _KEY.pack(0, 0, 0)
_XATTR_ABSENT: Final = b"-"
_XATTR_PRESENT: Final = b"="

MAX_SEARCHED: Final = 16 << 20
"""Bytes by which a file may have grown since an append that may have been done, to be searched for what it wrote."""


class Judgement:
    """``perform`` is how a call is done the first time."""

    def __init__(self, core: Core, perform: Callable[[FileCall[Any], _Payload], Outcome]) -> None:
        self._core = core
        self._reach = core.reach
        self._perform = perform
        self._preconditions: dict[type[FileCall[Any]], Callable[[Any], bytes]] = {
            **dict.fromkeys((MakeNode, MakeDirectory, MakeSymlink, Create), self._named),
            **dict.fromkeys((Unlink, RemoveDirectory), self._named),
            MakeLink: lambda call: self._at(call.parent, call.name),
            Rename: self._renamed,
            Write: self._length,
            SetXattr: self._xattr,
            RemoveXattr: self._xattr,
            Forget: self._counts,
        }
        self._again: dict[type[FileCall[Any]], Callable[[Any, _Payload, bytes], Outcome]] = {
            **dict.fromkeys((MakeNode, MakeDirectory, MakeSymlink, MakeLink, Create), self._make_again),
            **dict.fromkeys((Unlink, RemoveDirectory), self._remove_again),
            Rename: self._rename_again,
            Write: self._write_again,
            SetXattr: self._set_xattr_again,
            RemoveXattr: self._remove_xattr_again,
            Forget: self._forget_again,
        }

    def precondition(self, call: FileCall[Any]) -> bytes:
        """What the world is like before the call; ``b""`` if that does not matter, or cannot be told: it fails then."""
        look = self._preconditions.get(type(call))
        if look is None:
            return b""
        try:
            return look(call)
        except (OSError, ValueError, OverflowError):
            return b""

    def perform_again(self, call: FileCall[Any], payload: _Payload, precondition: bytes) -> Outcome:
        again = self._again.get(type(call))
        if again is None or not precondition:
            return self._perform(call, payload)
        return again(call, payload, precondition)

    # --- before ------------------------------------------------------------------------------------

    def _at(self, number: int, name: bytes) -> bytes:
        """What ``name`` stands for."""
        with self._core.directory(number, name) as directory:
            return _KEY.pack(*self._key_at(directory, name))

    def _key_at(self, directory: Node, name: bytes) -> Key:
        """The identity; zeros for nothing."""
        try:
            key = self._reach.devices.known_key(linux.statx(directory.descriptor, name))
            if key is not None:
                return key
            descriptor = self._reach.open_entry(directory, name)
        except FileNotFoundError:
            return (0, 0, 0)
        try:
            return self._reach.key(linux.fstatx(descriptor), descriptor)
        finally:
            os.close(descriptor)

    def _named(self, call: Any) -> bytes:
        return self._at(call.node, call.name)

    def _renamed(self, call: Rename) -> bytes:
        return self._at(call.node, call.name) + self._at(call.parent, call.new_name)

    def _length(self, call: Write) -> bytes:
        if not call.append:
            return b""
        node = self._reach.acquire(call.node)
        try:
            return _COUNT.pack(os.stat(node.descriptor).st_size)
        finally:
            self._reach.release(node)

    def _xattr(self, call: SetXattr | RemoveXattr) -> bytes:
        return _XATTR_ABSENT if self._value(call) is None else _XATTR_PRESENT

    def _value(self, call: SetXattr | RemoveXattr) -> bytes | None:
        question = GetXattr(share=call.share, unique=0, node=call.node, name=call.name)
        try:
            content: Any = self._perform(question, b"").value
        except OSError as error:
            if error.errno != errno.ENODATA:
                raise
            return None
        data: bytes = content.data
        return data

    def _counts(self, call: Forget) -> bytes:
        return b"".join(_COUNT.pack(self._lookups(number)) for number in call.nodes)

    def _lookups(self, number: int) -> int:
        node = self._reach.peek(number)
        return node.lookups if node is not None else 0

    # --- after -------------------------------------------------------------------------------------

    def _make_again(self, call: _Make, payload: _Payload, before: bytes) -> Outcome:
        try:
            return self._perform(call, payload)
        except FileExistsError:
            if before != _ABSENT or not self._is_what_was_to_be_made(call):
                raise
        directory = call.parent if isinstance(call, MakeLink) else call.node
        outcome = self._perform(Lookup(share=call.share, unique=0, node=directory, name=call.name), b"")
        if isinstance(outcome.value, Entry) and not outcome.value.node:
            raise failure(errno.ENOENT)
        return outcome

    def _is_what_was_to_be_made(self, call: _Make) -> bool:
        directory = call.parent if isinstance(call, MakeLink) else call.node
        with self._core.directory(directory, call.name) as parent:
            key = self._key_at(parent, call.name)
            kind = linux.statx(parent.descriptor, call.name).kind
            if isinstance(call, MakeSymlink):
                return (
                    kind == stat.S_IFLNK and os.readlink(call.name, dir_fd=parent.descriptor) == call.target
                )
        if isinstance(call, MakeLink):
            with self._reach.use(call.node) as node:
                return node.key == key
        if isinstance(call, MakeNode):
            return kind == (stat.S_IFMT(call.mode) or stat.S_IFREG)
        return kind == (stat.S_IFDIR if isinstance(call, MakeDirectory) else stat.S_IFREG)

    def _remove_again(self, call: _Remove, payload: _Payload, before: bytes) -> Outcome:
        if before == _ABSENT or self._at(call.node, call.name) == before:
            return self._perform(call, payload)
        with self._core.directory(call.node, call.name) as directory:
            self._reach.removed(directory, call.name)
        return Outcome(Removed())

    def _rename_again(self, call: Rename, payload: _Payload, before: bytes) -> Outcome:
        source, target = before[: _KEY.size], before[_KEY.size :]
        now = self._renamed(call)
        source_now, target_now = now[: _KEY.size], now[_KEY.size :]
        exchange = call.flags == linux.RENAME_EXCHANGE
        moved = source not in (_ABSENT, target, source_now) and target_now == source
        if not moved or (exchange and source_now != target):
            return self._perform(call, payload)
        with self._core.directory(call.node, call.name) as old:
            with self._core.directory(call.parent, call.new_name) as new:
                if self._reach.is_named(old, call.name, _key(source)):
                    self._reach.moved(old, call.name, new, call.new_name, exchange=exchange)
                node = self._reach.named(new, call.new_name)
        return Outcome(Renamed(0 if node is None else node.number))

    def _write_again(self, call: Write, payload: _Payload, before: bytes) -> Outcome:
        """An append: look for its bytes in what the file has grown by."""
        (length,) = _COUNT.unpack(before)
        with self._reach.use(call.node) as node:
            file = self._core.files.writer(node)
            try:
                with node.lock:
                    at, done = _find_appended(file.descriptor, bytes(payload), length)
                    if at is not None:
                        if done < len(payload):
                            append(file.descriptor, memoryview(payload)[done:])
                        status = linux.fstatx(file.descriptor)
                        written(node, status, status, call.offset + len(payload))
                        return Outcome(Written(len(payload), at, self._core.attr(status)))
            finally:
                self._core.files.release(file, wrote=True)
        return self._perform(call, payload)

    def _set_xattr_again(self, call: SetXattr, payload: _Payload, before: bytes) -> Outcome:
        try:
            return self._perform(call, payload)
        except FileExistsError:
            if before != _XATTR_ABSENT or self._value(call) != call.value:
                raise
        return Outcome(Done())

    def _remove_xattr_again(self, call: RemoveXattr, payload: _Payload, before: bytes) -> Outcome:
        if before == _XATTR_PRESENT and self._value(call) is None:
            return Outcome(Done())
        return self._perform(call, payload)

    def _forget_again(self, call: Forget, payload: _Payload, before: bytes) -> Outcome:
        """Only what is as it was: a lookup too many costs memory, one too few a file."""
        if len(before) != _COUNT.size * len(call.nodes) or len(call.nodes) != len(call.counts):
            raise failure(errno.EINVAL)
        counts = [count for (count,) in _COUNT.iter_unpack(before)]
        for number, given_back, had in zip(call.nodes, call.counts, counts, strict=True):
            if self._lookups(number) == had:
                self._reach.forget(number, given_back)
        return Outcome(Done())


def _key(packed: bytes) -> Key:
    device, inode, birth = _KEY.unpack(packed)
    return (device, inode, birth)


def _find_appended(descriptor: int, payload: bytes, length: int) -> tuple[int | None, int]:
    """Where the payload is in what the file has beyond ``length`` bytes, and how much of it; None: nowhere."""
    grown = os.fstat(descriptor).st_size - length
    if grown <= 0 or not payload or grown > MAX_SEARCHED:
        return None, 0
    readable = linux.reopen(descriptor, os.O_RDONLY)
    try:
        region = os.pread(readable, grown, length)
    finally:
        os.close(readable)
    at = region.find(payload)
    if at >= 0:
        return length + at, len(payload)
    if payload.startswith(region):
        return length, len(region)
    return None, 0
