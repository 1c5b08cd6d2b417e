"""Plain values as the lines of a configuration that a person would have written.

The law: ``text`` reads them as the same values, whatever they are. (A general emitter writes mappings of one
key without their braces, and NEL as it is.)
"""

from __future__ import annotations

import json
import re
import textwrap
from typing import Any

from host_agent.configuration.text import scalar

#: Words that need no quotes, be they in a list in brackets or not. A colon is one of them inside a word only.
_BARE = re.compile(r"(?=.*\w)[\w/.][\w/.@%+=~:-]*(?<!:)")

_ESCAPES = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t"}


def dump(values: Any) -> str:
    """Lines; of a list its entries, of a mapping its keys."""
    if isinstance(values, dict) and values:
        return "".join(f"{_word(name)}:{behind(value)}" for name, value in values.items())
    if isinstance(values, list) and values:
        return "".join(f"-{_entry(value)}" for value in values)
    return dump_inline(values) + "\n"


def dump_inline(values: Any) -> str:
    """On one line."""
    if isinstance(values, dict):
        return "{" + ", ".join(f"{_word(name)}: {dump_inline(value)}" for name, value in values.items()) + "}"
    if isinstance(values, list):
        return "[" + ", ".join(map(dump_inline, values)) + "]"
    return _word(values) if isinstance(values, str) else json.dumps(values)


def behind(value: Any, comment: str = "") -> str:
    """What comes behind ``key:``, with the comment (and the space before it) on the line of the key."""
    if isinstance(value, dict | list) and value:
        return f"{comment}\n" + textwrap.indent(dump(value), "  ")
    if isinstance(value, str) and _is_literal(value):
        style = "|" if value.endswith("\n") else "|-"
        return f" {style}{comment}\n" + textwrap.indent(value.removesuffix("\n"), "  ") + "\n"
    return f" {dump_inline(value)}{comment}\n"


def _entry(value: Any) -> str:
    """What comes behind the dash."""
    if isinstance(value, dict) and value:
        return " " + textwrap.indent(dump(value), "  ").removeprefix("  ")
    return behind(value)


def _is_literal(text: str) -> bool:
    """Lines that can stand as they are."""
    lines = text.removesuffix("\n").split("\n")
    ends_well = lines[0][:1].strip() and lines[-1].strip()
    return (
        len(text.split("\n")) > 1
        and bool(ends_well)
        and all(
            # A line of nothing but space would lose it.
            line.isprintable() and (line.strip() or not line)
            for line in lines
        )
    )


def _word(text: str) -> str:
    if _BARE.fullmatch(text) and scalar(text) == text:
        return text
    return '"' + "".join(map(_escaped, text)) + '"'


def _escaped(character: str) -> str:
    if character in _ESCAPES:
        return _ESCAPES[character]
    if character.isprintable():
        return character
    return f"\\u{ord(character):04x}" if ord(character) < 0x10000 else f"\\U{ord(character):08x}"
