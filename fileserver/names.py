"""Operations on names: looking up, making, linking, renaming, removing, and reading directories.

The law of renames and removals: the table learns of them after they are done, and the file that loses its name is
held before, so that a guest which has it open goes on using it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Final

from fileserver import linux, snapshots
from fileserver.core import Core, Outcome, check_name
from fileserver.linux import Status, failure
from fileserver.nodes import Node
from fileserver.promises import Promise, remembered
from fileserver.signatures import is_given
from fileserver.workers import WouldWait
from protocol.files import (
    ATTR,
    DIRENT,
    MAX_FILES_PAYLOAD,
    Content,
    Create,
    CreateUnnamed,
    Entry,
    FileCall,
    List,
    Listing,
    Lookup,
    MakeDirectory,
    MakeLink,
    MakeNode,
    MakeSymlink,
    ReadLink,
    Removed,
    RemoveDirectory,
    Rename,
    Renamed,
    Unlink,
)

MAX_LISTED_WITH_ATTRIBUTES: Final = 2048
"""Records of one answer if each has attributes: 10 ms of looking."""

_CREATE: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_NOCTTY | os.O_CLOEXEC
_TRUNCATE: Final = os.O_WRONLY | os.O_TRUNC | os.O_NOCTTY | os.O_NONBLOCK
_CREATE_ATTEMPTS: Final = 8
_MADE: Final = (stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK)
_NO_ATTRIBUTES: Final = bytes(ATTR.size)


class NameOperations:
    """One share's."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._reach = core.reach
        self._promises = core.promises

    def methods(self) -> dict[type[FileCall[Any]], Callable[[Any, Any], Outcome]]:
        return {
            Lookup: self.lookup,
            MakeNode: self.make_node,
            MakeDirectory: self.make_directory,
            MakeSymlink: self.make_symlink,
            MakeLink: self.make_link,
            Create: self.create,
            CreateUnnamed: self.create_unnamed,
            Unlink: self.unlink,
            RemoveDirectory: self.remove_directory,
            Rename: self.rename,
            ReadLink: self.read_link,
            List: self.list,
        }

    # --- finding -----------------------------------------------------------------------------------

    def lookup(self, call: Lookup, payload: object) -> Outcome:
        """Mostly the name is known and means the same file: then one statx(2) is all."""
        name = call.name
        check_name(name)
        reach = self._reach
        directory = reach.acquire_directory(call.node)
        try:
            if directory.sealed:
                raise failure(errno.EACCES)
            promise = self._promises.look(directory, name)
            try:
                node, status = self.find(directory, name, promise)
            except FileNotFoundError:
                if promise is None:
                    raise
                return absent(promise)
            return self._core.entry(node, status, promise)
        finally:
            reach.release(directory)

    def find(self, directory: Node, name: bytes, promise: Promise | None) -> tuple[Node, Status]:
        """What ``name`` in ``directory``, which is acquired, stands for now; one lookup more of it."""
        if promise is not None and promise.node is None:  # nothing is known by this name
            return self._enter_open(directory, name, self._reach.open_entry(directory, name), promise)
        status = linux.statx(directory.descriptor, name)
        node = self._reach.known(directory, name, status)
        if node is None:
            return self._enter_open(directory, name, self._reach.open_entry(directory, name), promise)
        if promise is not None and not self._promises.is_known(promise, node):
            status = self._look_again(promise, node, status)
        return node, status

    def _look_again(self, promise: Promise, node: Node, status: Status) -> Status:
        """The first look at a file that is to be watched comes too early, or before it is known who writes it."""
        try:
            with self._reach.use(node.number):
                self._core.see_writers(node)
                if self._promises.found(promise, node):
                    return linux.fstatx(node.descriptor)
        except OSError:  # it is gone again: the lookup was in time
            promise.attributes = None
        except WouldWait:  # another thread will look it up
            self._reach.forget(node.number, 1)
            raise
        return status

    def _enter(self, directory: Node, name: bytes, promise: Promise | None) -> Outcome:
        """What ``name`` stands for now, and is not known yet."""
        descriptor = self._reach.open_entry(directory, name)
        return self._core.entry(*self._enter_open(directory, name, descriptor, promise), promise)

    def _enter_open(
        self, directory: Node | None, name: bytes, descriptor: int, promise: Promise | None
    ) -> tuple[Node, Status]:
        """A file that is open (O_PATH), one lookup more of it; ``descriptor`` is taken over."""
        try:
            status = linux.fstatx(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        node = self._reach.enter(directory, name, descriptor, status)
        try:
            return node, self._watched(node, status, promise)
        finally:
            self._reach.release(node)

    def _watched(self, node: Node, status: Status, promise: Promise | None) -> Status:
        """``status`` of ``node``, which is acquired; or, if it is watched from now on, a new one."""
        if promise is not None and self._promises.found(promise, node):
            return linux.fstatx(node.descriptor)
        return status

    # --- making ------------------------------------------------------------------------------------

    def make_node(self, call: MakeNode, payload: object) -> Outcome:
        kind = stat.S_IFMT(call.mode) or stat.S_IFREG
        if kind not in _MADE:
            raise failure(errno.EPERM if stat.S_ISCHR(kind) or stat.S_ISBLK(kind) else errno.EINVAL)
        with self._core.directory(call.node, call.name) as directory:
            promise = self._promises.look_into(directory)
            os.mknod(call.name, kind | stat.S_IMODE(call.mode), dir_fd=directory.descriptor)
            return self._made(directory, call.name, promise)

    def make_directory(self, call: MakeDirectory, payload: object) -> Outcome:
        with self._core.directory(call.node, call.name) as directory:
            promise = self._promises.look_into(directory)
            os.mkdir(call.name, stat.S_IMODE(call.mode), dir_fd=directory.descriptor)
            made = self._made(directory, call.name, promise)
            if promise is not None and promise.attributes is not None and promise.node is not None:
                with contextlib.suppress(OSError), self._reach.use(promise.node.number) as node:
                    # A program of the host may have been there before the mark.
                    promise.empty = not os.listdir(linux.magic_link(node.descriptor))
            return made

    def make_symlink(self, call: MakeSymlink, payload: object) -> Outcome:
        with self._core.directory(call.node, call.name) as directory:
            promise = self._promises.look_into(directory)
            os.symlink(call.target, call.name, dir_fd=directory.descriptor)
            return self._made(directory, call.name, promise)

    def make_link(self, call: MakeLink, payload: object) -> Outcome:
        """Of the file itself, through its descriptor: a symlink is linked, not followed."""
        with (
            self._core.directory(call.parent, call.name) as directory,
            self._core.changing(call.node) as node,
        ):
            source = linux.magic_link(node.descriptor)
            promise = self._promises.look_into(directory)
            os.link(source, call.name, dst_dir_fd=directory.descriptor, follow_symlinks=True)
            return self._made(directory, call.name, promise, node)

    def _made(
        self, directory: Node, name: bytes, promise: Promise | None, node: Node | None = None
    ) -> Outcome:
        """The guest has made ``name``, of ``node`` if that was there before."""
        if node is None:
            self._core.hand_over_entry(directory, name)
        self._changed(directory, promise, node)
        self._has_other_names(node)
        return self._enter(directory, name, promise)

    def create(self, call: Create, payload: object) -> Outcome:
        """The file is made with O_EXCL: what exists (a FIFO, a device, a symlink) is never opened by name."""
        with self._core.directory(call.node, call.name) as directory:
            for _ in range(_CREATE_ATTEMPTS):
                try:
                    return self._create_new(directory, call)
                except FileExistsError:
                    if call.flags & os.O_EXCL:
                        raise
                with contextlib.suppress(FileNotFoundError):  # it went meanwhile
                    return self._take_existing(directory, call)
        raise failure(errno.ESTALE)

    def _create_new(self, directory: Node, call: Create) -> Outcome:
        mode = stat.S_IMODE(call.mode)
        promise = self._promises.look_into(directory)
        descriptor = self._reach.opening(
            lambda: os.open(call.name, _CREATE, mode, dir_fd=directory.descriptor)
        )
        self._core.hand_over(descriptor)
        self._changed(directory, promise)
        if promise is not None and not (
            self._promises.is_alone(promise) or self._is_still(directory, call.name, descriptor)
        ):
            promise = None
        return self._enter_created(directory, call.name, descriptor, promise)

    @staticmethod
    def _is_still(directory: Node, name: bytes, descriptor: int) -> bool:
        """Whether the file that was just made has its name yet: a program of the host may have taken that."""
        try:
            found, made = linux.statx(directory.descriptor, name), linux.fstatx(descriptor)
        except OSError:
            return False
        return (found.device, found.ino) == (made.device, made.ino)

    def _enter_created(
        self, directory: Node | None, name: bytes, descriptor: int, promise: Promise | None
    ) -> Outcome:
        """``descriptor`` is of the new file, open for its data, and stays open for the writes that will follow."""
        try:
            held = self._reach.opening(lambda: linux.reopen(descriptor, os.O_PATH))
            status = linux.fstatx(descriptor)
            node = self._reach.enter(directory, name, held, status)
        except BaseException:
            os.close(descriptor)
            raise
        try:
            self._core.files.adopt(node, descriptor)
            return self._core.entry(node, self._watched(node, status, promise), promise)
        finally:
            self._reach.release(node)

    def _take_existing(self, directory: Node, call: Create) -> Outcome:
        """The guest's kernel takes it for new, so it checks and truncates nothing: both are done here."""
        promise = self._promises.look_into(directory)
        descriptor = self._reach.open_entry(directory, call.name)
        try:
            kind = linux.fstatx(descriptor).kind
            if kind == stat.S_IFDIR:
                raise failure(errno.EISDIR)
            if kind != stat.S_IFREG:  # the guest's kernel looks again, and does what open(2) does with it
                raise failure(errno.ESTALE)
            if call.flags & os.O_TRUNC:
                os.close(self._reach.opening(lambda: linux.reopen(descriptor, _TRUNCATE)))
        except BaseException:
            os.close(descriptor)
            raise
        return self._core.entry(*self._enter_open(directory, call.name, descriptor, promise), promise)

    def create_unnamed(self, call: CreateUnnamed, payload: object) -> Outcome:
        flags = os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC | call.flags & os.O_EXCL
        with self._core.directory(call.node) as directory:
            descriptor = self._reach.opening(
                lambda: os.open(b".", flags, stat.S_IMODE(call.mode), dir_fd=directory.descriptor)
            )
            return self._enter_created(None, b"", descriptor, None)

    # --- removing ----------------------------------------------------------------------------------

    def unlink(self, call: Unlink, payload: object) -> Outcome:
        return self._remove(call, os.unlink)

    def remove_directory(self, call: RemoveDirectory, payload: object) -> Outcome:
        return self._remove(call, os.rmdir)

    def _remove(self, call: Unlink | RemoveDirectory, remove: Callable[..., None]) -> Outcome:
        with self._core.directory(call.node, call.name) as directory:
            self._check_unsealed(directory, call.name)
            promise = self._promises.look_into(directory)
            with self._holding(directory, call.name, loses=True) as node:
                remove(call.name, dir_fd=directory.descriptor)
                self._changed(directory, promise, node)
                self._reach.removed(directory, call.name)
                self._has_other_names(node)
                gone = promise is not None and (
                    self._promises.is_alone(promise) or self._is_absent(directory, call.name)
                )
                number = 0 if node is None else node.number
        return Outcome(Removed(node=number), promise=promise if gone else None)

    def _is_absent(self, directory: Node, name: bytes) -> bool:
        """Whether what the guest has just removed still is: a program of the host may have made another meanwhile."""
        try:
            linux.statx(directory.descriptor, name)
        except FileNotFoundError:
            return True
        except OSError:
            return False
        return False

    def _changed(self, directory: Node, promise: Promise | None, node: Node | None = None) -> None:
        """The guest has made or removed a name in the directory, of ``node`` if that is known. Its kernel asks for the
        directory's attributes after each of these."""
        self._promises.changed(promise, node)
        if promise is not None:
            with contextlib.suppress(OSError):  # what was done is done
                promise.above = self._core.attr(linux.fstatx(directory.descriptor))

    def _has_other_names(self, node: Node | None) -> None:
        """The guest has taken a name from a file, or given it one. Its agent does not know that the list of another
        directory, which it may yet pass on to its kernel, tells of this file, too."""
        if node is not None and node.listed and node.links:
            self._core.renew(node)

    def rename(self, call: Rename, payload: object) -> Outcome:
        if call.flags not in (0, linux.RENAME_NOREPLACE, linux.RENAME_EXCHANGE):
            raise failure(errno.EINVAL)
        exchange = call.flags == linux.RENAME_EXCHANGE
        with (
            self._core.directory(call.node, call.name) as old,
            self._core.directory(call.parent, call.new_name) as new,
        ):
            self._check_unsealed(old, call.name)
            self._check_unsealed(new, call.new_name)
            promise = self._promises.look_into(new)
            other = promise if old is new else self._promises.look_into(old)
            with (
                self._holding(old, call.name) as node,
                self._holding(new, call.new_name, loses=not call.flags) as replaced,
            ):
                if node is not None:
                    self._core.see_writers(node)  # which may have to wait, and then nothing has been done yet
                nothing = replaced is None and self._is_absent(new, call.new_name)
                linux.renameat2(old.descriptor, call.name, new.descriptor, call.new_name, call.flags)
                self._promises.changed(promise, node, replaced)
                if old is not new:
                    self._promises.changed(other)
                self._reach.moved(old, call.name, new, call.new_name, exchange=exchange)
                if not exchange:
                    self._has_other_names(replaced)
                stands = promise is not None and self._stands_for(new, call.new_name, node)
                if exchange:
                    stands = stands and other is not None and self._stands_for(old, call.name, replaced)
                outcome = self._renamed(call, node, node if nothing else replaced)
                if stands and outcome.files:
                    outcome = self._look_at_renamed(call, old, node, promise, outcome)
        if exchange and promise is not None and other is not None and other is not promise:
            promise.other, promise.other_names = other.directory, other.names
        return Outcome(outcome, promise=promise if stands else None)

    @staticmethod
    def _renamed(call: Rename, node: Node | None, replaced: Node | None) -> Renamed:
        files = node is not None and node.kind != stat.S_IFDIR and call.flags != linux.RENAME_EXCHANGE
        return Renamed(
            0 if node is None else node.number,
            files=files,
            replaced=0 if replaced is None else replaced.number,
        )

    def _look_at_renamed(
        self, call: Rename, old: Node, node: Node | None, promise: Promise | None, outcome: Renamed
    ) -> Renamed:
        """What is asked for next: the attributes of the file, which has another ctime, and, by who makes a lock file
        again, the old name. That one is vouched for by the directory of the new one, so only if it is the same."""
        if node is None or promise is None:
            return outcome
        gone, attr = call.node == call.parent and self._is_absent(old, call.name), b""
        if gone:
            with contextlib.suppress(OSError):  # what was done is done
                promise.above = self._core.attr(linux.fstatx(old.descriptor))
        if self._promises.found(promise, node):
            status = linux.fstatx(node.descriptor)
            if is_given(node, status, self._promises.heard(node)):
                attr = self._core.attr(status)
                promise.given = remembered(attr)
            else:
                promise.attributes = None
        return replace(outcome, attr=attr, gone=gone)

    def _stands_for(self, directory: Node, name: bytes, node: Node | None) -> bool:
        """Whether what the guest has just given ``name`` still has it: a program of the host may have been faster."""
        try:
            status = linux.statx(directory.descriptor, name)
        except OSError:
            return False
        return node is not None and self._reach.devices.is_key(node.key, status)

    @contextlib.contextmanager
    def _holding(self, directory: Node, name: bytes, *, loses: bool = False) -> Iterator[Node | None]:
        """Hold the file that is about to lose ``name``, and with it the way to what is below. ``loses``: it gets no
        other for it."""
        node = self._reach.victim(directory, name, loses=loses)
        try:
            yield node
        finally:
            if node is not None:
                self._reach.spare(node)

    def _check_unsealed(self, directory: Node, name: bytes) -> None:
        """A sealed directory is neither moved nor removed, and nor is what leads to it. No guest can make ``name`` mean
        that after this look, since it would have to move it."""
        seals = self._core.seals
        if not seals:
            return
        try:
            status = linux.statx(directory.descriptor, name)
        except FileNotFoundError:
            return
        file = (status.device, status.ino)
        if file in seals:
            raise failure(errno.EACCES)
        if seals.is_on_the_way(file):
            raise failure(errno.EBUSY)

    # --- reading -----------------------------------------------------------------------------------

    def read_link(self, call: ReadLink, payload: object) -> Outcome:
        with self._reach.use(call.node) as node:
            if node.kind != stat.S_IFLNK:
                raise failure(errno.EINVAL)
            return Outcome(Content(os.readlink(b"", dir_fd=node.descriptor)))

    def list(self, call: List, payload: object) -> Outcome:
        if call.after < 0:
            raise failure(errno.EINVAL)
        stream = (call.node, call.handle)
        with self._reach.use_directory(call.node) as directory:
            snapshot = self._core.snapshots.get(stream) if call.after else None
            if snapshot is None:
                snapshot = self.take_snapshot(directory)
            records, names, end = snapshot.piece(call.after, snapshots.PIECE)
            attributes = b""
            if call.attributes and len(names) > MAX_LISTED_WITH_ATTRIBUTES:
                names, end = names[:MAX_LISTED_WITH_ATTRIBUTES], False
                records = records[: sum(_record_size(name) for name in names)]
            if call.attributes:
                attributes = b"".join(self._attr_of(directory, name) for name in names)
        if end:
            self._core.snapshots.drop(stream)
        else:
            self._core.snapshots.keep(stream, snapshot)
        assert len(records) + len(attributes) <= MAX_FILES_PAYLOAD
        return Outcome(Listing(len(records), end), records + attributes, snapshot.promise)

    def take_snapshot(self, directory: Node) -> snapshots.Snapshot:
        """The directory, which is acquired, as it is now. Raises ENOTDIR."""
        if directory.kind != stat.S_IFDIR:
            raise failure(errno.ENOTDIR)
        if directory.sealed:
            return snapshots.take((), int)
        promise = self._promises.look_into(directory)
        device = directory.key[0]
        flags = os.O_RDONLY | os.O_DIRECTORY
        descriptor = self._reach.opening(lambda: linux.reopen(directory.descriptor, flags))
        try:
            entries = linux.read_directory(descriptor)
        finally:
            os.close(descriptor)
        return snapshots.take(entries, lambda ino: self._core.inode(device, ino), promise)

    def _attr_of(self, directory: Node, name: bytes) -> bytes:
        try:
            status: Status = linux.statx(directory.descriptor, name)
        except OSError:
            return _NO_ATTRIBUTES
        return self._core.attr(status)


def absent(promise: Promise) -> Outcome:
    """There is no such name: ENOENT, if that cannot be promised after all."""
    promise.node = promise.attributes = None
    return Outcome(Entry(0, b""), promise=promise)


def _record_size(name: bytes) -> int:
    return DIRENT.size + len(name) + -len(name) % 8
