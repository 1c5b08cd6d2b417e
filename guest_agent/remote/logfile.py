"""A daemon's stderr as a file that does not grow for ever: what is logged, and what Python says besides."""

from __future__ import annotations

import logging
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Final

MAX_LOG: Final = 1 << 20
"""Bytes after which the file is renamed, to be replaced the next time: so it is twice that at the most."""


class StderrLog(logging.StreamHandler):  # type: ignore[type-arg]
    """Logs to stderr, which is the file ``path``."""

    def __init__(self, path: Path) -> None:
        super().__init__(sys.stderr)
        self._path = path

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):  # a full disk ends nothing
            if os.fstat(2).st_size > MAX_LOG:
                self._begin_anew()
            super().emit(record)

    def _begin_anew(self) -> None:
        self._path.rename(self._path.with_name(self._path.name + ".1"))
        file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        for fd in (1, 2):
            os.dup2(file, fd)
        os.close(file)
