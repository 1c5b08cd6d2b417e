"""What happens on the host to what a guest was told: fanotify(7) marks on the files and directories that it was
promised to hear of.

The laws:
- Who reads the world first takes a ``Token``, and what it says is promised only if that still ``stands`` in trio's
  thread, where all events are handled: so what happens meanwhile either has moved it, or is told after the answer.
- A change is told to every share that knows the file. What this process did itself it did for a guest that has its
  answer; that is told only if another share may know the file, too.
- What was missed is never passed over: when the queue has overflowed, marks were lost or an event cannot be understood,
  the ``epoch`` moves, and nothing that was promised stands any more.
- Nothing is promised of what has no mark of its own. That of a file hears of writes by whatever name, and of another
  name being made; that of the directory it is in does not.

A mark costs 5 us and keeps an inode in the kernel's memory (1 KiB), and there is a limit for all of a user's programs.
To remove one takes a descriptor of the file; of what is forgotten without one the mark is left over, and when there are
too many of these a new group takes the old one's place.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import stat
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeAlias

from fileserver import fanotify, linux
from fileserver.devices import tells
from fileserver.fanotify import Event, FanotifyGroup, identify
from fileserver.linux import failure
from fileserver.nodes import Node, move, next_version
from protocol.lane import READABLE, Lane

logger = logging.getLogger(__name__)

NAMES: Final = fanotify.CREATE | fanotify.DELETE | fanotify.MOVED_FROM | fanotify.MOVED_TO
_SELF: Final = fanotify.ATTRIB | fanotify.DELETE_SELF | fanotify.MOVE_SELF
_DIRECTORY: Final = NAMES | _SELF | fanotify.ONDIR
_FILE: Final = fanotify.MODIFY | fanotify.CLOSE_WRITE | _SELF

BATCH: Final = 1 << 15
"""Bytes of events handled at once: about 450, which takes 2 ms."""

FILES: Final = 0.5
"""Of the marks that the user may have: without that of its directory a file's is of no use."""

LEFT_OVER: Final = 4096
"""Marks of what nobody knows any more that may be left, and as many as there are others."""

LIMIT: Final = "fs.fanotify.max_user_marks"
_LIMIT_PATH: Final = Path("/proc/sys", *LIMIT.split("."))

_UNTOLD: Final = (errno.ENODEV, errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.EMFILE)
"""A filesystem cannot tell: no id, no handles, one of several below a btrfs (before Linux 6.8); or no group for it."""

Token: TypeAlias = tuple[int, int]
"""When the world was read: the epoch, and the version of a node."""


@dataclass(slots=True)
class Changes:
    """What others did to the files of one share, as of one look at the queue.

    ``names``: what these stand for in a directory; its attributes and its listing have changed with them. ``selves``:
    directories that have other attributes, or were moved or removed. ``files``: what has other attributes or data, with
    the bits of what happened to it.
    """

    names: dict[Node, set[bytes]] = field(default_factory=dict)
    selves: set[Node] = field(default_factory=set)
    files: dict[Node, int] = field(default_factory=dict)

    def add(self, node: Node, event: Event) -> None:
        if event.child:
            self.files[node] = self.files.get(node, 0) | event.mask
        elif event.mask & NAMES:
            self.names.setdefault(node, set()).add(event.name)
        else:
            self.selves.add(node)


class _Device:
    """The group for a filesystem, or for what has a device number of its own in it: the parts of a btrfs share no group
    with anything else."""

    def __init__(self) -> None:
        self.group = FanotifyGroup()
        self.marks = 0  # but for those left over
        self.left_over: set[bytes] = set()


class Watch:
    """The mark of a file that shares know, by their nodes; without a device, why there is none."""

    __slots__ = ("device", "holders", "is_file", "key", "opens")

    def __init__(self, key: bytes, device: _Device | None, is_file: bool) -> None:
        self.key = key
        self.device = device
        self.is_file = is_file
        self.opens = False  # it is heard of who opens it, too
        self.holders: tuple[tuple[int, Node], ...] = ()


_LIMITED: Final = Watch(b"", None, False)
_DENIED: Final = Watch(b"", None, False)


class Watches:
    """Those of the process. Its methods may be called from any thread where nothing else is said."""

    def __init__(
        self, lane: Lane, on_changes: Callable[[int, Changes], None], on_void: Callable[[str], None]
    ) -> None:
        """``on_changes`` is called in trio's thread with a share's id, ``on_void`` with the reason why nothing that was
        promised stands any more. Neither may wait, or raise. (Trio's thread.)"""
        self.epoch = next_version()
        self.news = 0
        """How often something was handled here that others did. Who has found it as before on both sides of a change of
        his own, and of the token after that, need not look whether somebody was faster: what others did meanwhile has
        yet to be handled, so it moves that token, or is told after the answer."""
        self._on_changes, self._on_void = on_changes, on_void
        self._pid = os.getpid()
        self._lock = threading.Lock()  # of what follows; held for system calls that do not wait
        self._watches: dict[bytes, Watch] = {}
        self._devices: dict[int, _Device] = {}
        self._known: Counter[int] = Counter()  # of a share, nodes that have a mark
        self._shared = 0  # marks of what several shares know
        self._limited: Counter[int] = Counter()  # of a share, those for which none was left
        self._denied = 0
        self._files, self._max_files = 0, _max_files()
        self._full = False  # until the next look
        self._warned = False  # once; listings come upon the limit with each name
        self._untold: set[int] = set()  # devices, until the next look
        self._said: set[int] = set()
        self._closed = not _is_offered()
        self._lane, self._ready = lane, select.epoll()
        self._by_descriptor: dict[int, _Device] = {}
        lane.watch(self._ready.fileno(), READABLE, self._on_readable)

    # --- promising ---------------------------------------------------------------------------------

    def token(self, node: Node) -> Token | None:
        """As ``sample`` of a node that has its mark, else None."""
        token = self.epoch, node.version  # before the mark is looked at, which may be lost in the next moment
        watch = node.watch
        return token if watch is not None and watch.device is not None else None

    def sample(self, share: int, node: Node, descriptor: int = -1) -> Token | None:
        """A token of a node, before the world is read, and the mark that it needs. None: nothing can be promised of it.

        ``descriptor`` is of the file; else the node is acquired.
        """
        token = self.epoch, node.version
        return token if self.watch(share, node, descriptor) else None

    def moved(self, node: Node, token: Token | None) -> Token | None:
        """The token for what is read after this process itself has changed the node."""
        version = move(node)
        return token and (token[0], version)

    def stands(self, node: Node, token: Token | None) -> bool:
        """Whether nothing has happened to the node since ``token`` was taken that is not going to be told. (Trio's
        thread.)"""
        return token == (self.epoch, node.version) and not node.dead

    def void(self, reason: str) -> None:
        """Nothing that was promised stands any more. (Trio's thread.)"""
        self.epoch = next_version()
        self._on_void(reason)

    # --- marking -----------------------------------------------------------------------------------

    def watch(self, share: int, node: Node, descriptor: int = -1) -> bool:
        """Whether changes of the node are heard of from now on. ``descriptor`` as in ``sample``."""
        watch = node.watch
        if watch is not None and watch.device is not None:
            return True
        if self._closed or node.key[0] in self._untold or (watch is _LIMITED and self._is_full(node)):
            return False
        try:
            filesystem, key = identify(node.descriptor if descriptor < 0 else descriptor)
            if tells(filesystem):
                return self._watch(share, node, key, node.descriptor if descriptor < 0 else descriptor)
            self._untold.add(node.key[0])
        except OSError as error:
            self._refused(share, node, error)
        return False

    def watch_opens(self, node: Node, descriptor: int) -> bool:
        """Whether it is heard from now on when others open a file, which has its mark. ``descriptor`` is of it."""
        watch = node.watch
        if watch is None or watch.device is None:
            return False
        if not watch.opens:
            with self._lock, suppress(OSError):
                if node.watch is watch and self._watches.get(watch.key) is watch:
                    watch.device.group.mark(descriptor, fanotify.OPEN)
                    watch.opens = True
        return watch.opens

    def hears_opens(self, node: Node) -> bool:
        """Whether ``watch_opens`` was called of the mark that the node has now."""
        watch = node.watch
        return watch is not None and watch.opens

    def _watch(self, share: int, node: Node, key: bytes, descriptor: int) -> bool:
        with self._lock:
            if node.dead or not node.kind or self._closed:
                return False
            watch = self._watches.get(key)
            if watch is None:
                watch = self._mark(node, key, descriptor)
            if node.watch is not watch:
                self._let_go(share, node, -1)
                watch.holders = (*watch.holders, (share, node))
                node.watch = watch
                self._known[share] += 1
                self._shared += len(watch.holders) == 2
            return True

    def _mark(self, node: Node, key: bytes, descriptor: int) -> Watch:
        if self._is_full(node):
            raise failure(errno.ENOSPC)
        device = self._device(node.key[0])
        watch = Watch(key, device, node.kind != stat.S_IFDIR)
        try:
            device.group.mark(descriptor, _FILE if watch.is_file else _DIRECTORY)
        except OSError as error:
            self._full = error.errno == errno.ENOSPC
            raise
        device.marks += 1
        device.left_over.discard(key)
        self._files += watch.is_file
        self._watches[key] = watch
        return watch

    def _device(self, number: int) -> _Device:
        device = self._devices.get(number)
        if device is None:
            device = self._devices[number] = _Device()
            self._by_descriptor[device.group.fileno()] = device
            self._ready.register(device.group.fileno(), select.EPOLLIN)
        return device

    def _is_full(self, node: Node) -> bool:
        return self._full or (self._files >= self._max_files and node.kind != stat.S_IFDIR)

    def _refused(self, share: int, node: Node, error: OSError) -> None:
        if error.errno in _UNTOLD:
            self._untold.add(node.key[0])
            self._say(node.key[0], error)
            return
        with self._lock:
            if node.dead or (node.watch is not None and node.watch.device is not None):
                return  # another thread was luckier
            self._leave(share, node)
            if error.errno != errno.ENOSPC:  # EACCES: nobody may be told of a file that he may not read
                node.watch = _DENIED
                self._denied += 1
                return
            if not self._warned:
                self._warned = True
                logger.warning("no mark is left (%s=%d), so guests ask again and again", LIMIT, limit())
            node.watch = _LIMITED
            self._limited[share] += 1

    def _say(self, device: int, error: OSError) -> None:
        if device not in self._said:
            self._said.add(device)
            where = f"{os.major(device)}:{os.minor(device)}"
            logger.info("the filesystem on device %s cannot be watched: %s", where, error.strerror)

    # --- forgetting --------------------------------------------------------------------------------

    def forget(self, share: int, node: Node, descriptor: int = -1, name: bytes = b"") -> None:
        """The node is dead. ``descriptor`` is of the file, and the caller's until this returns; with a ``name``, it is
        of the directory that may still have the file by this name."""
        watch = node.watch
        if watch is None:
            return
        if not name or watch.device is None:
            with self._lock:
                self._let_go(share, node, descriptor)
            return
        found = _find(descriptor, name, watch.key)
        with self._lock:
            self._let_go(share, node, found)
        if found >= 0:
            os.close(found)

    def forget_share(self, share: int) -> None:
        """None of the share's nodes counts as marked any more: it is closed, or what is mounted below it is another
        filesystem, or the same one without the marks."""
        with self._lock:
            for watch in list(self._watches.values()):
                for holder in watch.holders:
                    if holder[0] == share:
                        self._leave(*holder)
                if not watch.holders:
                    self._drop(watch, -1)

    def _leave(self, share: int, node: Node) -> None:
        watch, node.watch = node.watch, None
        if watch is _LIMITED:
            self._limited[share] -= 1
        elif watch is _DENIED:
            self._denied -= 1
        elif watch is not None:
            self._shared -= len(watch.holders) == 2
            watch.holders = tuple(holder for holder in watch.holders if holder[1] is not node)
            self._known[share] -= 1

    def _let_go(self, share: int, node: Node, descriptor: int) -> None:
        watch = node.watch
        self._leave(share, node)
        if watch is not None and not watch.holders:
            self._drop(watch, descriptor)

    def _drop(self, watch: Watch, descriptor: int) -> None:
        """Nobody holds it."""
        device = watch.device
        if device is None:
            return
        self._removed(watch, device)
        if descriptor >= 0:
            with suppress(OSError):
                device.group.unmark(descriptor, _FILE | fanotify.OPEN if watch.is_file else _DIRECTORY)
                self._full = False
                return
        device.left_over.add(watch.key)

    def _removed(self, watch: Watch, device: _Device) -> None:
        del self._watches[watch.key]
        device.marks -= 1
        self._files -= watch.is_file

    # --- events, in trio's thread ------------------------------------------------------------------

    def _on_readable(self, ready: int) -> None:
        for descriptor, _ in self._ready.poll(0):
            device = self._by_descriptor.get(descriptor)
            if device is not None:
                self._handle(device, device.group.read(BATCH))

    def _handle(self, device: _Device, block: bytes) -> None:
        changes: dict[int, Changes] = {}
        tells_own = self._may_be_known_elsewhere()
        # Most of it is what this process did, for which there is nobody to be told.
        events = fanotify.parse(block, -1 if tells_own or self._shared else self._pid)
        missed = False
        for event in events:
            if event.mask & fanotify.Q_OVERFLOW:
                missed = True
                continue
            watch = self._watches.get(event.child or event.directory)
            if watch is None:
                if event.mask & fanotify.DELETE_SELF:
                    device.left_over.discard(event.child or event.directory)
                continue
            holders = watch.holders
            if event.mask & fanotify.DELETE_SELF:
                self._deleted(watch)
            if event.pid == self._pid and len(holders) < 2 and not tells_own:
                continue
            self.news += 1  # before the token moves: who looks in between must not miss it
            for share, node in holders:
                move(node)
                if share not in changes:
                    changes[share] = Changes()
                changes[share].add(node, event)
        for share, told in changes.items():
            self._on_changes(share, told)
        if missed:
            self.void("more happened on the host than its kernel could tell")

    def _may_be_known_elsewhere(self) -> bool:
        """Whether a share that does something to a file may have no mark of it when another one has."""
        with self._lock:
            if not self._denied and not self._limited.total():
                return False
            return sum(map(bool, self._known.values())) > 1

    def _deleted(self, watch: Watch) -> None:
        """The file is gone, and its mark with it."""
        self.news += 1
        with self._lock:
            for share, node in watch.holders:
                self._leave(share, node)
                move(node)
            if watch.device is not None and self._watches.get(watch.key) is watch:
                self._removed(watch, watch.device)

    # --- looking after it, in trio's thread --------------------------------------------------------

    def look(self) -> None:
        """To be called once a second."""
        self._full = False
        self._untold.clear()
        self._max_files = _max_files()
        for number, device in list(self._devices.items()):
            left = len(device.left_over)
            if left >= LEFT_OVER and (left >= device.marks or self._limited.total()):
                self._renew(number, device)

    def _renew(self, number: int, device: _Device) -> None:
        """Marks that are left over go with the group that has them. The others are made again, in another group, as
        soon as they are asked for."""
        with self._lock:
            lost = [watch for watch in self._watches.values() if watch.device is device]
            for watch in lost:
                for holder in watch.holders:
                    self._leave(*holder)
                self._removed(watch, device)
            del self._devices[number], self._by_descriptor[device.group.fileno()]
            self._ready.unregister(device.group.fileno())
        # It takes 5 us for each mark.
        threading.Thread(target=device.group.close, name="fanotify-close", daemon=True).start()
        if lost:  # only now: whoever samples the new epoch finds none of the old marks
            self.void("marks were left over")

    def close(self) -> None:
        """Watch nothing any more; the lane may be closed after that. (Trio's thread.)"""
        with self._lock:
            if self._ready.closed:
                return
            self._closed = True
            self._lane.forget(self._ready.fileno())
            self._ready.close()
            for device in self._devices.values():
                device.group.close()
            self._devices.clear()
            self._by_descriptor.clear()

    # --- how it is doing ---------------------------------------------------------------------------

    @property
    def marks(self) -> int:
        """Files and directories whose changes are heard of."""
        return len(self._watches)

    @property
    def is_full(self) -> bool:
        """Whether no file gets a mark just now that has none."""
        return self._full or self._files >= self._max_files

    def unwatched(self, share: int) -> int:
        """Files and directories of a share whose changes are not heard of because there are too many (``LIMIT``)."""
        return self._limited[share]

    @property
    def limit_hint(self) -> str:
        """What to do about these."""
        return f"sudo sysctl {LIMIT}={2 * limit()}"


def _find(directory: int, name: bytes, key: bytes) -> int:
    """A descriptor of the file, if it is still found by this name, else -1."""
    found = -1
    with suppress(OSError):
        found = linux.open_entry(directory, name)
        if identify(found).key == key:
            return found
    if found >= 0:
        os.close(found)
    return -1


def limit() -> int:
    """Marks that this user may have."""
    try:
        return int(_LIMIT_PATH.read_text())
    except (OSError, ValueError):
        return 8192  # what the kernel gives at least


def _max_files() -> int:
    return int(limit() * FILES)


def _is_offered() -> bool:
    """Whether the kernel lets an ordinary user have a group."""
    try:
        FanotifyGroup().close()
    except OSError as error:
        logger.warning(
            "nothing on the host can be watched, so guests ask again and again: %s", error.strerror
        )
        return False
    return True
