"""Eyes on the mount: a ``looker.py`` beside it, and what this process asks of it.

The law is that of ``namespace``: nothing here follows a path into the mount, and an answer that does not come in time
ends with a killed process and a forced unmount, never with a hung test run.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.files import looker
from tests.files.looker import View
from tests.files.namespace import IN_DIRECTORY, Namespace, Stuck

PATIENCE = 60.0
"""Seconds for an answer."""


class Sight:
    """A process of its own in ``directory`` of the namespace, which takes one request after the other."""

    def __init__(self, namespace: Namespace, directory: Path) -> None:
        self._namespace = namespace
        command = [*IN_DIRECTORY, str(directory), sys.executable, "-B", str(Path(looker.__file__))]
        self._process = subprocess.Popen(
            namespace.command(command),
            cwd="/",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self._said = b""

    def __enter__(self) -> Sight:
        return self

    def __exit__(self, *exception: object) -> None:
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        try:
            process.wait(3)
        except subprocess.TimeoutExpired:
            self._namespace.force_unmount()
            process.wait(20)
        process.stdin.close()
        process.stdout.close()

    # --- one request -------------------------------------------------------------------------------

    def ask(self, *request: object) -> None:
        """Send it; ``answer`` has what comes of it."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()

    def answer(self, timeout: float = PATIENCE) -> Any:
        assert self._process.stdout is not None
        deadline = time.monotonic() + timeout
        while b"\n" not in self._said:
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise Stuck(f"no answer within {timeout:g} s")
            piece = os.read(self._process.stdout.fileno(), 1 << 20)
            assert piece, "the process that looks at the mount has ended"
            self._said += piece
        self._namespace.wait_landed()
        line, _, self._said = self._said.partition(b"\n")
        said = json.loads(line)
        if isinstance(said, dict) and "error" in said:
            raise AssertionError(said["error"])
        return said

    def call(self, *request: object, timeout: float = PATIENCE) -> Any:
        self.ask(*request)
        return self.answer(timeout)

    # --- what is asked -----------------------------------------------------------------------------

    def look(self, path: str, *, content: bool = True) -> View:
        view: View = self.call("look", path, content)
        return view

    def tree(self, top: str, *, content: bool = True) -> dict[str, View]:
        found: dict[str, View] = self.call("tree", top, content)
        return found

    def run(self, script: str) -> None:
        """Python in that process; its variables stay."""
        self.call("run", script)

    def value(self, expression: str) -> Any:
        """Of a Python expression there; an errno's name if it fails with one. Tuples come back as lists."""
        return self.call("value", expression)


def differences(guest: dict[str, View], host: dict[str, View], but: str = "") -> list[str]:
    """Where two trees differ, as lines; ``but`` in the field of this name."""
    lines = [f"{path!r}: the guest lacks it" for path in host.keys() - guest.keys()]
    lines += [f"{path!r}: the guest still has it" for path in guest.keys() - host.keys()]
    for path in host.keys() & guest.keys():
        theirs, ours = guest[path], host[path]
        lines += [
            f"{path!r}: {field} is {_short(ours.get(field))}, to the guest {_short(theirs.get(field))}"
            for field in dict.fromkeys([*ours, *theirs])
            if field != but and ours.get(field) != theirs.get(field)
        ]
    return sorted(lines)


def _short(value: object) -> str:
    text = repr(value)
    return (
        text
        if len(text) <= 120
        else f"{text[:80]}... ({len(text)} characters, {hash(text) & 0xFFFFFFFF:08x})"
    )
