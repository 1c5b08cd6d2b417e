"""What the guest may keep without asking again, for as long as it is not told otherwise (AFS's callbacks).

The laws:
- Who reads the world for an answer first takes samples of what is watched: of the directory for a name in it, of the
  node itself for its attributes. What the answer says is promised only if they still stand when it is sent, in
  trio's thread, where changes are told of. So what happens is told after the answer, or the answer promises nothing.
- What the guest itself changes in a directory unsettles all samples taken before, since its kernel takes its own
  changes for granted, and an older answer would undo them there.
- A file that a program of the host has open for writing may change without a word (``mmap``): its attributes are not
  promised (``Node.shared``). Nor are those of a file of which an alarm has yet to be raised (``signatures``).
- What was given under a promise is remembered (``Node.given``), so that it can be compared once nothing stands any more
  (``revalidation``).
"""

from __future__ import annotations

import stat
import time
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Final

from fileserver.nodes import Link, Node
from fileserver.signatures import COARSE_NS, UNSETTLED_NS, is_suspect
from fileserver.watches import Token, Watches
from protocol.files import ATTRIBUTES, EMPTY, NAME

UNCERTAIN: Final = -1
"""Of ``Node.given``: something was promised, and no later look can say that it is still so."""

_POSITIVE: Final = (1 << 62) - 1
_LATELY: Final = 4  # seconds: more than COARSE_NS


class Promise:
    """What was sampled before an answer: ``directory`` (and ``other``, of a rename) vouches for the name,
    ``node`` for its own attributes."""

    __slots__ = (
        "above",
        "attributes",
        "directory",
        "empty",
        "given",
        "names",
        "news",
        "node",
        "other",
        "other_names",
    )

    def __init__(
        self, directory: Node | None, names: Token | None, node: Node | None, attributes: Token | None
    ) -> None:
        self.directory, self.names = directory, names
        self.node, self.attributes = node, attributes
        self.other: Node | None = None
        self.other_names: Token | None = None
        self.given = 0
        """What is to be remembered of the attributes (``remembered``) if they do not go to the guest's kernel."""
        self.above = b""
        """Attributes of the directory, read when the guest had changed names in it."""
        self.news = -1
        """Before the directory was sampled (``Watches.news``)."""
        self.empty = False
        """The node is a directory, and there was no name in it."""


class Many(Promise):
    """Of an answer about many files: what was sampled before each of them was read, with its place in that answer."""

    __slots__ = ("files",)

    def __init__(self, files: list[tuple[int, Promise]]) -> None:
        super().__init__(None, None, None, None)
        self.files = files

    @abstractmethod
    def settled(self, result: Any, kept: Callable[[Promise], int]) -> object:
        """What of ``result`` can still be said now that it is about to be sent (``Promises.kept``)."""


class Promises:
    """Those of one share. Without ``watches`` nothing is ever promised."""

    def __init__(self, share: int, watches: Watches | None, by_name: Mapping[Link, Node]) -> None:
        """``by_name``: the table of the share, of which single entries are looked at without its lock."""
        self._share = share
        self._watches = watches
        self._by_name = by_name

    # --- sampling, in any thread -------------------------------------------------------------------

    def look(self, directory: Node, name: bytes) -> Promise | None:
        """What ``name`` in ``directory``, which is acquired, stands for is about to be read. None: no promise."""
        watches = self._watches
        if watches is None:
            return None
        names = watches.token(directory) or watches.sample(self._share, directory)
        if names is None:
            return None
        node = self._by_name.get((directory.number, name))
        return Promise(directory, names, node, None if node is None else watches.token(node))

    def look_at(self, node: Node) -> Promise | None:
        """The attributes of ``node``, which is acquired, are about to be read."""
        watches = self._watches
        if watches is None or node.sealed:
            return None
        attributes = watches.sample(self._share, node)
        return None if attributes is None else Promise(None, None, node, attributes)

    def look_into(self, directory: Node) -> Promise | None:
        """The names in ``directory``, which is acquired, are about to be read, or one of them changed."""
        watches = self._watches
        if watches is None:
            return None
        news = watches.news
        names = watches.sample(self._share, directory)
        if names is None:
            return None
        promise = Promise(directory, names, None, None)
        promise.news = news
        return promise

    @property
    def are_used_up(self) -> bool:
        """Whether nothing can be promised just now of files that have no mark yet."""
        return self._watches is not None and self._watches.is_full

    def is_watched(self, node: Node) -> bool:
        return self._watches is not None and self._watches.token(node) is not None

    def heard(self, node: Node) -> int | None:
        """Whoever writes to the file is told of, since before now: the epoch that this holds for. None: nobody is."""
        watches = self._watches
        token = None if watches is None else watches.token(node)
        return None if token is None else token[0]

    def found(self, promise: Promise, node: Node) -> bool:
        """The name stands for ``node``, which is acquired. True if its attributes are to be read (again) now."""
        promise.node, promise.attributes = node, None
        if self._watches is None or not self._is_plain(promise, node):
            return False
        promise.attributes = self._watches.sample(self._share, node)
        return promise.attributes is not None

    def is_known(self, promise: Promise, node: Node) -> bool:
        """Whether the samples that were taken are of ``node``, for which the name stands, and all that is needed."""
        return (
            promise.node is node
            and promise.attributes is not None
            and not node.sealed
            and self._is_nobodys_else(node)
        )

    def _is_nobodys_else(self, node: Node) -> bool:
        """Whether nobody else writes the file, as far as the guest has data of it."""
        if node.shared or self._watches is None:
            return False
        return node.base is None or node.kind != stat.S_IFREG or self._watches.hears_opens(node)

    @staticmethod
    def _is_plain(promise: Promise, node: Node) -> bool:
        """Not so a mount point, which comes and goes without an event in the directory, or what may not be seen."""
        directory = promise.directory
        if directory is None or node.key[0] != directory.key[0] or node.sealed:
            promise.directory = promise.names = None
            return False
        return True

    def changed(self, promise: Promise | None, *nodes: Node | None) -> None:
        """The guest has changed names in the directory of the promise, and with them attributes of ``nodes``: only
        what is read from now on can be promised."""
        watches = self._watches
        if watches is None:
            return
        if promise is not None and promise.directory is not None:
            promise.names = watches.moved(promise.directory, promise.names)
        for node in nodes:
            if node is not None:
                watches.moved(node, None)

    def is_alone(self, promise: Promise) -> bool:
        """Nothing was handled that others did, from the promise's sample until now, after it was ``changed``. Then
        what the guest made or removed in between need not be looked at again: if somebody was faster, the guest is
        told of that after its answer, or the answer promises nothing."""
        return self._watches is not None and self._watches.news == promise.news

    # --- answering, in trio's thread ---------------------------------------------------------------

    def kept(self, promise: Promise, attr: bytes = b"", *, stale: bool = False) -> int:
        """What can be promised of an answer: ``NAME``, ``ATTRIBUTES``, ``EMPTY``. It says that the node has ``attr``,
        and that the guest is to drop its data if it is ``stale``."""
        watches = self._watches
        if watches is None:
            return 0
        bits = 0
        directory, other, node = promise.directory, promise.other, promise.node
        if (
            directory is not None
            and watches.stands(directory, promise.names)
            and (other is None or watches.stands(other, promise.other_names))
        ):
            bits = NAME
            if promise.above:
                _remember_too(directory, remembered(promise.above))
        if (
            node is not None
            and promise.attributes is not None
            and watches.stands(node, promise.attributes)
            and self._is_nobodys_else(node)
            and (stale or not is_suspect(node))
        ):
            if promise.given:
                _remember_too(node, promise.given)
            else:
                node.given = remembered(attr)
            bits |= ATTRIBUTES | EMPTY if promise.empty else ATTRIBUTES
        return bits


def _remember_too(node: Node, given: int) -> None:
    """The guest's agent is told, and its kernel may still have what it was told before."""
    if node.given != given:
        node.given = UNCERTAIN if node.given else given


def fingerprint(attr: bytes) -> int:
    """A number, greater than 0, for what is promised of ``attr``: not its atime, nor its blocks."""
    return hash(attr[:16] + attr[32:48] + attr[52:80]) & _POSITIVE or 1


def remembered(attr: bytes) -> int:
    """The same, or a number that is no fingerprint if the file may change once more without another ctime."""
    ctime, now = int.from_bytes(attr[40:48], "little"), time.time_ns()
    if abs(now // 1_000_000_000 - ctime) < _LATELY:
        ctime_nsec = int.from_bytes(attr[56:60], "little")
        if abs(now - ctime * 1_000_000_000 - ctime_nsec) < (UNSETTLED_NS if ctime_nsec else COARSE_NS):
            return UNCERTAIN
    return fingerprint(attr)
