"""Does the guest hold data of a file that is not the file's any more?

The guest keeps what it has read without asking again. So for each file the signature (size, mtime, ctime) of
what it was given is kept, and compared whenever it asks about the file; if it differs, the reply says
``stale`` and the guest drops what it has. The law: a change by somebody else is reported by the first reply to a
question that came after it. A false alarm costs one more read; it is never avoided at the price of that law:

- A signature is taken *before* the data is read.
- Time stamps have a granularity: of a tick on the usual disks, of a second on old ones, and of nobody knows what where
  they come from another machine or are remembered for a while (NFS, SMB, FUSE). So a signature taken so soon after
  the file's last change that it may stay the same over another one is in *doubt*, and the next comparison counts as
  different. How soon that is, ``devices`` says for each filesystem; of those it does not know it is always.
- A write of the guest's own is signed afterwards and always leaves a doubt: somebody else may have written
  between that and the look before it. Writes pass the doubt on, so a long stream of them causes one alarm.
- But if the file has been watched since before it was signed (``heard``: the epoch of the watches), the guest is told
  of whoever writes to it. Then there is nothing to doubt, and another ctime alone is no other data: what the guest has
  just made and renamed it need not read.

After an alarm the guest has nothing, and nothing is compared until it reads again. A read that was under way
meanwhile does no harm: its pages are locked in the guest, and dropping them waits for them.

An alarm has a price of its own. The guest drops the data before it passes the answer on, and its kernel then takes
nothing else from that answer, not even the size (fuse_reverse_inval_inode raises attr_version, and
fuse_change_attributes ignores what was asked for before): a mapping of what a host program has appended would
get SIGBUS. But where the size is another one than the guest's kernel has, that drops all data by itself; unless
the file has become shorter and a readahead that ended there has told the kernel so before (fuse_short_read), which
drops nothing: what was beyond would come back when the file grows. A size that is too large for a moment harms
nobody. So:

- ``told`` is the size that the guest's kernel has, as far as we told it or its own writes made it.
- A question whose answer brings a larger size raises no alarm; the next one does.
- What changes the file (a write, chmod, truncate) raises none either, it only passes on that there is one to be
  raised: it is no question, and the drop would come after its answer, into that of the next question.
"""

from __future__ import annotations

import stat
import time
from typing import Final

from fileserver.linux import Status
from fileserver.nodes import Node, Shared, move

UNSETTLED_NS: Final = 20_000_000
"""Two ticks of a kernel with HZ=100, the coarsest there is."""

COARSE_NS: Final = 2_000_000_000 + UNSETTLED_NS
"""The coarsest stamps that are local: two seconds, of which they are the beginning."""

NEVER_NS: Final = 1 << 100
"""Beyond every distance of two times."""

UNKNOWN: Final = -1
"""Of ``Node.told``: this process has not said, or its answer may have been lost."""


_DATA: Final = 3
"""Items of a signature that are about the data."""


def sign(status: Status) -> tuple[int, ...]:
    return (status.size, status.mtime, status.mtime_nsec, status.ctime, status.ctime_nsec)


def is_unsettled(status: Status, now_ns: int, unsettled_ns: int) -> bool:
    """Did the file change so lately that its time stamps may not show another change?

    Stamps without nanoseconds are taken for whole seconds, whatever the filesystem can do: ext4 with inodes of 128
    bytes has no room for more (ext2 and ext3 never have), and says so nowhere.
    """
    if not status.ctime_nsec and not status.mtime_nsec:
        unsettled_ns = max(unsettled_ns, COARSE_NS)
    return (
        abs(now_ns - status.ctime * 1_000_000_000 - status.ctime_nsec) < unsettled_ns
        or abs(now_ns - status.mtime * 1_000_000_000 - status.mtime_nsec) < unsettled_ns
    )


def giving(node: Node, status: Status, unsettled_ns: int, heard: int | None = None) -> None:
    """Data of the file as it was at ``status``, or later, is about to be given to the guest. ``heard``, here and below:
    the epoch in which the file is watched, and was before ``status`` was read (``Promises.heard``)."""
    if node.base is None:
        node.doubt = is_unsettled(status, time.time_ns(), unsettled_ns)
        node.heard = heard
        node.base = sign(status)


def _is_same(node: Node, status: Status, heard: int | None) -> bool:
    """Whether it is the data that was signed."""
    assert node.base is not None
    if heard is not None and node.heard == heard:
        return node.base[:_DATA] == sign(status)[:_DATA]
    return not node.doubt and node.base == sign(status)


def is_stale(node: Node, status: Status, heard: int | None = None) -> bool:
    """The guest asks about the file, which now is ``status``: must it drop its data?

    Says so to everybody who asks until ``acknowledged``: an answer that was worked out later may overtake the
    one that raised the alarm.
    """
    told, node.told = node.told, status.size
    if node.base is None or not stat.S_ISREG(status.mode):
        return False
    if node.shared != Shared.WITH_WRITERS and _is_same(node, status, heard):
        return False
    if told != UNKNOWN and status.size > told:
        suspect(node)
        return False
    return True


def is_given(node: Node, status: Status, heard: int | None = None) -> bool:
    """Whether ``status`` may be told beside an answer: it is of the data and the size that the guest has, and nothing
    would have to be said of an alarm, which only who asks about the file is told."""
    return node.told == status.size and (node.base is None or _is_same(node, status, heard))


def acknowledged(node: Node) -> None:
    """The answer that told of the alarm is on its way, before all others: the guest has nothing of the file now."""
    node.base = None
    node.doubt = False


def suspect(node: Node) -> None:
    """The guest may hold data that is not the file's: the next question is answered so."""
    node.base, node.doubt = (), True


def is_suspect(node: Node) -> bool:
    """Is there an alarm yet to be raised?"""
    return node.kind == stat.S_IFREG and node.base is not None and not node.base


def touched(node: Node, before: Status, after: Status, heard: int | None = None) -> None:
    """The guest has changed the file. Under the node's lock, so that nobody else of the guest's has in between."""
    move(node)
    if node.base is None:
        return
    is_heard = heard is not None and node.heard == heard
    if node.base != sign(before) and not (is_heard and _is_same(node, before, heard)):
        suspect(node)
    else:
        if not is_heard:
            node.heard = None
        node.base = sign(after)
        node.doubt = True


def written(node: Node, before: Status, after: Status, end: int, heard: int | None = None) -> None:
    """The guest has written up to ``end``, by its own count: its kernel's size of the file is at least that."""
    node.told = max(node.told, end) if node.told != UNKNOWN else UNKNOWN
    if node.base is None:
        # What it wrote it holds.
        node.base = sign(before)
        node.heard = heard
    touched(node, before, after, heard)
