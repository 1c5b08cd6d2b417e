"""Who is asked on the way to a machine: the user at their terminal, or what they have answered before.

The law: nobody is asked where nobody looks, and no key of a machine is trusted without a yes of somebody who saw it.
What was typed is kept for the host agent, in memory (``answers``).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from typing import Protocol

import click

from host_agent.progress import Line


class Asked(Protocol):
    """As ``connection.Prompts``; ``answers`` has what was typed, by its question."""

    @property
    def answers(self) -> Mapping[str, str]: ...

    def ask(self, question: str, *, secret: bool) -> str | None: ...

    def trust(self, host: str, key_type: str, fingerprint: str) -> bool: ...


class Remembered:
    """Nobody is there; what was answered before counts, once for each connection."""

    def __init__(self, answers: Mapping[str, str]) -> None:
        self.answers = dict(answers)

    def ask(self, question: str, *, secret: bool) -> str | None:
        return self.answers.get(question)

    def trust(self, host: str, key_type: str, fingerprint: str) -> bool:
        return False


class Terminal:
    """The user. Called in threads of their own, one at a time."""

    def __init__(self) -> None:
        self.answers: dict[str, str] = {}
        self.line: Line | None = None
        """Where progress is shown, which a question interrupts."""

    @staticmethod
    def is_there() -> bool:
        return sys.stdin.isatty() and sys.stderr.isatty()

    def ask(self, question: str, *, secret: bool) -> str | None:
        if not self.is_there():
            return None
        try:
            with self._alone():
                answer: str = click.prompt(
                    question, hide_input=secret, err=True, default="", show_default=False
                )
        except click.Abort:
            return None
        if answer:
            self.answers[question] = answer
        return answer or None

    def trust(self, host: str, key_type: str, fingerprint: str) -> bool:
        if not self.is_there():
            return False
        with self._alone():
            click.echo(f"{host} is not known here. Its key is {key_type} {fingerprint}.", err=True)
            try:
                return click.confirm("Is that the machine you mean?", default=False, err=True)
            except click.Abort:
                return False

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
