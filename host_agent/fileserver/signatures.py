"""Does the guest hold data of a file that is not the file's any more?

The guest keeps what it has read without asking again. So for each file the signature (size, mtime, ctime) of
what it was given is kept, and compared whenever it asks about the file; if it differs, the reply says
``stale`` and the guest drops what it has. The law: a change by somebody else is reported by the first reply to a
question that came after it. A false alarm costs one more read; it is never avoided at the price of that law:

- A signature is taken *before* the data is read.
- Time stamps have the granularity of a tick, so one taken within ``UNSETTLED_NS`` of the file's last change may
  stay the same over another change: it is in *doubt*, and the next comparison counts as different.
- A write of the guest's own is signed afterwards and always leaves a doubt: somebody else may have written
  between that and the look before it. Writes pass the doubt on, so a long stream of them causes one alarm.

After an alarm the guest has nothing, and nothing is compared until it reads again. A read that was under way
meanwhile does no harm: its pages are locked in the guest, and dropping them waits for them.
"""

from __future__ import annotations

import stat
import time
from typing import Final

from host_agent.fileserver.linux import Status
from host_agent.fileserver.nodes import Node

UNSETTLED_NS: Final = 20_000_000
"""Two ticks of a kernel with HZ=100, the coarsest there is."""


def sign(status: Status) -> tuple[int, ...]:
    return (status.size, status.mtime, status.mtime_nsec, status.ctime, status.ctime_nsec)


def is_unsettled(status: Status, now_ns: int) -> bool:
    """Did the file change so lately that its time stamps may not show another change?"""
    return (
        abs(now_ns - status.ctime * 1_000_000_000 - status.ctime_nsec) < UNSETTLED_NS
        or abs(now_ns - status.mtime * 1_000_000_000 - status.mtime_nsec) < UNSETTLED_NS
    )


def giving(node: Node, status: Status) -> None:
    """Data of the file as it was at ``status``, or later, is about to be given to the guest."""
    if node.base is None:
        node.doubt = is_unsettled(status, time.time_ns())
        node.base = sign(status)


def is_stale(node: Node, status: Status) -> bool:
    """The guest asks about the file, which now is ``status``: must it drop its data? Says so once."""
    if node.base is None or not stat.S_ISREG(status.mode):
        return False
    if not node.doubt and node.base == sign(status):
        return False
    node.base = None
    node.doubt = False
    return True


def written(node: Node, before: Status, after: Status) -> bool:
    """The guest has written: did anybody else, before that? Under the node's lock."""
    base = node.base
    node.base = sign(after)
    node.doubt = True
    return base is not None and base != sign(before)


def touched(node: Node, before: Status, after: Status) -> bool:
    """The guest has changed attributes, and so the file's ctime, but not its data. Under the node's lock."""
    if is_stale(node, before):
        return True
    if node.base is not None:
        node.base = sign(after)
        node.doubt = True
    return False
