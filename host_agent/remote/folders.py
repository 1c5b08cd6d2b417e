"""Where folders of this machine appear on an attached one: ``--mount``'s words, as they are meant there.

The law: a folder of the user's home is in their home there, at the same path below it; any other is at the same path,
unless a place is named, in which ``~`` is the home there. Nothing hides that home itself: the agent lives in it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from host_agent import mounts
from host_agent.errors import ExitCode, UserError
from host_agent.mount_words import parse
from protocol.api import MountSpec

#: Stands for a home that is not known yet, where words are only checked.
SOME_HOME = "/home/you"


def chosen(texts: Sequence[str], private: Path, home: str, own: str | None = None) -> tuple[MountSpec, ...]:
    """The folders that ``texts`` ask for; ``home`` is the user's there, ``own`` (or this process's) the one here.

    Raises ``UserError`` (USAGE) for what is not there or not allowed.
    """
    own = mounts.normal(own or os.path.expanduser("~"))
    specs = tuple(dict.fromkeys(_placed(_absolute(text, home), private, home, own) for text in texts))
    for spec in specs:
        if home and mounts.is_below(home, spec.guest_path):
            raise UserError(
                f"{spec.host_path} cannot be {spec.guest_path} there: it would hide your home",
                f"choose a place: --mount {spec.host_path}:~/{os.path.basename(spec.host_path) or 'here'}",
                ExitCode.USAGE,
            )
    mounts.check(specs)
    return specs


def together(before: Sequence[MountSpec], more: Sequence[MountSpec]) -> tuple[MountSpec, ...]:
    """``before`` and ``more``, of which what was asked for last counts. Raises ``UserError`` (USAGE)."""
    asked = {spec.guest_path for spec in more}
    specs = (*(spec for spec in before if spec.guest_path not in asked), *more)
    mounts.check(specs)
    return specs


def _absolute(text: str, home: str) -> str:
    """``text`` with the place there written out."""
    first, *rest = text.split(":")
    return ":".join([first, *(f"{home}{word[1:]}" if _is_of_home(word) else word for word in rest)])


def _is_of_home(word: str) -> bool:
    return word.partition(",")[0] == "~" or word.startswith("~/")


def _placed(text: str, private: Path, home: str, own: str) -> MountSpec:
    (spec,) = mounts.chosen([text], private)
    if parse(text).guest_path or not home or not mounts.is_below(spec.host_path, own):
        return spec
    return replace(spec, guest_path=mounts.normal(home + spec.host_path.removeprefix(own)))
