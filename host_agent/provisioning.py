"""The user's scripts, run in the guest at each boot once Docker is there.

The law: each runs to its end once a boot, in order. One that was cut off (an agent was killed) is begun again, which is
why they must stand being run twice; one that has ended is not, by whichever host agent. What fails is said, and neither
the next script nor the instance waits for it to be mended.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from logging.handlers import RotatingFileHandler
from pathlib import Path

import trio

from host_agent import guest_process
from host_agent.agentlog import MAX_LOG
from host_agent.forwarders import Dial
from host_agent.guest_settings import MAX_SCRIPT, SYSTEM, Script
from host_agent.plain_text import PlainText
from protocol.api import Exec
from protocol.errors import AgentctlProtocolError

logger = logging.getLogger(__name__)

FOLDER = "/run/agentctl/provision"
"""In the guest; of one boot, as the root is. NAME is a script, NAME.status what it ended with."""

#: A script that names no interpreter.
INTERPRETER = b"#!/bin/bash\n"

#: dpkg would ask questions, of nobody.
SYSTEM_ENVIRONMENT = {"DEBIAN_FRONTEND": "noninteractive"}

#: How often a script is begun, at the most, if agents die under it.
ATTEMPTS = 3

#: Lines shown as they come: so many at once, and so many a second; the others are only in the log.
BURST = 30
RATE = 5.0

#: Characters of a line.
MAX_LINE = 1000

LOG_FORMAT = "%(asctime)s %(message)s"

HINT = "see: agentctl logs --component provision"

# Says what the script $1 has ended with in this boot; or keeps it as its standard input has it, for the user $2.
_INSTALL = f"""set -eu
mkdir -p -m 0755 {FOLDER} && cd {FOLDER}
if [ -e "$1.status" ]; then cat "$1.status"; exit; fi
umask 077
cat >"$1.new"
chown "$2" "$1.new"
chmod 0700 "$1.new"
mv "$1.new" "$1"
"""

_RECORD = f'echo "$2" >{FOLDER}/"$1.status"'

_LOST = (AgentctlProtocolError, trio.BrokenResourceError, trio.ClosedResourceError)

#: Tells of an event: its kind and a sentence.
Say = Callable[[str, str], None]


@dataclass(frozen=True, slots=True)
class _Job:
    """A script as it is run. ``key`` names it and its content in the guest."""

    title: str
    content: bytes
    key: str
    target: Exec
    owner: int

    @classmethod
    def of(cls, number: int, script: Script) -> _Job:
        """Raises ``OSError``, ``ValueError`` for a file that cannot be used."""
        content = _content(script)
        if not content.startswith(b"#!"):
            content = INTERPRETER + content
        as_root = script.mode == SYSTEM
        digest = hashlib.sha256(content + script.mode.encode()).hexdigest()
        key = f"{number}-{digest[:16]}"
        target = Exec(
            argv=[f"{FOLDER}/{key}"],
            env=SYSTEM_ENVIRONMENT if as_root else {},
            user="root" if as_root else "",
        )
        return cls(title_of(number, script), content, key, target, 0 if as_root else os.geteuid())


def title_of(number: int, script: Script) -> str:
    name = script.name or os.path.basename(script.file)
    return f"provision script {number}" + (f" ({name})" if name else "")


def _content(script: Script) -> bytes:
    if not script.file:
        return script.script.encode()
    path = Path(script.file).expanduser()
    with path.open("rb") as file:
        content = file.read(MAX_SCRIPT + 1)
    if len(content) > MAX_SCRIPT:
        raise ValueError(f"it is longer than {MAX_SCRIPT} bytes")
    return content


class Provisioning:
    """Runs ``scripts``; all they say is in ``log``, what of it can be followed in events."""

    def __init__(self, scripts: Sequence[Script], dial: Dial, say: Say, log: Path) -> None:
        self._scripts = scripts
        self._dial = dial
        self._say = say
        self._log = log

    async def run(self) -> list[str]:
        """Run those that have not run in this boot; what failed, in sentences."""
        problems = []
        for number, script in enumerate(self._scripts, 1):
            if problem := await self._one(number, script):
                self._say("provision-failed", problem)
                problems.append(f"{problem} ({HINT})")
        return problems

    async def _one(self, number: int, script: Script) -> str:
        """What is wrong with it, or ""."""
        try:
            job = await trio.to_thread.run_sync(_Job.of, number, script)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            return f"{title_of(number, script)} was not run: {script.file}: {reason}"
        for attempt in range(ATTEMPTS):
            try:
                status = await self._to_its_end(job)
            except _LOST as error:
                logger.warning("%s was cut off, attempt %d: %s", job.title, attempt + 1, error)
            else:
                return f"{job.title} failed with exit status {status}" if status else ""
        return f"{job.title} was cut off {ATTEMPTS} times"

    async def _to_its_end(self, job: _Job) -> int:
        """Its exit status, also if it ended earlier in this boot."""
        if (status := await self._install(job)) is not None:
            return status
        self._say("provision-started", f"running {job.title}")
        with closing(_Transcript(job.title, self._log, self._say)) as transcript:
            status = await guest_process.run(self._dial, job.target, transcript.write)
            transcript.end(status)
        await self._as_root(_RECORD, job.key, str(status))
        return status

    async def _install(self, job: _Job) -> int | None:
        """Bring it to the guest; its exit status if it has ended there already."""
        answer = await self._as_root(_INSTALL, job.key, str(job.owner), stdin=job.content)
        return int(answer) if re.fullmatch(rb"-?[0-9]{1,10}\n", answer) else None

    async def _as_root(self, script: str, *arguments: str, stdin: bytes = b"") -> bytes:
        """What it wrote on its standard output. Raises ``AgentctlProtocolError`` if it failed, too."""
        output = bytearray()

        def keep(data: bytes, is_error: bool) -> None:
            output.extend(data[: MAX_LINE - len(output)])

        target = Exec(argv=["/bin/sh", "-c", script, "sh", *arguments], user="root")
        if status := await guest_process.run(self._dial, target, keep, stdin):
            said = output.decode(errors="replace").strip()
            raise AgentctlProtocolError(f"the guest does not take a script: {said or status}")
        return bytes(output)


class _Log(RotatingFileHandler):
    """Opened with the first line. A disk that is full costs lines, and neither a script nor an agent."""

    _complained = False

    def handleError(self, record: logging.LogRecord) -> None:
        if not self._complained:
            self._complained = True
            logger.warning("what a script says cannot be kept: %s", sys.exc_info()[1])


class _Transcript:
    """All that one script says, line by line."""

    def __init__(self, title: str, log: Path, say: Say) -> None:
        self._title = title
        self._say = say
        self._handler = _Log(
            log, maxBytes=MAX_LOG, backupCount=1, encoding="utf-8", errors="backslashreplace", delay=True
        )
        self._handler.setFormatter(logging.Formatter(LOG_FORMAT))
        self._outputs = (_Lines(self._line), _Lines(self._line))
        self._budget = LineBudget(trio.current_time)
        self._unshown = 0
        self._keep("begins")

    def write(self, data: bytes, is_error: bool) -> None:
        """Output of the script, in pieces of any size."""
        self._outputs[is_error].receive_data(data)

    def end(self, status: int) -> None:
        """It has ended by itself."""
        for output in self._outputs:
            output.receive_eof()
        if self._unshown:
            self._say("provision-output", f"{self._title}: {self._unshown} more lines, {HINT}")
        self._keep(f"ends with exit status {status}")

    def close(self) -> None:
        self._handler.close()

    def _line(self, line: str) -> None:
        self._keep(line)
        if self._budget.spend():
            self._say("provision-output", f"{self._title}: {line}")
        else:
            self._unshown += 1

    def _keep(self, line: str) -> None:
        message = f"{self._title}: {line}"
        self._handler.handle(logging.LogRecord("provision", logging.INFO, "", 0, message, None, None))


class _Lines:
    """Sans-IO: bytes in, lines of text out. A carriage return, with which progress is drawn, ends a line, too."""

    def __init__(self, on_line: Callable[[str], None]) -> None:
        self._on_line = on_line
        self._plain = PlainText()
        self._begun = ""

    def receive_data(self, data: bytes) -> None:
        text = self._begun + self._plain.receive_data(data.replace(b"\r", b"\n"))
        *lines, self._begun = text.split("\n")
        if len(self._begun) > MAX_LINE:
            lines.append(self._begun)
            self._begun = ""
        for line in lines:
            self._say(line)

    def receive_eof(self) -> None:
        self._say(self._begun)

    def _say(self, line: str) -> None:
        for start in range(0, len(line), MAX_LINE):
            if piece := line[start : start + MAX_LINE].rstrip():
                self._on_line(piece)


class LineBudget:
    """``BURST`` lines at once, and ``RATE`` a second: a token bucket."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._left, self._at = float(BURST), clock()

    def spend(self) -> bool:
        """Whether there is one more."""
        now = self._clock()
        self._left, self._at = min(BURST, self._left + (now - self._at) * RATE), now
        if self._left < 1:
            return False
        self._left -= 1
        return True
