"""What the file server must still know after it was killed, in an append-only file of msgpack entries.

The laws:
- No answer leaves before what it rests on was written: entries gather in memory, and one write(2) takes all
  of them just before a batch of answers is sent. An intent is written at once, before the disk is changed.
- It survives SIGKILL of this process: what write(2) took is the kernel's. It need not survive a power cut, which
  the guest does not survive either, so nothing is ever synced.
- It is about one run of the guest's kernel (``boot_id``): node numbers mean nothing to the next.
- A journal that cannot be written (a full disk) stops nobody. What it lacks is kept and written when there is
  room, up to ``MAX_UNWRITTEN``; beyond that the journal is given up for this run of the guest.

A signal may cut a large write short, so the last entry may be torn: reading stops there. Dead entries are
got rid of by reading the file again, on the side, and renaming what it adds up to over it.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import random
import threading
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Final

import msgpack

from fileserver.compaction import survivors
from fileserver.ledger import FORMAT, Answer, CallKey, Entry, Kind, Ledger

logger = logging.getLogger(__name__)

#: Bytes below which no journal is worth rewriting: 30,000 changing calls, 0.2 s to read.
COMPACT_ABOVE: Final = 8 << 20
#: A journal is rewritten when it is this many times what it was after the last time, so that each byte is
#: read and written 1/3 times more, on average, whatever the number of nodes.
COMPACT_RATIO: Final = 4
#: Bytes of entries that wait for room on the disk: 250,000 changing calls.
MAX_UNWRITTEN: Final = 64 << 20
#: Bytes per read, and entries per write, of a rewrite.
_CHUNK: Final = 1 << 20
_BATCH: Final = 4096


def _first_number() -> int:
    """Where a journal's numbers begin that may not be the guest's first: one before it was lost, or given up. What the
    guest still holds of that must be unknown (ESTALE), never another file. One in a billion is taken by chance."""
    return 1 + (random.getrandbits(30) << 32)


class Journal:
    """The open journal. Safe to use from all threads; ``flush`` before anything is answered."""

    def __init__(self, path: Path | None) -> None:
        """Open ``path``, or begin it. Without a path nothing is written, and no number is ever one of a predecessor's.

        ``restored`` is what it says, an empty ledger if it is new, damaged from the start, or of another format.
        """
        self._path = path
        self._writing = threading.Lock()  # the file, and what has not been written to it
        self._gathering = threading.Lock()  # the entries to come and the numbers
        self._entries: list[bytes] = []
        self._unwritten = b""
        self._size = self._base = 0  # bytes, now and after the last rewrite
        self._given_up = False
        self._complained = False
        self._lives = 0  # how often it was begun
        self.restored = Ledger() if path is None else read(path)
        self._last_node = max(1 if path is not None else _first_number(), self.restored.last_node)
        self._last_handle = self.restored.last_handle
        # What is read is written anew at once: that gets rid of a torn end as well.
        self._fd = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        self._start(self.restored)

    def close(self) -> None:
        """Write what is left, and close the file, which stays for the next server of this guest."""
        self.flush()
        with self._writing:
            os.close(self._fd)
            self._given_up = True

    def begin(self, boot_id: str) -> None:
        """Start over: for a guest that was booted anew, or the first one."""
        empty = Ledger()
        empty.boot_id = boot_id
        with self._writing, self._gathering:
            self._entries.clear()
            self._unwritten = b""
            self._lives += 1
            self.restored = empty
            self._last_node = self._last_handle = empty.last_node = empty.last_handle = _first_number()
            self._start(empty)

    def _start(self, ledger: Ledger) -> None:
        """Make the file say just this, and go on from there."""
        if self._path is None:
            self._given_up = True
            return
        try:
            self._replace(*_write_new(self._path, ledger))
            self._base, self._given_up = self._size, False
        except OSError as error:
            self._complain(error)
            self._give_up()

    def _replace(self, fd: int, size: int) -> None:
        os.close(self._fd)
        self._fd, self._size = fd, size

    # --- numbers -----------------------------------------------------------------------------------

    def next_node(self) -> int:
        """A node number that this guest has never had. It is safe once the node's entry is written."""
        with self._gathering:
            self._last_node += 1
            return self._last_node

    def next_handle(self) -> int:
        """The same, of a handle for locks."""
        with self._gathering:
            self._last_handle += 1
            return self._last_handle

    # --- entries -----------------------------------------------------------------------------------

    def add(self, *entry: Any) -> None:
        """Gather an entry: a ``Kind`` and its fields."""
        packed: bytes = msgpack.packb(entry)
        with self._gathering:
            self._entries.append(packed)

    def intent(self, key: CallKey, digest: int, precondition: bytes) -> None:
        """A call is about to change the disk. Written when this returns."""
        self._write(msgpack.packb((Kind.INTENT, *key, digest, precondition)))

    def outcome(self, key: CallKey, answer: Answer) -> None:
        """It has, or has failed to."""
        self.add(Kind.OUTCOME, *key, answer.digest, answer.errno, answer.value)

    def flush(self) -> None:
        """Write what was gathered, by one write(2)."""
        self._write(b"")

    def _write(self, last: bytes) -> None:
        """Write what was gathered, and an entry or nothing behind it."""
        with self._writing:
            with self._gathering:
                data = b"".join(self._entries) + last
                self._entries.clear()
            if self._unwritten:
                data = self._unwritten + data
            if data and not self._given_up:
                self._unwritten = self._append(data)
                if len(self._unwritten) > MAX_UNWRITTEN:
                    self._give_up()

    def _append(self, data: bytes) -> bytes:
        """Write all of ``data``, or nothing of it; returns what is still to be written."""
        try:
            taken = os.write(self._fd, data)
            while taken < len(data):
                # A signal cannot do this to a living process; a disk that is just full can. The rest says why.
                taken += os.write(self._fd, memoryview(data)[taken:])
        except OSError as error:
            self._complain(error)
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self._size)
            return data
        self._complained = False
        self._size += len(data)
        return b""

    def _complain(self, error: OSError) -> None:
        if not self._complained:  # once for each time it happens, not for each call
            self._complained = True
            logger.error("cannot write the journal %s, trying again with each answer: %s", self._path, error)

    def _give_up(self) -> None:
        """A journal with a hole in it must not be believed: empty it."""
        logger.error("the journal %s is given up until the guest is booted again", self._path)
        self._given_up = True
        self._unwritten = b""
        if self._path is not None:
            with contextlib.suppress(OSError):
                os.truncate(self._path, 0)

    # --- compaction --------------------------------------------------------------------------------

    @property
    def wants_compaction(self) -> bool:
        """Whether most of the file is dead."""
        return self._size > max(COMPACT_ABOVE, COMPACT_RATIO * self._base) and not self._given_up

    def compact(self) -> None:
        """Rewrite the file without what is dead. Takes a while, and others may go on adding meanwhile.

        Raises ``OSError``; the file is then as it was.
        """
        assert self._path is not None
        with self._writing:
            life, end = self._lives, self._size
            source = os.dup(self._fd)
        try:
            with self._gathering:
                numbers = self._last_node, self._last_handle
            with _made(self._path.with_name(f"{self._path.name}.compact")) as new:
                new.write_all(survivors(partial(_entries, source, end), *numbers))
                with self._writing:
                    if self._lives == life and not self._given_up:  # else it is about another guest now
                        self._take_over(source, end, new)
        finally:
            os.close(source)

    def _take_over(self, source: int, end: int, new: _NewFile) -> None:
        """Bring the new file up to date with what was added while it was made, and put it in place."""
        assert self._path is not None
        live = new.size
        new.write(os.pread(source, self._size - end, end))
        fd, size = new.rename(self._path)
        logger.info("the journal was rewritten: %d bytes, it was %d", size, self._size)
        self._replace(fd, size)
        self._base = live


class _NewFile:
    """A journal that does not have its name yet."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self.size = 0
        self.named = False

    def write(self, data: bytes) -> None:
        if os.write(self.fd, data) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.size += len(data)

    def write_all(self, entries: Iterator[Entry]) -> None:
        while chunk := b"".join(msgpack.packb(entry) for entry in islice(entries, _BATCH)):
            self.write(chunk)

    def rename(self, path: Path) -> tuple[int, int]:
        """Take the place of ``path``; its descriptor, which is the caller's from now on, and its size in bytes."""
        self._path.rename(path)
        self.named = True
        return self.fd, self.size

    def discard(self) -> None:
        os.close(self.fd)
        self._path.unlink(missing_ok=True)


@contextlib.contextmanager
def _made(path: Path) -> Iterator[_NewFile]:
    """A new file at ``path``, gone at the end unless it was renamed."""
    new = _NewFile(path)
    try:
        yield new
    finally:
        if not new.named:
            new.discard()


def _write_new(path: Path, ledger: Ledger) -> tuple[int, int]:
    """A fresh file with this state in place of ``path``; its descriptor and size. Raises ``OSError``."""
    with _made(path.with_name(f"{path.name}.new")) as new:
        new.write_all(ledger.entries())
        return new.rename(path)


def read(path: Path) -> Ledger:
    """What the journal ``path`` says, and an empty ledger if it says nothing that can be used. Raises ``OSError``."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return Ledger()
    try:
        return _replay(fd, os.fstat(fd).st_size)
    except ValueError as error:
        logger.warning("the journal %s is not used: %s", path, error)
        return Ledger()
    finally:
        os.close(fd)


def _replay(fd: int, end: int) -> Ledger:
    """What the first ``end`` bytes add up to; up to the first entry that is torn or damaged.

    Raises ``ValueError`` when it does not begin as a journal of this format does.
    """
    ledger = Ledger()
    entries = _entries(fd, end)
    first = next(entries, None)
    if first is None:
        return ledger
    if first[:2] != [Kind.BEGIN, FORMAT]:
        raise ValueError("it does not begin as a journal of this version does")
    try:
        ledger.apply(first)
        for entry in entries:
            ledger.apply(entry)
    except (TypeError, ValueError, IndexError) as error:
        logger.warning("the journal is damaged, and used up to there: %s", error)
    ledger.prune()
    return ledger


def _entries(fd: int, end: int) -> Iterator[Entry]:
    unpacker = msgpack.Unpacker(max_buffer_size=0, strict_map_key=False)
    position = 0
    while position < end and (data := os.pread(fd, min(_CHUNK, end - position), position)):
        position += len(data)
        unpacker.feed(data)
        try:
            for entry in unpacker:
                if type(entry) is not list:
                    raise ValueError(f"a {type(entry).__name__} instead of an entry")
                yield entry
        except (msgpack.exceptions.UnpackException, ValueError) as error:
            logger.warning("the journal is damaged, and used up to there: %s", error)
            return
