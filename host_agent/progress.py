"""Progress of anything over a second, on stderr: one live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from host_agent import show


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """A function that shows what is being done; the line goes when the block ends."""
    console = show.err()
    if not console.is_terminal:
        yield lambda message: console.print(show.words(message))
        return
    with console.status("") as line:
        yield lambda message: line.update(show.words(message))
