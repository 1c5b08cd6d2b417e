"""A process that runs ``workloads.py`` beside the mounts, and is asked for one sample at a time.

The law: whatever the mount does, an answer comes in time. A driver that is silent for too long (a hung mount
leaves it in D state) is given up with its processes and another one is started; the sample has an error.
"""

from __future__ import annotations

import dataclasses
import json
import os
import selectors
import subprocess
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from tests.bench import processes
from tests.bench.files.workloads import Request

#: A driver makes its archive before it is ready; an emulated Python takes seconds to start.
START_TIMEOUT = 120.0


class DriverLost(Exception):
    """No answer came; the message is a clause."""


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """What ``workloads.py`` says: seconds and a count, or an error."""

    seconds: float = 0.0
    count: int = 0
    error: str = ""


class Lines:
    """What is said to and heard from a process: JSON objects, one a line."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._buffer = b""

    def say(self, value: dict[str, Any]) -> None:
        """Raises ``BrokenPipeError``."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(value).encode() + b"\n")
        self._process.stdin.flush()

    def hear(self, timeout: float) -> dict[str, Any]:
        """Raises ``DriverLost`` if there is nothing within ``timeout`` seconds."""
        assert self._process.stdout is not None
        deadline = time.monotonic() + timeout
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise DriverLost(f"no answer within {timeout:.0f} s")
                data = os.read(self._process.stdout.fileno(), 65536)
                if not data:
                    raise DriverLost("the process beside the mounts ended")
                self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer = json.loads(line)
        if not isinstance(answer, dict):
            raise DriverLost(f"it said {line[:80]!r}")
        return answer


class Driver:
    """``start`` starts the process, its stdin and stdout pipes; it is called again when one was lost."""

    def __init__(self, start: Callable[[], subprocess.Popen[bytes]]) -> None:
        self._start = start
        self._process: subprocess.Popen[bytes] | None = None
        self.environment: dict[str, Any] = {}

    def __enter__(self) -> Driver:
        self._ensure()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def ask(self, request: Request, timeout: float) -> Answer:
        """One sample, an error if there is no answer within ``timeout`` seconds."""
        try:
            lines = self._ensure()
            lines.say(dataclasses.asdict(request))
            return Answer(**lines.hear(timeout))
        except (DriverLost, BrokenPipeError) as error:
            self._end()
            return Answer(error=str(error))

    def _ensure(self) -> Lines:
        if self._process is None:
            self._process = self._start()
            self._lines = Lines(self._process)
            self.environment = self._lines.hear(START_TIMEOUT)
        return self._lines

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            processes.end(process)
