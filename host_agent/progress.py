"""Progress of anything over a second, on stderr: one live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Protocol

from host_agent import show


class Line(Protocol):
    """The live line: it may be taken away for a while."""

    def stop(self) -> None: ...
    def start(self) -> None: ...


class Talks(Protocol):
    """Whoever asks the user something meanwhile, and takes the line away for that."""

    line: Line | None


@contextlib.contextmanager
def progress(beside: Talks | None = None) -> Iterator[Callable[[str], None]]:
    """A function that shows what is being done; the line goes when the block ends."""
    console = show.err()
    if not console.is_terminal:
        yield lambda message: console.print(show.sentence(message))
        return
    with console.status("") as line:
        if beside is not None:
            beside.line = line
        yield lambda message: line.update(show.sentence(message))
