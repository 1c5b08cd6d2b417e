"""Layers seen as one directory: an overlay that is mounted nowhere.

A mount that is attached to no path (fsmount(2)) is reached by its descriptor only, and gone with that: nobody else
sees it, dockerd does not stumble over it, and a killed process leaves nothing to clean up. Each layer is told by itself
(``lowerdir+``, Linux 6.7), so there is no list to become longer than a page.

Source: Documentation/filesystems/overlayfs.rst, "Multiple lower layers".
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections.abc import Sequence
from typing import Final

SYS_FSOPEN, SYS_FSCONFIG, SYS_FSMOUNT = 430, 431, 432
"""On all architectures, as every system call since Linux 5.0."""
FSOPEN_CLOEXEC, FSMOUNT_CLOEXEC = 1, 1
FSCONFIG_SET_STRING, FSCONFIG_CMD_CREATE = 1, 6
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 1, 2, 4

SOURCE: Final = b"agentctl-view"

_libc: Final = ctypes.CDLL(None, use_errno=True)


def open_layers(layers: Sequence[str]) -> int:
    """A descriptor of the root of ``layers``, the uppermost first, at least two, read-only. Raises ``OSError``."""
    context = _call(SYS_FSOPEN, b"overlay", FSOPEN_CLOEXEC)
    try:
        _call(SYS_FSCONFIG, context, FSCONFIG_SET_STRING, b"source", SOURCE, 0)
        for layer in layers:
            _call(SYS_FSCONFIG, context, FSCONFIG_SET_STRING, b"lowerdir+", os.fsencode(layer), 0)
        _call(SYS_FSCONFIG, context, FSCONFIG_CMD_CREATE, None, None, 0)
        return _call(
            SYS_FSMOUNT, context, FSMOUNT_CLOEXEC, MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV
        )
    finally:
        os.close(context)


class Overlay:
    """Layers that are mounted from the first ``open`` until ``close``; a descriptor of them is good for longer."""

    def __init__(self, layers: Sequence[str]) -> None:
        self._layers = tuple(layers)
        self._lock = threading.Lock()
        self._mounted = -1
        self._closed = False

    def open(self) -> int:
        """An O_PATH descriptor of the root, the caller's. Raises ``OSError``."""
        with self._lock:
            if self._closed:
                raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
            if self._mounted < 0:
                self._mounted = open_layers(self._layers)
            return os.dup(self._mounted)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            if self._mounted >= 0:
                os.close(self._mounted)
                self._mounted = -1


def _call(number: int, *arguments: bytes | int | None) -> int:
    result: int = _libc.syscall(ctypes.c_long(number), *arguments)
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result
