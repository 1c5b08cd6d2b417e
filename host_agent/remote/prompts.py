"""Who is asked on the way to a machine: the user at their terminal, or what they have answered before.

The law: nobody is asked where nobody looks, and no key of a machine is trusted without a yes of somebody who saw it.
What was typed is kept for the host agent, in memory (``answers``).
"""

from __future__ import annotations

import contextlib
import os
import sys
import termios
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

from host_agent.progress import Line
from host_agent.remote.answers import is_for_one_login

#: Bytes of an answer; a longer one is a mistake.
MAX_ANSWER = 4096


class Asked(Protocol):
    """As ``connection.Prompts``; ``answers`` has what was typed, by its question."""

    @property
    def answers(self) -> Mapping[str, str]: ...

    def ask(self, question: str, *, secret: bool) -> str | None: ...

    def trust(self, host: str, key_type: str, fingerprint: str) -> bool: ...


class Remembered:
    """Nobody is there; what was answered before counts, once for each connection, or once if it is for one login."""

    def __init__(self, answers: Mapping[str, str]) -> None:
        self.answers = dict(answers)

    def ask(self, question: str, *, secret: bool) -> str | None:
        if is_for_one_login(question):
            return self.answers.pop(question, None)
        return self.answers.get(question)

    def trust(self, host: str, key_type: str, fingerprint: str) -> bool:
        return False


class Terminal:
    """The user. Called in threads of their own, one at a time.

    A ^C is for the main thread, which cannot end one that reads; so it is read like any key while somebody is asked.
    ``interrupted`` says that it was typed.
    """

    def __init__(self) -> None:
        self.answers: dict[str, str] = {}
        self.interrupted = False
        self.line: Line | None = None
        """Where progress is shown, which a question interrupts."""

    @staticmethod
    def is_there() -> bool:
        return sys.stdin.isatty() and sys.stderr.isatty()

    def ask(self, question: str, *, secret: bool) -> str | None:
        answer = self._asked(f"{question}: ", shown=not secret)
        if answer:
            self.answers[question] = answer
        return answer or None

    def trust(self, host: str, key_type: str, fingerprint: str) -> bool:
        fact = f"{host} is not known here. Its key is {key_type} {fingerprint}."
        answer = self._asked(f"{fact}\nIs that the machine you mean? [y/N]: ", shown=True)
        return answer is not None and answer.strip().lower() in ("y", "yes")

    def _asked(self, question: str, *, shown: bool) -> str | None:
        """None if nobody is there, or does not want to be asked."""
        if self.interrupted or not self.is_there():
            return None
        with self._alone():
            answer = typed(sys.stdin.fileno(), question, _write, shown=shown)
        self.interrupted = answer is None
        return answer

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Without the line of progress."""
        if self.line is None:
            yield
            return
        self.line.stop()
        try:
            yield
        finally:
            self.line.start()


def typed(terminal: int, question: str, write: Callable[[str], object], *, shown: bool) -> str | None:
    """The line that is typed at ``terminal``, a descriptor, which is left as it was found; None after ^C, ^D, or its
    end."""
    write("".join(each if each.isprintable() or each == "\n" else "?" for each in question))
    before = termios.tcgetattr(terminal)
    keys = termios.tcgetattr(terminal)
    keys[3] &= ~(termios.ICANON | termios.ECHO | termios.ISIG)
    text = b""
    try:
        termios.tcsetattr(terminal, termios.TCSADRAIN, keys)
        while (key := os.read(terminal, 1)) not in (b"\n", b"\r"):
            if key in (b"", b"\x03", b"\x04"):
                return None
            text = _edited(text, key)
            if shown:
                write("\r\x1b[K" + question.splitlines()[-1] + text.decode(errors="ignore"))
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)
        write("\n")
    return text.decode(errors="surrogateescape")


def _edited(text: bytes, key: bytes) -> bytes:
    """``text`` after one more key: a byte, the last character away (backspace), or all of it (^U)."""
    if key == b"\x15":
        return b""
    if key in (b"\x7f", b"\x08"):
        return text.decode(errors="surrogateescape")[:-1].encode(errors="surrogateescape")
    return text + key if len(text) < MAX_ANSWER else text


def _write(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()
