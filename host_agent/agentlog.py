"""The files that a running instance writes for as long as it runs, each with a bound.

The law: a log takes at most its limit, and as much for the predecessor that is kept as NAME.1. Nobody who
writes is left with a file that has no name any more: what this process and its children say on stdout and
stderr is in the same file as what it logs, before a rotation and after it.
"""

from __future__ import annotations

import logging
import os
import sys
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path

import trio

from host_agent.files import write_atomically

logger = logging.getLogger(__name__)

#: Bytes of a log before it is begun anew. A start writes 3 KB.
MAX_LOG = 4 << 20

FORMAT = "%(asctime)s %(name)s %(levelname)s %(message)s"


class _SharedLog(RotatingFileHandler):
    """A log that takes stdout and stderr along wherever it goes.

    Tracebacks of a dying interpreter and output of children do not come through ``logging``. They count
    towards the limit, which is looked at whenever something is logged.
    """

    def _open(self) -> TextIOWrapper:
        stream = super()._open()
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor in (1, 2):
            os.dup2(stream.fileno(), descriptor)
        return stream


def log_to(path: Path, limit: int = MAX_LOG) -> None:
    """Log to ``path``, at most ``limit`` bytes and as many in ``path``.1, and send stdout and stderr there, too.

    Raises ``OSError`` when the file cannot be opened.
    """
    handler = _SharedLog(path, maxBytes=limit, backupCount=1, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter(FORMAT))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


async def keep_bounded(path: Path, limit: int = MAX_LOG, interval: float = 5.0) -> None:
    """Look at ``path`` every ``interval`` seconds, for ever, and begin it anew when it is over ``limit`` bytes.

    For a file that another process holds open for appending: it goes on at the start. What such a process
    writes in one interval is how far the file may be over its limit. A file that is not there, a full disk
    or any other ``OSError`` is met by trying again.
    """
    said = ""
    while True:
        await trio.sleep(interval)
        try:
            await trio.to_thread.run_sync(_cut, path, limit)
        except FileNotFoundError:
            continue  # nobody has begun to write it
        except OSError as error:
            # Once, not every few seconds: this log has a bound as well.
            if str(error) != said:
                said = str(error)
                logger.warning("cannot keep %s small: %s", path.name, said)


def _cut(path: Path, limit: int) -> None:
    """If ``path`` is over ``limit`` bytes, keep that many of its end as ``path``.1, and empty it.

    It is emptied even if its end cannot be kept: a full disk is when it matters. What is written between the
    two is lost. ``path`` is opened once, so a file that takes its name meanwhile is not the one that is emptied.
    """
    with path.open("rb+", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        if size <= limit:
            return
        try:
            write_atomically(path.with_name(f"{path.name}.1"), os.pread(file.fileno(), limit, size - limit))
        finally:
            file.truncate(0)
