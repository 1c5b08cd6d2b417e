"""Lines of the host's in a file that is also others'.

The law: what is outside of the two marks is not touched, and doing it twice changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

BEGIN, END = "# --- agentctl: from the host", "# --- agentctl: end"


def without_block(text: str) -> str:
    """``text`` without what is between the marks, and without them."""
    kept = []
    inside = False
    for line in text.splitlines(keepends=True):
        bare = line.rstrip("\n")
        if bare == BEGIN:
            inside = True
        elif inside and bare == END:
            inside = False
        elif not inside:
            kept.append(line)
    return "".join(kept)


def with_block(text: str, lines: Iterable[str]) -> str:
    """``text`` with ``lines`` between the marks, at its end; without lines, without marks."""
    before = without_block(text)
    block = [*lines]
    if not block:
        return before
    if before and not before.endswith("\n"):
        before += "\n"
    return before + "".join(f"{line}\n" for line in [BEGIN, *block, END])
