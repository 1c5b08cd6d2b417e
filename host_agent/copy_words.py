"""The words of ``agentctl cp``: which are of this machine, which of an instance, and of which one.

``NAME:PATH`` is of the instance NAME, ``guest:PATH`` of the one that is chosen; whatever has a slash before its colon
is of this machine, as with scp. The law: what can mean two things is refused, and never guessed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Final, NoReturn

from host_agent.errors import ExitCode, UserError

#: What names a file of the instance that is chosen.
GUEST: Final = "guest"

_PREFIXED: Final = re.compile(r"([a-z0-9-]{1,32}):")


@dataclass(frozen=True, slots=True)
class Plan:
    """What to copy. ``prefix`` is how the user calls the instance, with its colon; ``inwards``: to it."""

    instance: str
    prefix: str
    inwards: bool
    sources: tuple[str, ...]
    destination: str


def understand(
    sources: Sequence[str],
    destination: str,
    *,
    chosen: str,
    insists: bool,
    instances: Collection[str],
    exists: Callable[[str], bool] = os.path.lexists,
) -> Plan:
    """``chosen`` is the instance that is meant by default; ``insists``: an option of this command says so.

    Raises ``UserError`` (USAGE).
    """
    words = [*sources, destination]
    prefixes = [_prefix(word, chosen, insists, instances, exists) for word in words]
    inwards = bool(prefixes[-1])
    if any(bool(prefix) is inwards for prefix in prefixes[:-1]):
        _one_sided(words, prefixes, instances, exists)
    named = sorted({prefix for prefix in prefixes if prefix})
    targets = sorted({chosen if prefix == GUEST else prefix for prefix in named})
    if len(targets) > 1:
        _refuse(f"{' and '.join(targets)} are two instances", "copy from one after the other")
    if insists and targets[0] != chosen:
        _refuse(f"{targets[0]}: is one instance, and --instance says {chosen}", "say it once")
    *paths, place = [
        word[len(prefix) + 1 :] if prefix else word for word, prefix in zip(words, prefixes, strict=True)
    ]
    return Plan(targets[0], f"{named[0]}:", inwards, tuple(path or "." for path in paths), place)


def _prefix(
    word: str, chosen: str, insists: bool, instances: Collection[str], exists: Callable[[str], bool]
) -> str:
    """What is before the colon of a path of an instance; empty of a path of this machine."""
    match = _PREFIXED.match(word)
    name = match[1] if match else ""
    if name == GUEST:
        if GUEST in instances and chosen != GUEST:
            which = f"agentctl --instance {GUEST} cp"
            _refuse(
                f"{word} is of the instance that is called {GUEST}, or of {chosen}",
                f"say which: {which}, or {chosen}:{word[len(GUEST) + 1 :]}",
            )
        return name
    if name not in instances:
        return ""
    if exists(word):
        _refuse(
            f"{word} is a file here, and a path of instance {name}",
            f"write ./{word}, or the whole path of either",
        )
    return name


def _one_sided(
    words: Sequence[str], prefixes: Sequence[str], instances: Collection[str], exists: Callable[[str], bool]
) -> NoReturn:
    for word, prefix in zip(words, prefixes, strict=True):
        match = _PREFIXED.match(word)
        if match and not prefix and not exists(word):
            known = ", ".join(sorted(instances))
            _refuse(
                f"there is no instance {match[1]}, and no file {word}", f"there is {known}" if known else ""
            )
    example = next(iter(sorted(instances)), "default")
    _refuse(
        "all of SRC are to be on one side, and DST on the other",
        f"write a path of an instance like {GUEST}:/etc/hosts or {example}:/etc/hosts, and a file that is called so"
        f" ./{GUEST}:...",
    )


def _refuse(message: str, hint: str) -> NoReturn:
    raise UserError(message, hint, ExitCode.USAGE)
