"""From a path of the view to a place of the guest's and a number in it, and to what is known of that.

For one thread. The laws:
- Before each operation it is seen whether the guest's process is still the same, and which places it has.
- A path is walked name by name in the guest, which never leaves the place; nothing is followed here.
- A number that has become good for nothing is found again by its path, once.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar
from zlib import crc32

from host_agent.view.attributes import Attributes, Ownership, inode, unpack
from host_agent.view.lookups import Key, Lookups
from host_agent.view.tree import Directory, Place, Tree, is_name
from protocol.files import ROOT, Entry, FileCall, Forget, GetAttributes, Lookup, SetAttributes

T = TypeVar("T")
ResultT = TypeVar("ResultT")
ResultT_co = TypeVar("ResultT_co", covariant=True)

FORGET_AT: Final = 64
"""Nodes that are given back in one message."""


class Answer(Protocol[ResultT_co]):
    """What will be answered; ``wait`` raises ``OSError``, and gives up after a time."""

    def wait(self) -> tuple[ResultT_co, bytes]: ...


class Asker(Protocol):
    """Who carries calls to the guest. ``epoch`` names its process there: with another one all numbers are void."""

    @property
    def epoch(self) -> str: ...
    @property
    def tree(self) -> Tree: ...
    def begin(self, call: FileCall[ResultT], payload: bytes = b"") -> Answer[ResultT]:
        """Never waits, never raises."""


def failure(number: int) -> OSError:
    return OSError(number, os.strerror(number))


@dataclass(frozen=True, slots=True)
class Name:
    """A name in a place: where it is, and whose."""

    place: Place
    directory: int
    name: bytes

    @property
    def key(self) -> Key:
        return Key(self.place.number, self.directory, self.name)


@dataclass(slots=True)
class _Watched:
    """A file that is open ``uses`` times. ``state``: by what a kernel tells that it has changed; size, mtime, ctime, as
    last shown. ``version`` counts such changes."""

    uses: int = 0
    state: tuple[int, int, int] | None = None
    version: int = 0


class Reach:
    """What one mount can reach, and what it knows of that."""

    def __init__(
        self, asker: Asker, ownership: Ownership, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._asker = asker
        self.ownership = ownership
        self.lookups = Lookups(clock)
        self.epoch = asker.epoch
        self.tree = asker.tree
        self._watched: dict[tuple[int, int], _Watched] = {}

    def begin(self, call: FileCall[ResultT], payload: bytes = b"") -> Answer[ResultT]:
        return self._asker.begin(call, payload)

    def ask(self, call: FileCall[ResultT], payload: bytes = b"") -> tuple[ResultT, bytes]:
        return self._asker.begin(call, payload).wait()

    def look_around(self) -> None:
        """Before each operation: is the guest's process the same, and which places does it have?"""
        if self._asker.epoch != self.epoch:
            self.epoch = self._asker.epoch
            self.lookups.forget_all()
        if self._asker.tree is not self.tree:
            gone = {place.number for place in self.tree.places}
            self.tree = self._asker.tree
            for number in gone - {place.number for place in self.tree.places}:
                self.lookups.forget_place(number)
        if self.lookups.released >= FORGET_AT:
            for place, nodes in self.lookups.take_released().items():
                self._asker.begin(Forget(place, 0, 0, list(nodes), list(nodes.values())))

    def find(self, path: bytes) -> tuple[Directory | Place, tuple[bytes, ...]]:
        self.look_around()
        found = self.tree.find(path)
        if found is None:
            raise failure(errno.ENOENT)
        return found

    def in_place(self, path: bytes) -> tuple[Place, tuple[bytes, ...]]:
        """Raises EROFS for what is above the places."""
        where, names = self.find(path)
        if isinstance(where, Directory):
            raise failure(errno.EROFS)
        return where, names

    def again(self, place: int, attempt: Callable[[], T]) -> T:
        """Once more if a number was good for nothing: what is known by name may have been replaced there."""
        try:
            return attempt()
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
        self.lookups.forget_place(place)
        return attempt()

    def node(self, place: Place, names: tuple[bytes, ...]) -> int:
        node = ROOT
        for name in names:
            key = Key(place.number, node, name)
            node = self.lookups.find(key) or self.look_up(key).node
        return node

    def look_up(self, key: Key) -> Entry:
        try:
            entry, _ = self.ask(Lookup(key.place, 0, key.directory, key.name))
        except OSError:
            self.lookups.gone(key)
            raise
        return self._entered(key, entry)

    def _entered(self, key: Key, entry: Entry) -> Entry:
        if entry.node <= ROOT:
            self.lookups.gone(key)
            raise failure(errno.ENOENT if entry.node == 0 else errno.EIO)
        unpack(entry.attr)
        self.lookups.enter(key, entry.node, entry.attr)
        return entry

    def entry(self, path: bytes, *, to_change: bool = True) -> Name:
        """A name in a place; the directory is found. Raises EROFS, EBUSY for a place itself."""
        self.look_around()
        above = self.tree.find(path.rpartition(b"/")[0])
        if above is not None and isinstance(above[0], Directory) and self.tree.find(path) is None:
            raise failure(errno.EROFS)
        place, names = self.in_place(path)
        if not names:
            raise failure(errno.EBUSY)
        if to_change and place.read_only:
            raise failure(errno.EROFS)
        if not is_name(names[-1]):
            raise failure(errno.ENAMETOOLONG)
        directory = self.again(place.number, lambda: self.node(place, names[:-1]))
        return Name(place, directory, names[-1])

    def changed_in(self, entry: Name) -> None:
        self.lookups.gone(entry.key)
        self.lookups.changed(entry.place.number, entry.directory)

    def made(self, entry: Name, call: FileCall[Entry]) -> Entry:
        self.changed_in(entry)
        made, _ = self.ask(call)
        return self._entered(entry.key, made)

    # --- attributes ----------------------------------------------------------------------------------

    def attributes(self, place: Place, node: int) -> bytes:
        return self.ask(GetAttributes(place.number, 0, node))[0].attr

    def set_attributes(self, place: Place, node: int, valid: int, **values: int) -> None:
        self.lookups.changed(place.number, node)
        result, _ = self.ask(SetAttributes(place.number, 0, node, valid, **values))
        self.changed(place, node, unpack(result.attr).ino)

    def shown(self, place: Place, raw: bytes) -> Attributes:
        """As they are told. From here on the kernel takes what it has of the file for what it is now."""
        attributes = unpack(raw)
        if (watched := self._watched.get((place.number, attributes.ino))) is not None:
            state = attributes.size, attributes.mtime, attributes.ctime
            watched.version += state != watched.state
            watched.state = state
        uid, gid = self.ownership.shown(attributes.uid, attributes.gid)
        return attributes._replace(uid=uid, gid=gid, ino=inode(crc32(b"/".join(place.path)), attributes.ino))

    def watch(self, place: Place, ino: int) -> None:
        """From now on the file's versions are counted."""
        self._watched.setdefault((place.number, ino), _Watched()).uses += 1

    def unwatch(self, place: Place, ino: int) -> None:
        watched = self._watched[place.number, ino]
        watched.uses -= 1
        if not watched.uses:
            del self._watched[place.number, ino]

    def version(self, place: Place, ino: int) -> int:
        """Of a file that is watched: another one once it was shown to have changed, or was changed by us."""
        return self._watched[place.number, ino].version

    def changed(self, place: Place, node: int, ino: int) -> None:
        """We change a file, or have done so."""
        self.lookups.changed(place.number, node)
        if (watched := self._watched.get((place.number, ino))) is not None:
            watched.version += 1
