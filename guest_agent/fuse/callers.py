"""The threads that wait for an answer: whether one is about to be killed, and whether it has taken its answer.

FUSE tells a server that the caller of a request has had *a* signal (INTERRUPT), and not which: it may be one that
a handler takes, or the stop and the continuation of a job. It tells so once for each request; after that the
thread sleeps on, and a SIGKILL that comes later is not heard of at all (fs/fuse/dev.c, request_wait_answer). So
whether anybody is to die is read from /proc, and again while the request waits.

Format: proc_pid_status(5), from whose masks signals are read as bit number - 1. Reading it takes no lock that a
thread in the middle of a request may hold (unlike cmdline or maps: mmap_lock).

An answer is taken by the thread itself, in the kernel, when it gets a processor; on a busy machine that takes many
milliseconds. /proc/TID/schedstat (proc(5); its third number, since Linux 2.6.9) counts how often it got one.
"""

from __future__ import annotations

import os
import re
import signal
from typing import Final


def _mask(*signals: signal.Signals) -> int:
    return sum(1 << number - 1 for number in signals)


_KILL: Final = _mask(signal.SIGKILL)
"""In the mask of a thread when anything but those below is going to end its process, whoever it was sent to: the
kernel turns it into a SIGKILL for each thread (kernel/signal.c, complete_signal)."""

_DUMPS_CORE: Final = _mask(
    signal.SIGQUIT,
    signal.SIGILL,
    signal.SIGTRAP,
    signal.SIGABRT,
    signal.SIGBUS,
    signal.SIGFPE,
    signal.SIGSEGV,
    signal.SIGXCPU,
    signal.SIGXFSZ,
    signal.SIGSYS,
)
"""These stay what they are until a thread takes them; they end it unless it does something about them."""

_MASKS: Final = re.compile(
    rb"SigPnd:\t(\w+)\nShdPnd:\t(\w+)\nSigBlk:\t(\w+)\nSigIgn:\t(\w+)\nSigCgt:\t(\w+)\n", re.ASCII
)


def dies_by(status: bytes) -> bool:
    """Whether a thread with this /proc/TID/status has a signal that ends it as soon as its request is answered."""
    if (masks := _MASKS.search(status)) is None:
        return False
    own, shared, blocked, ignored, caught = (int(mask, 16) for mask in masks.groups())
    pending = own | shared
    return bool(pending & _KILL or pending & _DUMPS_CORE & ~(blocked | ignored | caught))


def is_dying(thread: int) -> bool:
    """Whether nobody needs the answer to a request of ``thread`` any more: it is to be killed, or is gone.

    0, a thread of another pid namespace than the mount's, is never said to: nobody knows.
    """
    if not thread:
        return False
    try:
        with open(f"/proc/{thread}/status", "rb") as file:
            return dies_by(file.read())
    except (FileNotFoundError, ProcessLookupError):
        return not _exists(thread)
    except PermissionError:
        return False


def _exists(thread: int) -> bool:
    """Also where /proc hides the processes of others (hidepid, proc(5)), and one's own that may not be traced."""
    try:
        os.kill(thread, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def times_run(thread: int) -> int | None:
    """How often ``thread`` has been given a processor. One that slept when this was asked, and that was woken, goes on
    once it is another number. None: nobody knows, or it is gone."""
    if not thread:
        return None
    try:
        with open(f"/proc/{thread}/schedstat", "rb") as file:
            return int(file.read().split()[2])
    except (OSError, IndexError):
        return None
