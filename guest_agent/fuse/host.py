"""Asks the host, across sessions that come and go.

The laws:
- What is asked is asked again in the next session, as it was (``unique`` and all) and in its order, until
  it is answered: the host does nothing twice for one ``unique``.
- While the host is away, callers wait, for ``PATIENCE`` in all; then all that wait get EIO, and so does at
  once whoever asks until it is back. ``lasting`` calls (a forgotten node, a released lock) are kept for it
  even then, though nobody waits.
- Never more than ``MAX_CALLS`` calls and about ``MAX_FLYING`` bytes are on their way, of which no share gets so
  much that nothing is left for another; the rest queues here (``turns``).
- A signal (INTERRUPT) that kills nobody changes nothing: a read that fails for one breaks programs. A caller that
  is to be killed is let go, with EINTR: at once while the host is away, and within ``LOOK_AGAIN`` of a host that
  is there and does not answer. What was never sent is then never asked. What was, and changes nothing, is asked
  on: its answer may say what this side must know (a lookup that counts, data that is stale). What may have been
  done already goes on waiting for its outcome.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Collection, Generator, Sequence
from itertools import chain
from typing import Any, Final, Generic, Protocol, TypeVar

import msgpack
import trio

from guest_agent.fence import Unfenced
from guest_agent.fuse.callers import is_dying
from guest_agent.fuse.distance import Distance
from guest_agent.fuse.operation import Resume, Wait, spawn
from guest_agent.fuse.turns import Gate, Turns
from guest_agent.spool import Left
from protocol import codec
from protocol.bulk import INLINE_BELOW, Loan, Run
from protocol.errors import DecodeError, LinkError
from protocol.files import CALLS, FileCall
from protocol.link import OnResult
from protocol.messages import Result
from protocol.session import MAX_CALLS

log = logging.getLogger(__name__)

ResultT = TypeVar("ResultT")

PATIENCE: Final = 30.0
"""Seconds that callers wait for an absent host: longer than any restart of its side (a keeper's backing off
included), shorter than the 120 s at which the kernel's watchdog takes a waiting process for hung."""

MAX_FLYING: Final = 64 << 20
"""Bytes of payloads sent and not answered: a quarter of what the link may hold back, and a second of what
virtio-serial moves. One share alone gets half."""

LOOK_AGAIN: Final = 0.25
"""Seconds between two looks at whether callers that have had a signal are to be killed: the kernel tells of the
first signal only. Nothing is looked at while nobody has had one."""

MAX_GATHERED: Final = 8 << 10
"""Bytes that wait for the host's next answer: half of what leaves at once (``protocol.outlet.PROMPT_SIZE``)."""

LetGo = Callable[[], None]
"""Answers a request that nobody is going to wait for."""


class Caller(Protocol):
    """Of ``protocol.link.Link``, what is needed here."""

    @property
    def backlog(self) -> int: ...

    def call(
        self, call: FileCall[Any], payload: bytes | Run, on_result: OnResult, *, gather: bool = False
    ) -> None: ...


class Ask(Generic[ResultT]):
    """A call, from being asked to being answered: a ``Wait``. Awaited it is the result; raises ``OSError``."""

    __slots__ = (
        "_host",
        "_resume",
        "after",
        "answered",
        "answers_ahead",
        "call",
        "caller",
        "gathered",
        "lasting",
        "lent",
        "let_go",
        "may_lend",
        "payload",
        "received",
        "sent",
        "share",
        "size",
        "ticket",
        "unheard",
    )

    def __init__(self, host: Host, call: FileCall[ResultT], payload: bytes | Run, lasting: bool) -> None:
        said: Any = call  # every call has ``share`` and ``unique``, and mypy has no word for it
        self.call = said
        self.share: int = said.share
        self.payload = payload
        self.size = len(payload)
        self.caller = host.caller
        self.lasting = lasting
        self.sent = False
        """In any session: it may have been done."""
        self.let_go: LetGo | None = None
        """Of a caller that has had a signal."""
        self.unheard = False
        """The caller was let go: the request has had its answer, and the kernel will not take another."""
        self.received = b""
        """The result's payload, unless it is ``lent``..."""
        self.lent: Loan | None = None
        """...of a call that ``may_lend``: to be released by who asked."""
        self.may_lend = False
        self.after: Callable[[], None] | None = None
        """Called once it is on its way: what is asked for then goes behind it."""
        self.answered = False
        """The request has had its answer already: this comes to its end only with the host's."""
        self.answers_ahead = self.gathered = False
        """It is to be answered before that; and leaves with what comes next, or with the host's next answer."""
        self.ticket = 0
        """For the fence, of one that is ``answered``."""
        self._host = host
        self._resume: Resume | None = None

    def __await__(self) -> Generator[Wait, Any, ResultT]:
        outcome = yield self
        if outcome.__class__ is int:
            raise OSError(outcome, "")
        if outcome.errno:
            _release(outcome)
            raise OSError(outcome.errno, "")
        try:
            result: ResultT = codec.decode(self.call.RESULT, outcome.value)
        except DecodeError:
            _release(outcome)
            raise
        if outcome.loan is None:
            self.received = outcome.payload
        elif self.may_lend:
            self.lent = outcome.loan
        else:
            self.received = bytes(outcome.payload)
            outcome.loan.release()
        return result

    def begin(self, resume: Resume) -> None:
        self._resume = resume
        self._host.enter(self)
        if self.after is not None:
            self.after()

    def on_result(self, result: Result | LinkError) -> None:
        if isinstance(result, Result):
            if self._host.answered(self):
                self.finish(result)
            else:  # the session is over, and it is asked again already
                _release(result)
        # Else the session is over, and the host asks again.

    def finish(self, outcome: Result | LinkError | int) -> None:
        """Tell who waits, if anybody still does. An int is an errno of our own."""
        if (resume := self._resume) is not None:
            self._resume = None
            resume(outcome)
        elif isinstance(outcome, Result):
            _release(outcome)

    @property
    def waiting(self) -> bool:
        """Somebody waits for it."""
        return self._resume is not None

    @property
    def may_be_answered(self) -> bool:
        """It was sent, and all that was sent is with the transport: so it arrives even if this process ends now. Or it
        leaves with the host's next answer, and a successor knows of it."""
        return self.sent and (self.gathered or self._host.has_sent_all)

    @property
    def may_end_early(self) -> bool:
        return not (self.sent and self.call.CHANGES)


def _release(result: Result) -> None:
    if result.loan is not None:
        result.loan.release()


class Host:
    """The host of all shares, whether it is there or not."""

    def __init__(
        self,
        is_dying: Callable[[int], bool] = is_dying,
        distance: Distance | None = None,
        fence: Unfenced | None = None,
    ) -> None:
        """``is_dying``: whether a thread, by its TID, is to be killed. ``distance``: to be measured, of a host that may
        be far away."""
        self.fence = fence or Unfenced()
        """Is told of each write that is answered ahead."""
        self._distance = distance
        self.caller = 0
        """The thread whose request is being begun: it is the caller of all that is asked meanwhile. 0: none. (So
        no request pays for a table of callers, which seldom anybody looks up.)"""
        self.read_ahead = 0
        """Bytes that are read ahead of the kernel, of all shares (``readahead``)."""
        self._ahead = 0
        """Calls that are answered, and not landed."""
        self.answers_ahead = True
        """False: nothing more is answered before the host has it."""
        self._is_dying = is_dying
        self._link: Caller | None = None
        self._patient = True
        self._sent: dict[Ask[Any], None] = {}  # an ordered set
        self._turns: Turns[Ask[Any]] = Turns(MAX_CALLS, MAX_FLYING)
        self._signalled: dict[Ask[Any], None] = {}
        self._came, self._left, self._signal = trio.Event(), trio.Event(), trio.Event()

    # --- asking --------------------------------------------------------------------------------------

    def ask(
        self, call: FileCall[ResultT], payload: bytes | Run = b"", *, lasting: bool = False
    ) -> Ask[ResultT]:
        """To be awaited by an operation. ``payload`` must not change; a run is the operation's to give back."""
        return Ask(self, call, payload, lasting)

    def tell(self, call: FileCall[Any]) -> None:
        """Ask with nobody waiting for the answer; it reaches the host however long that takes."""
        self.enter(Ask(self, call, b"", True))

    def enter(self, ask: Ask[Any]) -> None:
        """(For ``Ask``.) Send it as soon as there is a session, room, and nothing before it."""
        if self._link is not None and self._turns.begin(ask):
            self._send(ask)
        elif self._patient or ask.lasting:
            self._turns.wait(ask)
            if not self._patient:
                ask.finish(errno.EIO)
        else:
            ask.finish(errno.EIO)

    def answer_for(self, ask: Ask[Any]) -> bool:
        """Whether its request may be answered before the host has done it. Then it is, and ``landed`` follows."""
        if not self.answers_ahead:
            return False
        call = ask.call
        said = msgpack.packb((call.OP, codec.encode(call)))
        payload = ask.payload if isinstance(ask.payload, bytes) else ask.payload.content
        ask.ticket = self.fence.begin(said, payload)
        ask.answered = ask.ticket > 0
        self._ahead += ask.answered
        return ask.answered

    @property
    def is_ahead(self) -> bool:
        """Whether the host is there, and something was answered that it has not."""
        return self._ahead > 0 and self._link is not None

    def landed(self, ask: Ask[Any]) -> None:
        """The host has said what came of it."""
        self._ahead -= 1
        self.fence.end(ask.ticket)

    def ask_again_for(self, left: Sequence[Left], shares: Collection[int]) -> None:
        """What a predecessor has answered for and the host may not have, of the shares whose mounts are there yet."""
        for record in left:
            spawn(self._ask_again(record, shares))

    async def _ask_again(self, record: Left, shares: Collection[int]) -> None:
        try:
            op, arguments = msgpack.unpackb(record.call)
            ask = Ask(self, codec.decode(CALLS[op], arguments), record.payload, lasting=True)
            if ask.share not in shares:
                raise OSError(errno.ENODEV, "")
            ask.answered = True
            await ask
        except (OSError, DecodeError, ValueError, KeyError) as error:
            log.warning("write.lost ticket=%d error=%s", record.ticket, error)
        finally:
            self.fence.end(record.ticket)

    def answered(self, ask: Ask[Any]) -> bool:
        """(For ``Ask``.) Whether it was waiting for that, in this session."""
        if ask not in self._sent:
            return False
        del self._sent[ask]
        if self._distance is not None:
            self._distance.answered(ask)
        self._turns.end(ask)
        if self._turns.waiting:
            self._pump()
        return True

    @property
    def has_sent_all(self) -> bool:
        """Whether nothing that was asked in this session waits to be written."""
        return self._link is not None and not self._link.backlog

    @property
    def is_far(self) -> bool:
        """See ``Distance``; a VM's host never is."""
        return self._distance is not None and self._distance.is_far

    @property
    def may_be_far(self) -> bool:
        return self._distance is not None

    def scaled(self, count: int, most: int) -> int:
        """How much is to be asked ahead, where that is ``count`` of a host that is near."""
        return count if self._distance is None else self._distance.scaled(count, most)

    def gate(self, share: int) -> Gate:
        """Closed while so much of ``share`` waits that no more should be taken from the kernel."""
        return self._turns.gate(share)

    @property
    def shares(self) -> set[int]:
        """Of which something waits to be asked, in this session or the next."""
        return {ask.share for ask in chain(self._sent, self._turns)}

    # --- callers that die ----------------------------------------------------------------------------

    def interrupt(self, share: int, unique: int, let_go: LetGo) -> None:
        """Whoever waits for the calls of request ``unique`` has had a signal. ``let_go`` answers it with EINTR."""
        for ask in chain(self._sent, self._turns):
            if ask.share == share and ask.call.unique | 1 == unique | 1:
                ask.let_go = let_go
                self._signalled[ask] = None
        if self._signalled:
            self._signal.set()
            if self._link is None:
                self.let_the_dying_go()

    async def watch_the_signalled(self) -> None:
        """Look after callers that have had a signal; until cancelled."""
        while True:
            await self._signal.wait()
            self._signal = trio.Event()
            while self._signalled:
                await trio.sleep(LOOK_AGAIN)
                self.let_the_dying_go()

    def let_the_dying_go(self) -> None:
        """Whoever has had a signal and is to be killed waits no more, if possible."""
        for ask in list(self._signalled):
            if not (ask.waiting and ask.may_end_early):
                del self._signalled[ask]
            elif self._is_dying(ask.caller):
                del self._signalled[ask]
                self._let_go(ask)

    def _let_go(self, ask: Ask[Any]) -> None:
        if not ask.sent:
            if not ask.lasting:
                self._turns.remove(ask)
            ask.finish(errno.EINTR)
        elif ask.let_go is not None:
            ask.unheard = True
            ask.let_go()

    # --- sessions ------------------------------------------------------------------------------------

    def attach(self, link: Caller) -> None:
        """The host is there, over ``link``, and serves; nothing if it was already."""
        if self._link is link:
            return
        if self._link is not None:
            self._lose()
        self._link = link
        if self._distance is not None:
            self._distance.begin()
        self._patient = True
        self._left = trio.Event()
        self._came.set()
        self._pump()

    def detach(self, link: Caller) -> None:
        """The session over ``link`` has ended."""
        if self._link is link:
            self._lose()

    async def keep_patience(self) -> None:
        """Fail what waits when the host has been away for too long; until cancelled."""
        while True:
            with trio.move_on_after(PATIENCE) as waiting:
                await self._came.wait()
            if waiting.cancelled_caught:
                log.warning("host.absent seconds=%g waiting=%d", PATIENCE, self._turns.waiting)
                self.give_up()
                await self._came.wait()
            await self._left.wait()

    def give_up(self) -> None:
        """Fail everything that waits, and from now on everything at once, until the host is back."""
        if self._link is not None:
            return
        self._patient = False
        for ask in self._turns.clear(keep=lambda ask: ask.lasting):
            if not ask.answered:
                ask.finish(errno.EIO)

    def _lose(self) -> None:
        self._link = None
        self._turns.end_all(self._sent)
        self._sent.clear()
        self._came = trio.Event()
        self._left.set()

    # --- sending -------------------------------------------------------------------------------------

    def _pump(self) -> None:
        while self._link is not None and (ask := self._turns.next()) is not None:
            self._send(ask)

    def _may_gather(self, ask: Ask[Any]) -> bool:
        """Whether a small one may wait until the host has answered one that was sent before: who writes line by line
        is heard of in as many messages as there are answers."""
        assert self._link is not None
        return (
            self._ahead > 0
            and self.fence.spooled
            and ask.size < INLINE_BELOW
            and self._link.backlog + ask.size < MAX_GATHERED
        )

    def _send(self, ask: Ask[Any]) -> None:
        assert self._link is not None
        self._sent[ask] = None
        if self._distance is not None:
            self._distance.sent(ask)
        ask.gathered = ask.answers_ahead and not ask.sent and self._may_gather(ask)
        try:
            self._link.call(ask.call, ask.payload, ask.on_result, gather=ask.gathered)
        except LinkError:
            self._lose()
        except Exception:
            # Not one that a frame can say: a bug, and its caller's loss alone.
            log.exception("host.call call=%.200r", ask.call)
            self.answered(ask)
            ask.finish(errno.EIO)
        else:
            ask.sent = True
