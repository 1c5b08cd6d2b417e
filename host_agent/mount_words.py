"""The words of ``--mount``, understood; which folders they mean and whether that is allowed is ``mounts``'s to say.

The law: whatever can be read in two ways is refused in a sentence. A comma may be in a folder's name, a colon may not.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from host_agent.errors import ExitCode, UserError

_SYNTAX = "write it as PATH[:GUESTPATH][:ro|:rw][,locks=host]"


@dataclass(frozen=True, slots=True)
class Words:
    """One ``--mount`` as it was written; without a ``guest_path`` it is for the folder to say."""

    host_path: str
    guest_path: str = ""
    read_only: bool = False
    host_locks: bool = False


def parse(text: str) -> Words:
    """``PATH[:GUESTPATH][:ro|:rw][,locks=host]``. Raises ``UserError`` (USAGE)."""
    segments, options = _split(text)
    host_path, *rest = segments
    if not host_path:
        raise _refused(f"there is no folder in --mount {text!r}", _SYNTAX)
    for word in rest:
        if not word.startswith("/"):
            raise _refused(
                f"in --mount {text!r}, {word!r} is neither a place in the VM (these begin with /) nor an option",
                f"{_SYNTAX}; of a folder with a colon in its name, mount the one that it is in",
            )
    if len(rest) > 1:
        raise _refused(f"--mount {text!r} names more than one place in the VM", _SYNTAX)
    read_only, host_locks = _options(text, options)
    return Words(host_path, rest[0] if rest else "", read_only, host_locks)


def _split(text: str) -> tuple[list[str], list[str]]:
    """What stands between the colons, and the options after the last colon or comma."""
    *segments, last = text.split(":")
    words = last.split(",")
    if segments and (words[0] in ("ro", "rw") or words[0].startswith("locks=")):
        return segments, words
    options: list[str] = []
    while len(words) > 1 and words[-1].startswith("locks="):
        options.append(words.pop())
    return [*segments, ",".join(words)], options


def _options(text: str, options: Iterable[str]) -> tuple[bool, bool]:
    """Read-only, and locks of the host."""
    chosen: dict[str, bool] = {}
    meanings = {
        "ro": ("access", True),
        "rw": ("access", False),
        "locks=host": ("locks", True),
        "locks=guest": ("locks", False),
    }
    for option in options:
        if option not in meanings:
            raise _refused(f"in --mount {text!r}, {option!r} is not an option", _SYNTAX)
        what, value = meanings[option]
        if chosen.setdefault(what, value) is not value:
            raise _refused(f"--mount {text!r} contradicts itself", _SYNTAX)
    return chosen.get("access", False), chosen.get("locks", False)


def _refused(message: str, hint: str) -> UserError:
    return UserError(message, hint, ExitCode.USAGE)
