"""The text of a configuration: YAML, as plain values of which the line is known.

The law: what stands in the file is what is meant. A scalar is a number, true, false or nothing only as YAML 1.2's core
schema has it (10.3), so ``no`` is a word; a key that is there twice, a tag and a second document are refused.
Every error names its line.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ruamel.yaml.nodes import MappingNode, Node, ScalarNode

#: Where in the values: the keys of mappings and the indices of lists.
Path = tuple[str | int, ...]

#: Characters; a configuration of every rule, socket and mount that is possible has a tenth of it.
MAX_TEXT = 1 << 20
#: Values, also of aliases: a file of 500 bytes can be a list of 2**30 words (YAML bomb).
MAX_VALUES = 100_000

_NULL = re.compile(r"|~|null|Null|NULL")
_BOOL = re.compile(r"(true|True|TRUE)|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+")
_OCTAL, _HEX = re.compile(r"0o[0-7]+"), re.compile(r"0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")

_PLAIN_TAGS = ("bool", "float", "int", "map", "merge", "null", "seq", "str", "timestamp", "value")


class InvalidText(ValueError):
    """It is not YAML, or not of the kind that is understood. ``line`` counts from 1; 0 if there is none."""

    def __init__(self, reason: str, line: int = 0) -> None:
        super().__init__(reason)
        self.line = line


@dataclass(frozen=True, slots=True)
class Document:
    """``values`` is None for a file without any. ``lines``, from 1, are those of the keys and of the list's entries."""

    values: Any
    lines: Mapping[Path, int]

    def line(self, path: Path) -> int:
        """Where ``path`` is, or the innermost of what it is in; 0 if that cannot be told."""
        for length in range(len(path), 0, -1):
            if found := self.lines.get(path[:length]):
                return found
        return 0


def decode(content: bytes) -> str:
    """Raises ``InvalidText``."""
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InvalidText("this is not UTF-8 text", line) from None
    if len(text) > MAX_TEXT:
        raise InvalidText(f"it has {len(text)} characters; {MAX_TEXT} are the most")
    return text.removeprefix("\ufeff")


def parse(text: str) -> Document:
    """Raises ``InvalidText``."""
    root = compose(text)
    lines: dict[Path, int] = {}
    values = None if root is None else _Reader(lines).value(root, ())
    return Document(values, lines)


def compose(text: str) -> Node | None:
    """The nodes of the text, with their marks. Raises ``InvalidText``."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    try:
        # The C parser of other YAML libraries has no marks that could be relied on.
        root: Node | None = YAML(typ="safe", pure=True).compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise InvalidText(
            f"this is not YAML: {error.problem or error.context}", mark.line + 1 if mark else 0
        ) from None
    except YAMLError as error:  # of the reader: characters that YAML does not have
        line = text.count("\n", 0, getattr(error, "position", None) or 0) + 1
        raise InvalidText(f"this is not YAML: {getattr(error, 'reason', error)}", line) from None
    except RecursionError:
        raise InvalidText("it is nested too deeply") from None
    return root


def plain(node: Node) -> Any:
    """What a node of ``compose`` means. Raises ``InvalidText``."""
    return _Reader({}).value(node, ())


class _Reader:
    """From nodes to plain values."""

    def __init__(self, lines: dict[Path, int]) -> None:
        self._lines = lines
        self._count = 0

    def value(self, node: Node, path: Path) -> Any:
        from ruamel.yaml.nodes import MappingNode, ScalarNode

        self._count += 1
        if self._count > MAX_VALUES:
            raise InvalidText(f"it has more than {MAX_VALUES} values", _line(node))
        if len(path) > 50:
            raise InvalidText("it is nested too deeply", _line(node))
        if str(node.tag) not in [f"tag:yaml.org,2002:{name}" for name in _PLAIN_TAGS]:
            raise InvalidText(f"{node.tag} is a tag, which has no meaning here", _line(node))
        if isinstance(node, ScalarNode):
            return scalar(node.value) if _is_bare(node) else node.value
        if isinstance(node, MappingNode):
            return self._mapping(node, path)
        values = []
        for number, entry in enumerate(node.value):
            self._lines[(*path, number)] = _line(entry)
            values.append(self.value(entry, (*path, number)))
        return values

    def _mapping(self, node: MappingNode, path: Path) -> dict[str, Any]:
        from ruamel.yaml.nodes import ScalarNode

        values: dict[str, Any] = {}
        for key, value in node.value:
            if not isinstance(key, ScalarNode):
                raise InvalidText("a key is a list or a mapping; it is a word", _line(key))
            name = str(key.value)
            if name in values:
                first = self._lines[(*path, name)]
                raise InvalidText(f"{name} is there twice; it is in line {first}, too", _line(key))
            self._lines[(*path, name)] = _line(key)
            values[name] = self.value(value, (*path, name))
        return values


def _line(node: Node) -> int:
    return int(node.start_mark.line) + 1


def _is_bare(node: ScalarNode) -> bool:
    """Written without quotes, and not as a block."""
    return node.style in (None, "")


def scalar(text: str) -> Any:
    """What a word without quotes means."""
    if _NULL.fullmatch(text):
        return None
    if match := _BOOL.fullmatch(text):
        return match[1] is not None
    if _INT.fullmatch(text):
        # Python refuses to read more digits than 4300; none of our numbers has more than 19.
        return int(text) if len(text) < 100 else text
    if _OCTAL.fullmatch(text):
        return int(text[2:], 8)
    if _HEX.fullmatch(text):
        return int(text[2:], 16)
    if _FLOAT.fullmatch(text):
        return float(text)
    return text
