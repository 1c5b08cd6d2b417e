"""The guest's calls: taken from the link, done by the threads of their share or at once (``prompt``), answered in
batches.

The laws:
- Every call is answered once in the session it came in, with a result or an errno; what it says can be wrong,
  and never stops the server. An answer for a session that is over goes nowhere, but what was done is remembered.
- Before a batch of answers leaves, the journal has been written.
- A call with a large answer begins when there is room for that (``Admission``); the others go on meanwhile.
- What comes behind a write that the guest has answered for already finds it done (``Behind``).
- What is read goes straight into memory that the guest has mapped, where there is such (``protocol.bulk``), and what
  is written comes straight from it.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Final

from fileserver import prompt
from fileserver.admission import Admission, Room
from fileserver.behind import Behind, is_ahead
from fileserver.entries import MAX_ANSWER, Records
from fileserver.journal import Journal
from fileserver.ledger import Answer, CallKey, Ledger
from fileserver.names import MAX_LISTED_WITH_ATTRIBUTES
from fileserver.once import Glimpses, Once, Verdict, digest
from fileserver.promises import Many, Promise
from fileserver.shares import LOCK_CALLS, Share
from fileserver.snapshots import PIECE
from fileserver.tree import Outcome
from fileserver.workers import Completions, WouldWait
from protocol import codec, messages
from protocol.bulk import INLINE_BELOW, Bulk, Run
from protocol.errors import DecodeError, LocalProtocolError
from protocol.files import (
    ATTR,
    ATTRIBUTES,
    CALLS,
    EMPTY,
    MAX_DATA,
    NAME,
    Attributes,
    Entry,
    FileCall,
    Forget,
    List,
    ListEntries,
    Listing,
    Lookup,
    Read,
    ReadMany,
    Removed,
    Renamed,
    Write,
    Written,
)
from protocol.lane import Lane
from protocol.link import Link

logger = logging.getLogger(__name__)

#: Calls, and bytes of their payloads, that may wait for threads, over all sessions: a guest has 1,024 calls in each,
#: and a good one not more than 64 MiB of payloads. What a disk that hangs keeps waiting must not fill the memory.
MAX_WAITING: Final = 8192
MAX_WAITING_BYTES: Final = 256 << 20

_PROMISED: Final = {
    kind: ([field.name for field in fields(kind)].index("promise"), bits)
    for kind, bits in (
        (Entry, NAME | ATTRIBUTES | EMPTY),
        (Attributes, ATTRIBUTES),
        (Renamed, NAME | ATTRIBUTES),
        (Removed, NAME),
        (Listing, NAME),
    )
}
"""Where a result says what it promises, and what that can be."""

_ABOVE: Final = {
    kind: [field.name for field in fields(kind)].index("above") for kind in (Entry, Removed, Renamed)
}
"""Where a result says what the directory is like."""

_LOOKUPS: Final = (Lookup, ListEntries)
"""What counts lookups, though it changes nothing on the host."""

_SAME_WRITE: Final = [field.name for field in fields(Write)].index("ahead")
"""Arguments by which a write is known again: who asks for the second time need not have answered for it as well."""

_ROOM: Final = [field.name for field in fields(Written)].index("room")
"""Where a result says what is so for a moment only."""

_DONE: Final[list[Any]] = []
"""A result without fields, encoded."""


@dataclass(frozen=True, slots=True)
class Asker:
    """Where an answer goes."""

    link: Link
    number: int


@dataclass(slots=True)
class _Job:
    """A call on its way through a thread; the last five fields are what comes of it."""

    call: FileCall[Any]
    payload: bytes | memoryview
    share: Share
    asker: Asker
    room: Room | None = None  # what it waited for, if its answer may be large
    once: Once[Asker] | None = None  # where to tell, for a call that is done once
    key: CallKey = (0, 0)
    digest: int = 0
    begun: bytes | None = None  # the precondition, if a killed server may have done it
    counted: Sequence[int] = ()  # the nodes that an earlier answer to this lookup counted
    behind: Behind[_Job] | None = None  # where to tell, for a write that others wait for
    errno: int = 0
    value: object = None
    result: object = None
    content: bytes | bytearray | memoryview | Run = b""
    promise: Promise | None = None

    @property
    def answer(self) -> Answer:
        """What is remembered of it."""
        value: Any = self.value
        return Answer(self.digest, self.errno, value[:_ROOM] if type(self.result) is Written else value)

    @property
    def run(self) -> Run | None:
        """Where the answer goes, if in memory."""
        return None if self.room is None else self.room.run


class Calls:
    """Serves the calls of one guest after another. Belongs to trio's thread."""

    def __init__(
        self,
        journal: Journal,
        shares: Mapping[int, Share],
        bulk: Bulk | None = None,
        lane: Lane | None = None,
    ) -> None:
        """``bulk``: the memory of the link's payloads; ``lane``: where it is served."""
        self._journal = journal
        self._shares = shares
        self._once: Once[Asker] = Once()
        self._glimpses = Glimpses()
        self._completions: Completions[_Job] = Completions(self._deliver, lane)
        self._link: Link | None = None
        self._waiting = self._waiting_bytes = 0
        self._behind: dict[Share, Behind[_Job]] = {}
        self._going_on = False
        self._admission: Admission[_Job] = Admission(
            self._submit,
            lambda: 0 if self._link is None else self._link.backlog,
            bulk,
        )

    def close(self) -> None:
        """What the threads have yet to finish is not answered any more."""
        self._completions.close()

    def begin_guest(self, past: Ledger) -> None:
        """The guest's kernel is another one than before, or the first; ``past`` is what a killed server wrote of it."""
        self._once = Once(past)
        self._glimpses = Glimpses()

    def begin_session(self, link: Link) -> None:
        """Calls come from ``link`` now."""
        self._link = link
        link.on_written = self._admission.go_on

    def end_session(self) -> None:
        """Nobody waits any more for what has not begun; a changing call is never held back."""
        dropped = self._admission.drop()
        for behind in self._behind.values():
            dropped += behind.drop()
        for job in dropped:
            self._waiting -= 1
            self._waiting_bytes -= len(job.payload)
            _answer(job.asker, errno.EIO)  # which goes nowhere, but nothing of the call is kept
            if job.counted and self._shares.get(job.share.folder.id) is job.share:
                job.share.workers.submit(partial(_give_back, job.share, job.counted))

    def drop(self, share: int) -> None:
        """``share`` is not served any more. What waits there is done as it closes (``_close_behind``)."""
        self._once.drop(share)

    # --- taking ------------------------------------------------------------------------------------

    def take(self, call: messages.Call) -> None:
        """A call has come."""
        if self._link is None:  # nobody was told of any share yet, so whoever asks is not listening either
            if call.loan is not None:
                call.loan.release()
            return
        asker = Asker(self._link, call.id)
        kind = CALLS.get(call.op)
        if kind is None:
            _answer(asker, errno.ENOSYS)
            return
        try:
            message: Any = codec.decode(kind, call.args)
        except DecodeError as error:
            logger.warning("a call that is not as it should be: %s", error)
            _answer(asker, errno.EINVAL)
            return
        share = self._shares.get(message.share)
        if share is None:
            _answer(asker, errno.ENODEV)
            return
        share.calls += 1
        share.bytes_written += len(call.payload)
        self._start(_Job(message, call.payload, share, asker), call)

    def _start(self, job: _Job, frame: messages.Call) -> None:
        call: Any = job.call
        if call.CHANGES and call.unique and not self._ask(job, frame):
            return
        if self._waiting >= MAX_WAITING or self._waiting_bytes + len(job.payload) > MAX_WAITING_BYTES:
            if job.once is not None:
                job.once.dismiss(job.key)
            _answer(job.asker, errno.ENOMEM)
            return
        if type(call) in _LOOKUPS and call.unique:
            job.counted = self._glimpses.take(call)
        self._waiting += 1
        self._waiting_bytes += len(job.payload)
        if self._behind and (behind := self._behind.get(job.share)) is not None and behind.holds(call):
            behind.wait(call, job)
        else:
            self._begin(job)

    def _begin(self, job: _Job) -> None:
        """Its turn has come."""
        call = job.call
        if prompt.is_small(call, job.payload) and job.share.is_prompt:
            self._do_at_once(job)
        elif size := _size_of_answer(call):
            shareable = isinstance(call, Read | ReadMany) and size >= INLINE_BELOW
            self._admission.ask(job.share, size, job, shareable=shareable)
        else:
            self._submit(job)

    def _do_at_once(self, job: _Job) -> None:
        try:
            job.share.do_at_once(partial(self._try, job))
        except WouldWait:
            self._submit(job)
        else:
            self._deliver([job])

    def _submit(self, job: _Job, room: Room | None = None) -> None:
        job.room = room
        if room is not None and self._shares.get(job.share.folder.id) is not job.share:
            self._refuse(job)  # its threads may have ended while it was held back
        elif is_ahead(job.call):
            self._submit_ahead(job)
        else:
            job.share.workers.submit(lambda: self._work(job))

    def _refuse(self, job: _Job) -> None:
        job.errno = errno.ENODEV
        self._completions.put(job)

    def _submit_ahead(self, job: _Job) -> None:
        """All that comes waits for it from now on, but what may overtake."""
        share = job.share
        behind = self._behind.setdefault(share, Behind())
        share.on_close = partial(self._close_behind, share)
        batch = behind.begin(job.call, job)
        for each in batch.items:
            each.behind = behind
        share.workers.submit(partial(batch.run, self._work))

    def _close_behind(self, share: Share) -> None:
        """``share`` is about to close: what waits is done before that, unless it needs room for its answer."""
        if (behind := self._behind.pop(share, None)) is not None:
            batch, left_out = behind.close(lambda call: _size_of_answer(call) > 0)
            share.workers.submit(partial(batch.run, self._work))
            for job in left_out:
                self._refuse(job)

    def _go_on(self) -> None:
        """Begin what has waited for writes that are done now."""
        if self._going_on:  # one that waited was done at once, and the next one follows there
            return
        self._going_on = True
        try:
            for share, behind in list(self._behind.items()):
                while (job := behind.next()) is not None:
                    self._begin(job)
                if not behind:
                    del self._behind[share]
        finally:
            self._going_on = False

    def _ask(self, job: _Job, frame: messages.Call) -> bool:
        """Whether there is anything to do about a changing call."""
        call: Any = job.call
        said: Any = frame.args
        arguments = said[:_SAME_WRITE] if type(call) is Write else said
        key, content = (call.share, call.unique), digest(frame.op, arguments, frame.payload)
        verdict = self._once.ask(key, content, job.asker)
        if isinstance(verdict, Answer):
            _answer(job.asker, verdict.errno, verdict.value)
            return False
        if verdict is Verdict.DO:
            job.once, job.key, job.digest = self._once, key, content
            job.begun = self._once.begun(key, content)
        return verdict is not Verdict.WAIT

    # --- doing, in a thread of the share, or at once -----------------------------------------------

    def _work(self, job: _Job) -> None:
        try:
            if job.asker.link is self._link or job.call.CHANGES:
                self._try(job)
            elif job.counted:
                _give_back(job.share, job.counted)
        finally:
            self._completions.put(job)

    def _try(self, job: _Job) -> None:
        try:
            outcome = self._do(job)
            job.value = _DONE if outcome.value is None else codec.encode(outcome.value)
            job.result, job.content, job.promise = outcome.value, outcome.payload, outcome.promise
        except OSError as error:
            job.errno = error.errno or errno.EIO
        except WouldWait:
            raise
        except Exception:
            logger.exception("call.failed kind=%s", type(job.call).__name__)
            job.errno = errno.EIO
        if job.once is not None and type(job.call) is not Forget:
            self._journal.outcome(job.key, job.answer)

    def _do(self, job: _Job) -> Outcome:
        call = job.call
        if isinstance(call, LOCK_CALLS):
            return job.share.lock(call)
        tree = job.share.tree
        if job.begun is not None:
            return tree.perform_again(call, job.payload, job.begun)
        if type(call) is Forget:
            if job.once is not None:
                # Done before it is done: one lookup too many is kept for longer, one too few would lose a file.
                self._journal.outcome(job.key, Answer(job.digest, 0, _DONE))
            return tree.perform(call, b"")
        if job.counted:
            counted, job.counted = job.counted, ()
            _give_back(job.share, counted)
        if job.once is not None and (precondition := tree.precondition(call)):
            self._journal.intent(job.key, job.digest, precondition)
        return tree.perform(call, job.payload if job.run is None else job.run)

    # --- answering ---------------------------------------------------------------------------------

    def _deliver(self, jobs: list[_Job]) -> None:
        self._journal.flush()
        for job in jobs:
            self._waiting -= 1
            self._waiting_bytes -= len(job.payload)
            try:
                self._conclude(job)
            except Exception:
                logger.exception("call.unanswered kind=%s", type(job.call).__name__)
                if job.run is not None and job.run.slots:
                    job.run.give_back()
            if job.room is not None:
                self._admission.ended(job.room)
            if job.behind is not None:
                job.behind.ended(job.call)
        self._admission.go_on()
        if self._behind:
            self._go_on()

    def _conclude(self, job: _Job) -> None:
        job.share.noticed(job.call)
        askers = [job.asker]
        if job.once is not None:
            askers = job.once.done(job.key, job.answer)
        if job.promise is not None:
            _promise(job)
        if isinstance(job.call, _LOOKUPS) and job.result is not None:
            self._found(job, job.call)
        job.share.bytes_read += len(job.content)
        for asker in askers:
            _answer(asker, job.errno, job.value, job.content)
        if job.run is not None and job.run.slots:  # nothing came of it
            job.run.give_back()
        if isinstance(job.result, Entry | Attributes) and job.result.stale:
            asked: Any = job.result if isinstance(job.result, Entry) else job.call
            job.share.alarm_told(asked.node)

    def _found(self, job: _Job, call: Lookup | ListEntries) -> None:
        """Lookups were counted. If their session is over, it may have been asked again already."""
        found, in_vain = _counted(job)
        if job.asker.link is not self._link:
            in_vain += found
        elif found and call.unique:
            self._glimpses.remember(call, found)
        if in_vain and self._shares.get(call.share) is job.share:
            job.share.workers.submit(lambda: _give_back(job.share, in_vain))


def _counted(job: _Job) -> tuple[list[int], list[int]]:
    """The nodes of which the answer to a lookup has counted one, and those of which it has in vain."""
    if isinstance(job.promise, Records):
        return job.promise.sent, job.promise.taken_out
    return ([job.result.node] if isinstance(job.result, Entry) and job.result.node else []), []


def _promise(job: _Job) -> None:
    """Put into the answer what can be promised of it now. What is remembered for another time promises nothing."""
    assert job.promise is not None
    result: Any = job.result
    if isinstance(job.promise, Many):
        job.value = codec.encode(job.promise.settled(result, partial(job.share.promised, result)))
        return
    bits = job.share.promised(result, job.promise)
    if isinstance(job.promise, Records):
        assert isinstance(job.content, bytearray)
        job.promise.settle(job.content, partial(job.share.promised, result) if bits else None)
    if type(result) is Entry and not result.node and not bits:
        job.errno, job.value = errno.ENOENT, None
    elif bits:
        job.value = _promising(result, job.value, bits, job.promise.above)


def _promising(result: object, value: Any, bits: int, above: bytes) -> list[Any]:
    """``value`` is ``result`` encoded."""
    row = list(value)
    kind: Any = type(result)
    if kind in _PROMISED:
        at, possible = _PROMISED[kind]
        row[at] = bits & possible
    if bits & NAME and kind in _ABOVE:
        row[_ABOVE[kind]] = above
    return row


def _size_of_answer(call: FileCall[Any]) -> int:
    """Bytes that the answer may have, if they are too many for as many calls as a guest may have pending."""
    if isinstance(call, Read):
        return max(0, min(call.size, MAX_DATA))
    if isinstance(call, ReadMany):
        return max(0, min(call.most, MAX_DATA))
    if isinstance(call, List):
        return PIECE + MAX_LISTED_WITH_ATTRIBUTES * ATTR.size if call.attributes else PIECE
    if isinstance(call, ListEntries):
        return MAX_ANSWER
    return 0


def _give_back(share: Share, nodes: Sequence[int]) -> None:
    """The guest will not hear of lookups that were counted."""
    share.tree.perform(Forget(share.folder.id, 0, 0, list(nodes), [1] * len(nodes)), b"")


def _answer(
    asker: Asker, error: int, value: object = None, payload: bytes | bytearray | memoryview | Run = b""
) -> None:
    try:
        asker.link.answer(asker.number, error, value, payload)
    except LocalProtocolError:
        # Too long for a frame: a bug, but the guest's process must not wait for ever because of it.
        logger.exception("call.unsendable")
        asker.link.answer(asker.number, errno.EIO)
