"""Operations on attributes: those of inodes, extended ones, and those of the filesystem."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

from fileserver import linux
from fileserver.core import Core, Outcome
from fileserver.linux import failure
from fileserver.nodes import Node
from fileserver.promises import Many, Promise, remembered
from fileserver.signatures import is_stale, touched
from protocol.api import Done
from protocol.files import (
    ATTRIBUTES,
    KILL_PRIVILEGE,
    MAX_MANY,
    SET_ATIME,
    SET_ATIME_NOW,
    SET_GID,
    SET_MODE,
    SET_MTIME,
    SET_MTIME_NOW,
    SET_SIZE,
    SET_UID,
    Attributes,
    Content,
    FileCall,
    FilesystemSize,
    GetAttributes,
    GetFilesystemSize,
    GetXattr,
    ListXattr,
    RemoveXattr,
    SetAttributes,
    SetXattr,
    XattrNames,
)

_USER: Final = b"user."
_NOBODY: Final = 0xFFFFFFFF  # (uid_t)-1: chown(2) takes it for "leave alone"


_ITSELF: Final = -1


class _Names(Many):
    """Of ``_ITSELF``, and of those others that have none."""

    __slots__ = ()

    def settled(self, result: XattrNames, kept: Callable[[Promise], int]) -> XattrNames:
        stands = [index for index, promise in self.files if kept(promise) & ATTRIBUTES]
        bare = [result.bare[index] for index in stands if index != _ITSELF]
        return XattrNames(result.data, ATTRIBUTES if _ITSELF in stands else 0, bare)


class AttributeOperations:
    """One share's."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._reach = core.reach

    def methods(self) -> dict[type[FileCall[Any]], Callable[[Any, Any], Outcome]]:
        return {
            GetAttributes: self.get_attributes,
            SetAttributes: self.set_attributes,
            GetXattr: self.get_xattr,
            SetXattr: self.set_xattr,
            ListXattr: self.list_xattr,
            RemoveXattr: self.remove_xattr,
            GetFilesystemSize: self.get_filesystem_size,
        }

    # --- of inodes ---------------------------------------------------------------------------------

    def get_attributes(self, call: GetAttributes, payload: object) -> Outcome:
        node = self._reach.acquire(call.node)
        try:
            self._core.see_writers(node)
            promise = self._core.promises.look_at(node)
            status = linux.fstatx(node.descriptor)
            stale = is_stale(node, status, self._core.promises.heard(node))
            return Outcome(Attributes(self._core.attr(status), stale), promise=promise)
        finally:
            self._reach.release(node)

    def set_attributes(self, call: SetAttributes, payload: object) -> Outcome:
        """Owner first, since chown(2) drops bits of the mode, and times last, since all else changes them."""
        with self._core.changing(call.node) as node:
            heard = self._core.promises.heard(node)
            before = linux.fstatx(node.descriptor)
            valid = call.valid
            if valid & (SET_UID | SET_GID):
                self._set_owner(node, call)
            if valid & SET_SIZE:
                self._set_size(node, call.size)
            if valid & SET_MODE:
                with node.lock:
                    os.chmod(linux.magic_link(node.descriptor), stat.S_IMODE(call.mode))
            elif valid & KILL_PRIVILEGE:
                self._core.kill_privilege(node.descriptor, linux.fstatx(node.descriptor))
            if valid & (SET_ATIME | SET_ATIME_NOW | SET_MTIME | SET_MTIME_NOW):
                self._set_times(node, call)
            after = linux.fstatx(node.descriptor)
            with node.lock:
                touched(node, before, after, heard)
                node.told = after.size
            return Outcome(Attributes(self._core.attr(after)))

    def _set_owner(self, node: Node, call: SetAttributes) -> None:
        uid = call.uid if call.valid & SET_UID else -1
        gid = call.gid if call.valid & SET_GID else -1
        if _NOBODY in (uid, gid):
            raise failure(errno.EINVAL)
        if self._core.owner is not None:
            uid, gid = self._core.owner.meant(uid, gid)
        elif not self._core.is_root:
            # What the guest's root makes is ours, so what it gives to itself is, too: dockerd gives each folder
            # that it makes for a bind mount to root, and tar what it unpacks.
            uid, gid = uid or os.geteuid(), gid or os.getegid()
        os.chown(linux.magic_link(node.descriptor), uid, gid)

    def _set_size(self, node: Node, size: int) -> None:
        if size < 0:
            raise failure(errno.EINVAL)
        file = self._core.files.writer(node)
        try:
            os.ftruncate(file.descriptor, size)
        finally:
            self._core.files.release(file, wrote=True)

    @staticmethod
    def _set_times(node: Node, call: SetAttributes) -> None:
        now = (bool(call.valid & SET_ATIME_NOW), bool(call.valid & SET_MTIME_NOW))
        atime = call.atime_ns if call.valid & SET_ATIME else None
        mtime = call.mtime_ns if call.valid & SET_MTIME else None
        linux.set_times(node.descriptor, atime, mtime, now=now)

    # --- extended ----------------------------------------------------------------------------------

    def get_xattr(self, call: GetXattr, payload: object) -> Outcome:
        if not call.name.startswith(_USER):
            raise failure(errno.ENODATA)
        with self._reach.use(call.node) as node:
            return Outcome(Content(os.getxattr(linux.magic_link(node.descriptor), call.name)))

    def set_xattr(self, call: SetXattr, payload: object) -> Outcome:
        if not call.name.startswith(_USER):
            raise failure(errno.EOPNOTSUPP)
        with self._core.changing(call.node) as node:
            os.setxattr(linux.magic_link(node.descriptor), call.name, call.value, call.flags)
            self._core.promises.changed(None, node)
        return Outcome(Done())

    def list_xattr(self, call: ListXattr, payload: object) -> Outcome:
        if len(call.others) > MAX_MANY:
            raise failure(errno.EINVAL)
        data, promise = self._names(call.node)
        bare: list[int] = []
        sampled = [] if promise is None else [(_ITSELF, promise)]
        for number in call.others:
            with suppress(OSError):
                names, promise = self._names(number)
                if promise is not None and not names:
                    sampled.append((len(bare), promise))
                    bare.append(number)
        if not sampled:
            return Outcome(XattrNames(data))
        return Outcome(XattrNames(data, bare=bare), promise=_Names(sampled))

    def _names(self, number: int) -> tuple[bytes, Promise | None]:
        """The names that a node has, each with a NUL behind it, and what was sampled before."""
        with self._reach.use(number) as node:
            promise = self._core.promises.look_at(node)
            if promise is not None:
                promise.given = remembered(self._core.attr(linux.fstatx(node.descriptor)))
            names = [os.fsencode(name) for name in os.listxattr(linux.magic_link(node.descriptor))]
        return b"".join(name + b"\0" for name in names if name.startswith(_USER)), promise

    def remove_xattr(self, call: RemoveXattr, payload: object) -> Outcome:
        if not call.name.startswith(_USER):
            raise failure(errno.ENODATA)
        with self._core.changing(call.node) as node:
            os.removexattr(linux.magic_link(node.descriptor), call.name)
            self._core.promises.changed(None, node)
        return Outcome(Done())

    # --- of the filesystem -------------------------------------------------------------------------

    def get_filesystem_size(self, call: GetFilesystemSize, payload: object) -> Outcome:
        with self._reach.use(call.node) as node:
            size = os.fstatvfs(node.descriptor)
        return Outcome(
            FilesystemSize(
                blocks=size.f_blocks,
                bfree=size.f_bfree,
                bavail=size.f_bavail,
                files=size.f_files,
                ffree=size.f_ffree,
                bsize=size.f_bsize,
                namelen=size.f_namemax,
                frsize=size.f_frsize,
            )
        )
