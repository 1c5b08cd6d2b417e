"""What an instance is called in sentences: "the VM", or "the attached machine".

Sentences are written for a VM, wherever in the program they arise. The law: who reads one is told the truth about the
instance that it is about. So a process says once which kind that is (``choose``), as with ``hints``, and a sentence of
ours has the right name in it as it is shown or printed; words of others, like paths and logs, are left alone.
"""

from __future__ import annotations

import re
from typing import Any, Final

# Not within a path or another word.
_CALLED: Final = re.compile(r"(?<![\w/.-])(in |In |into |from |From )?(the|The) VM(?![\w/-])")
_ON: Final = {"in ": "on ", "In ": "On ", "into ": "to "}

#: Keys of JSON whose values are sentences of ours.
_SENTENCES: Final = frozenset({"detail", "fix", "hint", "message", "notes", "reason", "warnings"})

_attached = False


def choose(*, attached: bool) -> None:
    """From now on sentences of this process are about such an instance."""
    global _attached
    _attached = attached


def called(text: str, *, attached: bool | None = None) -> str:
    """A sentence as it is true of the instance."""
    if not (_attached if attached is None else attached) or " VM" not in text:
        return text
    return _CALLED.sub(_name, text)


def in_json(value: Any, *, attached: bool | None = None) -> Any:
    """The same of all sentences in ``value``, of lists and dictionaries. What says of what kind it is knows best."""
    if isinstance(value, list):
        return [in_json(each, attached=attached) for each in value]
    if not isinstance(value, dict):
        return value
    if "attached" in value:
        attached = value["attached"] is not None
    return {
        key: _sentences(each, attached) if key in _SENTENCES else in_json(each, attached=attached)
        for key, each in value.items()
    }


def _sentences(value: Any, attached: bool | None) -> Any:
    if isinstance(value, list):
        return [_sentences(each, attached) for each in value]
    return called(value, attached=attached) if isinstance(value, str) else in_json(value, attached=attached)


def _name(match: re.Match[str]) -> str:
    place, article = match[1] or "", match[2]
    return f"{_ON.get(place, place)}{article} attached machine"
