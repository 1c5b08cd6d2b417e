"""A guest of one shared folder, for tests: asks the tree directly, and counts what must not be lost."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from fileserver.nodes import Identity, Link, RestoredNode
from fileserver.tree import Tree
from protocol.files import ATTR, DIRENT, ROOT, Entry, FileCall, Forget, List, Lookup

NOBODY = 65534


class Attr(NamedTuple):
    """``struct fuse_attr``."""

    ino: int
    size: int
    blocks: int
    atime: int
    mtime: int
    ctime: int
    atimensec: int
    mtimensec: int
    ctimensec: int
    mode: int
    nlink: int
    uid: int
    gid: int
    rdev: int
    blksize: int
    flags: int


def attr(result: Any) -> Attr:
    return Attr(*ATTR.unpack(result.attr))


@dataclass
class Record:
    identity: Identity
    lookups: int = 0
    links: list[Link] = field(default_factory=list)


class Journal:
    """A ``Recorder`` that keeps what a successor would be given."""

    def __init__(self) -> None:
        self.records: dict[int, Record] = {}

    def node(self, node: int, parent: int, name: bytes, identity: Identity) -> None:
        record = self.records.setdefault(node, Record(identity))
        record.identity = identity
        if name:
            record.links.append((parent, name))

    def unlinked(self, node: int, parent: int, name: bytes) -> None:
        if node in self.records:
            self.records[node].links.remove((parent, name))

    def counted(self, node: int, lookups: int) -> None:
        if lookups:
            self.records[node].lookups = lookups
        else:
            del self.records[node]

    def restored(self) -> list[RestoredNode]:
        return [
            RestoredNode(node, record.lookups, record.identity, list(record.links))
            for node, record in self.records.items()
        ]


class Served:
    """``ask`` answers as the guest would see it; paths are relative to the share."""

    def __init__(self, path: Path, **options: Any) -> None:
        self.path = path
        self.journal = Journal()
        self._unique = itertools.count(1)
        self.options: dict[str, Any] = {"read_only": False, **options}
        self.tree = Tree(str(path), recorder=self.journal, **self.options)

    def call(self, kind: type[FileCall[Any]], *fields: Any, **named: Any) -> FileCall[Any]:
        return kind(1, next(self._unique), *fields, **named)  # type: ignore[call-arg]

    def ask(self, kind: type[FileCall[Any]], *fields: Any, payload: bytes = b"", **named: Any) -> Any:
        call = self.call(kind, *fields, **named)
        value: Any = self.tree.perform(call, payload).value
        if getattr(value, "stale", False):  # as the server does when the answer is on its way
            self.tree.alarm_told(getattr(value, "node", call.node))
        return value

    def bytes(self, kind: type[FileCall[Any]], *fields: Any) -> bytes:
        return self.tree.perform(self.call(kind, *fields)).payload

    def refused(self, kind: type[FileCall[Any]], *fields: Any, **named: Any) -> str:
        """The name of the errno, ``"0"`` for none."""
        return refused(lambda: self.ask(kind, *fields, **named))

    def entry(self, path: str | bytes) -> Entry:
        """Looked up component by component; one lookup of each."""
        entry = Entry(ROOT, b"")
        for name in os.fsencode(path).split(b"/"):
            entry = self.ask(Lookup, entry.node, name)
        return entry

    def node(self, path: str | bytes) -> int:
        return self.entry(path).node

    def forget(self, node: int, count: int = 1) -> None:
        self.ask(Forget, 0, [node], [count])

    def names(self, node: int, handle: int = 1) -> list[bytes]:
        return [name for _, _, _, name in self.listed(node, handle)]

    def listed(self, node: int, handle: int = 1) -> list[tuple[int, int, int, bytes]]:
        """(ino, off, type, name) of a whole directory, piece by piece."""
        found: list[tuple[int, int, int, bytes]] = []
        while True:
            outcome = self.tree.perform(self.call(List, node, handle, found[-1][1] if found else 0))
            listing: Any = outcome.value
            found += records(outcome.payload[: listing.dirents])
            if listing.end:
                return found

    def restart(self) -> None:
        """Killed, and started again with what the journal says."""
        self.tree.close()
        restored = self.journal.restored()
        self.tree = Tree(str(self.path), recorder=self.journal, **self.options)
        self.tree.restore(restored)


def records(block: bytes) -> list[tuple[int, int, int, bytes]]:
    found, at = [], 0
    while at < len(block):
        ino, off, length, kind = DIRENT.unpack_from(block, at)
        at += DIRENT.size
        found.append((ino, off, kind, block[at : at + length]))
        at += length + -length % 8
    return found


def refused(action: Callable[[], object]) -> str:
    """The name of the errno with which ``action`` fails, ``"0"`` if it does not."""
    try:
        action()
    except OSError as error:
        return errno.errorcode[error.errno]
    return "0"


def open_descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


@contextmanager
def serving(path: Path, **options: Any) -> Iterator[Served]:
    """A share of ``path``. Modes are exact, as in the server's process; no descriptor may be left over."""
    before = open_descriptors()
    umask = os.umask(0)
    served = Served(path, **options)
    try:
        yield served
    finally:
        served.tree.close()
        os.umask(umask)
    assert open_descriptors() <= before


@contextmanager
def ordinary_user() -> Iterator[Path]:
    """Not being root in this process, and a directory of one's own."""
    directory = Path(tempfile.mkdtemp(prefix="ac-"))
    was_root = os.geteuid() == 0
    if was_root:
        os.chown(directory, NOBODY, NOBODY)
        os.setegid(NOBODY)
        os.seteuid(NOBODY)
    try:
        yield directory
    finally:
        if was_root:
            os.seteuid(0)
            os.setegid(0)
        shutil.rmtree(directory, onerror=_open_and_remove)


def _open_and_remove(function: Callable[[str], object], path: str, _: object) -> None:
    os.chmod(os.path.dirname(path), stat.S_IRWXU)
    function(path)
