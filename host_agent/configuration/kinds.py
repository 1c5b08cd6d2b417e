"""What a key of the configuration may be: each kind reads a plain value, writes it, and describes itself.

The law: ``read`` takes what the JSON Schema of ``schema`` allows, and more is refused in a sentence that says what it
is instead; what ``plain`` writes, ``read`` understands as the same. Pure: no kind asks this machine whether something
is there.
"""

from __future__ import annotations

import copy
import difflib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, Protocol

from host_agent import sizes
from host_agent.configuration.text import Path
from host_agent.errors import UserError

Schema = dict[str, Any]


class Invalid(ValueError):
    """A sentence about what is at ``path``."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{dotted(path)} {reason}")
        self.path = path

    @classmethod
    def inside(cls, at: Path, place: Path, sentence: str) -> Invalid:
        """What somebody else found at ``place`` in what is at ``at``."""
        error = cls(at, "")
        error.args = (f"{dotted(at)}: {sentence}",)
        error.path = (*at, *place)
        return error


class Kind(Protocol):
    """Of a value."""

    def read(self, value: Any, at: Path) -> Any:
        """The value as the program has it. Raises ``Invalid``."""

    def plain(self, value: Any) -> Any:
        """``value`` as the file has it: mappings, lists, texts, numbers, true, false."""

    def schema(self) -> Schema:
        """JSON Schema, draft 7."""


def dotted(path: Path) -> str:
    """``ports.rules entry 2``."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f" entry {part + 1}"
        else:
            text += f".{part}" if text else part
    return text


def shown(value: Any) -> str:
    """What was found, for a sentence: short, and on one line."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    if value is None:
        return "empty"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def meant(name: object, names: Iterable[str]) -> str:
    """A clause with the nearest name, or with all of them."""
    listed = list(names)
    near = difflib.get_close_matches(snake(name), listed, 1, 0.5)
    return f"did you mean {near[0]}?" if near else f"there are {', '.join(listed)}"


def snake(name: object) -> str:
    """``hostPath`` as ``host_path``, which it is near to."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|-", "_", str(name)).lower()


@dataclass(frozen=True, slots=True)
class Flag:
    """True or false."""

    def read(self, value: Any, at: Path) -> bool:
        if not isinstance(value, bool):
            raise Invalid(at, f"is {shown(value)}; it is true or false")
        return value

    def plain(self, value: bool) -> bool:
        return value

    def schema(self) -> Schema:
        return {"type": "boolean"}


@dataclass(frozen=True, slots=True)
class Integer:
    """A whole number. What is outside of the limits is for whoever knows the machine to refuse, if there are none."""

    least: int | None = None
    most: int | None = None
    check: Callable[[int], None] | None = None

    def read(self, value: Any, at: Path) -> int:
        if not isinstance(value, int) or isinstance(value, bool):
            raise Invalid(at, f"is {shown(value)}; it is a whole number")
        if self.least is not None and value < self.least:
            raise Invalid(at, f"is {value}; it is at least {self.least}")
        if self.most is not None and value > self.most:
            raise Invalid(at, f"is {value}; it is at most {self.most}")
        if self.check is not None:
            checked(self.check, value, at)
        return value

    def plain(self, value: int) -> int:
        return value

    def schema(self) -> Schema:
        limits = {"minimum": self.least, "maximum": self.most}
        return {"type": "integer", **{key: value for key, value in limits.items() if value is not None}}


@dataclass(frozen=True, slots=True)
class Bytes:
    """A size, in bytes; a bare number is GiB, as on the command line."""

    def read(self, value: Any, at: Path) -> int:
        if not isinstance(value, str | int | float) or isinstance(value, bool):
            raise Invalid(at, f"is {shown(value)}; it is a size like 4GiB or 512MiB")
        try:
            return sizes.parse(str(value))
        except (ValueError, OverflowError):
            raise Invalid(at, f"is {shown(value)}; it is a size like 4GiB or 512MiB") from None

    def plain(self, value: int) -> str:
        return sizes.flag(value)

    def schema(self) -> Schema:
        return {
            "type": ["string", "number"],
            "pattern": r"^\s*\d+(\.\d+)?\s*([kmgtKMGT]([iI]?[bB])?|[bB])?\s*$",
        }


@dataclass(frozen=True, slots=True)
class Text:
    """A text without a NUL; ``what`` it is said to be when it does not match ``pattern`` as a whole."""

    pattern: str = ""
    what: str = "a text"
    most: int = 65536

    def read(self, value: Any, at: Path) -> str:
        if isinstance(value, bool | int | float):
            raise Invalid(at, f"is {shown(value)}; it is {self.what}: write it in quotes")
        if not isinstance(value, str):
            raise Invalid(at, f"is {shown(value)}; it is {self.what}")
        if "\0" in value or len(value) > self.most:
            raise Invalid(at, f"has a NUL in it, or more than {self.most} characters")
        if self.pattern and not re.fullmatch(self.pattern, value):
            raise Invalid(at, f"is {shown(value)}; it is {self.what}")
        return value

    def plain(self, value: str) -> str:
        return value

    def schema(self) -> Schema:
        return {"type": "string", **({"pattern": f"^(?:{self.pattern})$"} if self.pattern else {})}


@dataclass(frozen=True, slots=True)
class HostPath:
    """A text that may be a path of this machine, which may begin with ``~/``."""

    def read(self, value: Any, at: Path) -> str:
        text = Text().read(value, at)
        return os.path.expanduser(text) if text.startswith("~/") else text

    def plain(self, value: str) -> str:
        return value

    def schema(self) -> Schema:
        return Text().schema()


@dataclass(frozen=True, slots=True)
class Choice:
    """One of some words."""

    words: tuple[str, ...]

    def __init__(self, *words: str) -> None:
        object.__setattr__(self, "words", words)

    def read(self, value: Any, at: Path) -> str:
        if not isinstance(value, str) or value not in self.words:
            near = difflib.get_close_matches(value.lower(), self.words, 1) if isinstance(value, str) else []
            also = f"; did you mean {near[0]}?" if near else ""
            raise Invalid(at, f"is {shown(value)}; it is one of {', '.join(self.words)}{also}")
        return value

    def plain(self, value: str) -> str:
        return value

    def schema(self) -> Schema:
        return {"enum": list(self.words)}


@dataclass(frozen=True, slots=True)
class ListOf:
    """A list, as a tuple. ``check`` sees all of it and raises ``ValueError`` or ``UserError`` with a clause."""

    element: Kind
    most: int = 1024
    check: Callable[[Sequence[Any]], None] | None = None

    def read(self, value: Any, at: Path) -> tuple[Any, ...]:
        if value is None:
            return ()  # `rules:` with every line below it taken out
        if not isinstance(value, list):
            raise Invalid(at, f"is {shown(value)}; it is a list")
        if len(value) > self.most:
            raise Invalid(at, f"has {len(value)} entries; {self.most} are the most")
        read = tuple(self.element.read(entry, (*at, number)) for number, entry in enumerate(value))
        if self.check is not None:
            checked(self.check, read, at)
        return read

    def plain(self, value: Sequence[Any]) -> list[Any]:
        return [self.element.plain(entry) for entry in value]

    def schema(self) -> Schema:
        return {"type": ["array", "null"], "items": self.element.schema(), "maxItems": self.most}


@dataclass(frozen=True, slots=True)
class MapOf:
    """A mapping whose keys are the user's, as pairs in their order; a key is ``what``, as ``pattern`` says."""

    element: Kind
    pattern: str = r".+"
    what: str = "a name"
    most: int = 4096

    def read(self, value: Any, at: Path) -> tuple[tuple[str, Any], ...]:
        if value is None:
            return ()
        if not isinstance(value, dict):
            raise Invalid(at, f"is {shown(value)}; it is a mapping")
        if len(value) > self.most:
            raise Invalid(at, f"has {len(value)} entries; {self.most} are the most")
        for name in value:
            if not re.fullmatch(self.pattern, name):
                raise Invalid((*at, name), f"cannot be: {shown(name)} is not {self.what}")
        return tuple((name, self.element.read(entry, (*at, name))) for name, entry in value.items())

    def plain(self, value: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        return {name: self.element.plain(entry) for name, entry in value}

    def schema(self) -> Schema:
        return {
            "type": ["object", "null"],
            "propertyNames": {"pattern": f"^(?:{self.pattern})$"},
            "additionalProperties": self.element.schema(),
            "maxProperties": self.most,
        }


@dataclass(frozen=True, slots=True)
class Plain:
    """A mapping that is somebody else's to understand. ``check`` raises ``ValueError`` with a clause, and may have a
    ``key`` that names the place."""

    check: Callable[[Mapping[str, Any]], None] | None = None
    description: Schema | None = None

    def read(self, value: Any, at: Path) -> dict[str, Any]:
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise Invalid(at, f"is {shown(value)}; it is a mapping")
        if self.check is not None:
            checked(self.check, value, at)
        return copy.deepcopy(value)

    def plain(self, value: Mapping[str, Any]) -> dict[str, Any]:
        return copy.deepcopy(dict(value))

    def schema(self) -> Schema:
        return {"type": ["object", "null"], **(self.description or {})}


@dataclass(frozen=True, slots=True)
class Language:
    """A value with a module of its own: ``from_plain`` raises ``ValueError`` or ``UserError`` with a clause, and an
    error with a ``key`` names a place in it."""

    from_plain: Callable[[Any], Any]
    as_plain: Callable[[Any], Any]
    description: Schema

    def read(self, value: Any, at: Path) -> Any:
        return checked(self.from_plain, value, at)

    def plain(self, value: Any) -> Any:
        return self.as_plain(value)

    def schema(self) -> Schema:
        return self.description


@dataclass(frozen=True, slots=True)
class RecordOf:
    """A mapping with given keys, as the dataclass ``cls``; what has a default there may be left out."""

    cls: type
    kinds: Mapping[str, Kind]

    def read(self, value: Any, at: Path) -> Any:
        if not isinstance(value, dict):
            raise Invalid(at, f"is {shown(value)}; it is a mapping with {', '.join(self.kinds)}")
        for name in value:
            if name not in self.kinds:
                raise Invalid((*at, name), f"is no key; {meant(name, self.kinds)}")
        for name in self._required():
            if name not in value:
                raise Invalid(at, f"has no {name}")
        return self.cls(**{name: self.kinds[name].read(part, (*at, name)) for name, part in value.items()})

    def plain(self, value: Any) -> dict[str, Any]:
        defaults = {field.name: field.default for field in fields(self.cls)}
        return {
            name: kind.plain(getattr(value, name))
            for name, kind in self.kinds.items()
            if getattr(value, name) != defaults[name]
        }

    def schema(self) -> Schema:
        return {
            "type": "object",
            "properties": {name: kind.schema() for name, kind in self.kinds.items()},
            "required": self._required(),
            "additionalProperties": False,
        }

    def _required(self) -> list[str]:
        without = (field for field in fields(self.cls) if field.name in self.kinds)
        return [
            field.name for field in without if field.default is MISSING and field.default_factory is MISSING
        ]


def checked(function: Callable[[Any], Any], value: Any, at: Path) -> Any:
    """``function(value)``, whose errors are ``Invalid`` at a place."""
    try:
        return function(value)
    except UserError as error:
        raise Invalid.inside(at, (), error.message) from None
    except ValueError as error:
        raise Invalid.inside(at, _place(value, getattr(error, "key", "")), str(error)) from None


def _place(value: Any, key: str) -> Path:
    """Where ``key`` is in ``value``: the path to it, or none."""
    if isinstance(value, dict):
        if key in value:
            return (key,)
        for name, inner in value.items():
            if isinstance(inner, dict) and key in inner:
                return (name, key)
    return ()
