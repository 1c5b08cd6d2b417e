"""fanotify(7) as an ordinary user may have it: which directory something happened in, to which name, and whether it
was this process that did it.

The laws:
- What comes from the kernel and cannot be understood is an overflow: anything may have changed.
- A directory is marked by its descriptor (``/proc/self/fd/N``), never by a path that could be swapped.
- No call here waits for a disk, but for ``identify``, whose fstatfs(2) may.

Since Linux 5.13 a group that reports file handles instead of descriptors needs no privilege; such a listener is told
its own process id, and 0 for everybody else's. Events of two processes are never merged into one. Layouts and numbers
are the kernel's (include/uapi/linux/fanotify.h, fcntl.h).
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import threading
from ctypes import c_char_p, c_int, c_uint, c_uint64, c_void_p
from typing import Any, Final, NamedTuple

from fileserver.linux import AT_EMPTY_PATH, failure, magic_link

MODIFY: Final = 0x2
ATTRIB: Final = 0x4
CLOSE_WRITE: Final = 0x8
OPEN: Final = 0x20
MOVED_FROM: Final = 0x40
MOVED_TO: Final = 0x80
CREATE: Final = 0x100
DELETE: Final = 0x200
DELETE_SELF: Final = 0x400
MOVE_SELF: Final = 0x800
Q_OVERFLOW: Final = 0x4000
ONDIR: Final = 0x40000000

SELF: Final = b"."
"""The name in an event that is about the directory itself."""

_CLOEXEC, _NONBLOCK = 0x1, 0x2
_REPORT_FID, _REPORT_DIR_FID, _REPORT_NAME = 0x200, 0x400, 0x800
_GROUP: Final = _CLOEXEC | _NONBLOCK | _REPORT_FID | _REPORT_DIR_FID | _REPORT_NAME
_MARK_ADD, _MARK_REMOVE = 0x1, 0x2
_AT_FDCWD: Final = -100

_AT_HANDLE_FID: Final = 0x200
"""A handle to tell files by, not to open them with: as fanotify's are. Linux 6.5."""

_HANDLE: Final = struct.Struct("=Ii")
_MAX_HANDLE: Final = 128
_STATFS: Final = struct.Struct("@L6L8s")  # f_type, six more words, f_fsid
_STATFS_SIZE: Final = 512

_VERSION: Final = 3
_METADATA: Final = struct.Struct(
    "=IBBHQii"
)  # length, version, reserved, length of this, mask, descriptor, pid
_INFO: Final = struct.Struct(
    "=BBH8xI"
)  # type, padding, length, (fsid), bytes of the handle; then its type, itself
_INFO_FIXED: Final = 20
_TYPE_FID, _TYPE_DFID_NAME, _TYPE_DFID = 1, 2, 3

#: Without and with the interpreter's lock held meanwhile: what cannot wait should not cost a change of threads.
_waiting: Final = ctypes.CDLL(None, use_errno=True)
_quick: Final = ctypes.PyDLL(None, use_errno=True)


def _function(library: Any, name: str, *arguments: Any) -> Any:
    function = getattr(library, name)
    function.restype = c_int
    function.argtypes = arguments
    return function


_fanotify_init = _function(_quick, "fanotify_init", c_uint, c_uint)
_fanotify_mark = _function(_quick, "fanotify_mark", c_int, c_uint, c_uint64, c_int, c_char_p)
_name_to_handle_at = _function(_quick, "name_to_handle_at", c_int, c_char_p, c_void_p, c_void_p, c_int)
_fstatfs = _function(_waiting, "fstatfs", c_int, c_void_p)


class Event(NamedTuple):
    """``directory`` and ``child`` are keys (``Identified.key``), empty if the kernel did not say. Events on a file that
    is marked itself may have no directory."""

    mask: int
    pid: int
    directory: bytes
    name: bytes
    child: bytes


class Identified(NamedTuple):
    """``filesystem`` is its f_type; ``key`` is what events call the file: its filesystem's id and its handle."""

    filesystem: int
    key: bytes


OVERFLOW: Final = Event(Q_OVERFLOW, 0, b"", b"", b"")


def parse(block: bytes, without: int = -1) -> list[Event]:
    """The events in what was read from a group. ``OVERFLOW`` stands for what is not as it should be. What the process
    ``without`` did is left out, but for ``DELETE_SELF``."""
    events: list[Event] = []
    at, end = 0, len(block)
    while at < end:
        if end - at < _METADATA.size:
            return [*events, OVERFLOW]
        length, version, _, header, mask, _, pid = _METADATA.unpack_from(block, at)
        if version != _VERSION or not _METADATA.size <= header <= length <= end - at:
            return [*events, OVERFLOW]
        if pid != without or mask & (DELETE_SELF | Q_OVERFLOW):
            events.append(_event(block, at + header, at + length, mask, pid))
        at += length
    return events


def _event(block: bytes, at: int, end: int, mask: int, pid: int) -> Event:
    directory = name = child = b""
    while at < end:
        if end - at < _INFO_FIXED:
            return OVERFLOW
        kind, _, length, handle = _INFO.unpack_from(block, at)
        after = at + _INFO_FIXED + handle
        if length < _INFO_FIXED + handle or length > end - at:
            # Records of a kind that is not known here need not begin like this, but none was asked for.
            return OVERFLOW
        if kind == _TYPE_DFID_NAME:
            directory = block[at + 4 : after]
            name = block[after : at + length].split(b"\0", 1)[0]
        elif kind == _TYPE_DFID:
            directory = block[at + 4 : after]
        elif kind == _TYPE_FID:
            child = block[at + 4 : after]
        at += length
    if not directory and not child and not mask & Q_OVERFLOW:
        return OVERFLOW
    return Event(mask, pid, directory, name, child)


class _Scratch(threading.local):
    """Where the kernel writes to: one per thread, made once (a fresh one costs as much as the call)."""

    def __init__(self) -> None:
        self.statfs = ctypes.create_string_buffer(_STATFS_SIZE)
        self.statfs_address = ctypes.addressof(self.statfs)
        self.handle = ctypes.create_string_buffer(_HANDLE.size + _MAX_HANDLE)
        self.handle_address = ctypes.addressof(self.handle)
        self.mount = c_int()
        self.mount_address = ctypes.addressof(self.mount)


_scratch = _Scratch()
_handle_flags = AT_EMPTY_PATH | _AT_HANDLE_FID


def identify(descriptor: int) -> Identified:
    """The file behind a descriptor of any kind. Raises ``OSError``: EOPNOTSUPP if its filesystem has no handles."""
    scratch = _scratch
    if _fstatfs(descriptor, scratch.statfs_address):
        raise failure(ctypes.get_errno())
    filesystem, *_, fsid = _STATFS.unpack_from(scratch.statfs)
    return Identified(filesystem & 0xFFFFFFFF, fsid + _handle(descriptor))


def _handle(descriptor: int) -> bytes:
    """struct file_handle: the length of the handle, its type, and itself."""
    global _handle_flags
    scratch = _scratch
    _HANDLE.pack_into(scratch.handle, 0, _MAX_HANDLE, 0)
    if _name_to_handle_at(descriptor, b"", scratch.handle_address, scratch.mount_address, _handle_flags):
        error = ctypes.get_errno()
        if error != errno.EINVAL or _handle_flags == AT_EMPTY_PATH:
            raise failure(error)
        _handle_flags = AT_EMPTY_PATH  # before Linux 6.5; what fanotify says is the same there
        return _handle(descriptor)
    length, _ = _HANDLE.unpack_from(scratch.handle)
    return scratch.handle.raw[: _HANDLE.size + length]


class FanotifyGroup:
    """A group: marks, and the queue of what happened to what is marked. Thread-safe, but for ``close``."""

    def __init__(self) -> None:
        """Raises ``OSError``: EINVAL or EPERM before Linux 5.13, ENOSYS without fanotify, EMFILE if the user has too
        many groups (fs.fanotify.max_user_groups)."""
        self._descriptor = int(_fanotify_init(_GROUP, os.O_RDONLY | os.O_CLOEXEC))
        if self._descriptor < 0:
            raise failure(ctypes.get_errno())

    def fileno(self) -> int:
        return self._descriptor

    def mark(self, descriptor: int, mask: int) -> None:
        """Be told of ``mask`` of the file behind ``descriptor``, also of an O_PATH one.

        Raises ``OSError``: ENOSPC at the limit of marks, EACCES if the user may not read the file, and ENODEV,
        EOPNOTSUPP, EXDEV or EINVAL if its filesystem cannot tell.
        """
        self._change(_MARK_ADD, descriptor, mask)

    def unmark(self, descriptor: int, mask: int) -> None:
        """Be told of ``mask`` no more. Raises ``OSError``: ENOENT if there was no mark."""
        self._change(_MARK_REMOVE, descriptor, mask)

    def _change(self, flags: int, descriptor: int, mask: int) -> None:
        if _fanotify_mark(self._descriptor, flags, mask, _AT_FDCWD, magic_link(descriptor)):
            raise failure(ctypes.get_errno())

    def read(self, size: int) -> bytes:
        """Whole events of at most ``size`` bytes; none if nothing has happened."""
        try:
            return os.read(self._descriptor, size)
        except BlockingIOError:
            return b""

    def close(self) -> None:
        os.close(self._descriptor)
