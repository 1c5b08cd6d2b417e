"""A value of a configuration's text, changed; whatever else stands in it stays byte for byte.

A library that loads and dumps the whole file would lose the comments beside a list that is replaced (YAML has no place
for them but the end of the value before), and lay out anew what people laid out. So the text is changed where the
parser says that the value is. Lists are changed entry by entry, with the lines of comment above an entry.

The law: what could not be read back as what was asked for is not written: the caller compares.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from host_agent.configuration import text as config_text
from host_agent.configuration.dump import behind, dump, dump_inline
from host_agent.configuration.text import Path

if TYPE_CHECKING:
    from ruamel.yaml.nodes import Node

#: Two values of the file that mean the same.
Same = Callable[[Any, Any], bool]


@dataclass(frozen=True, slots=True)
class Change:
    """At ``path`` (of keys) is to be ``value``; ``comment`` goes over it where the key is not there yet.

    ``same`` compares the entries of a list, old and new.
    """

    path: tuple[str, ...]
    value: Any
    comment: str = ""
    same: Same = lambda old, new: bool(old == new)


def changed(text: str, change: Change) -> str:
    """``text`` with the change. Raises ``InvalidText`` for a text that is not understood."""
    root = config_text.compose(text)
    if not text.endswith("\n") and text:
        text += "\n"
    if root is None or not _is_block_mapping(root):
        # An empty file, or {...}, whose keys have no lines of their own.
        values = config_text.parse(text).values
        if isinstance(values, dict) and values:
            return dump(_with(values, change.path, change.value))
        kept = text if values is None else ""
        return kept + _new_key(change.path, change.value, change.comment, 0)
    return _in_mapping(text, root, change)


def _in_mapping(text: str, mapping: Node, change: Change) -> str:
    name, rest = change.path[0], change.path[1:]
    column = int(mapping.start_mark.column)
    found = next((pair for pair in mapping.value if pair[0].value == name), None)
    if found is None:
        at = _line_end(text, _last(mapping))
        return text[:at] + _new_key(change.path, change.value, change.comment, column) + text[at:]
    key, value = found
    if rest and _is_block_mapping(value):
        return _in_mapping(text, value, Change(rest, change.value, change.comment, change.same))
    old = config_text.plain(value)
    new = _with(old if isinstance(old, dict) else {}, rest, change.value) if rest else change.value
    if isinstance(new, dict) and new and _is_block_mapping(value):
        return _members(text, change, old, new)
    if isinstance(new, list) and new and _is_block_sequence(value):
        return _entries(text, value, new, change.same)
    return _replaced(text, key, value, new, column)


def _members(text: str, change: Change, old: dict[str, Any], new: dict[str, Any]) -> str:
    """A mapping, member by member; each time the text is read anew, since all behind a change has moved."""
    for name in old:
        if name not in new:
            text = _removed(text, (*change.path, name))
    for name, value in new.items():
        if name not in old or old[name] != value or type(old[name]) is not type(value):
            text = changed(text, Change((*change.path, name), value))
    return text


def _removed(text: str, path: tuple[str, ...]) -> str:
    """Without the key at ``path``, which is in block mappings only; the comments over it go with it."""
    mapping = config_text.compose(text)
    key = value = mapping
    for name in path:
        assert mapping is not None
        key, value = next(pair for pair in mapping.value if pair[0].value == name)
        mapping = value
    assert key is not None
    assert value is not None
    begin = _line_start(text, int(key.start_mark.index))
    end = _line_end(text, max(_last(value), int(key.end_mark.index)))
    return text[: _comments_above(text, begin)] + text[end:]


def _replaced(text: str, key: Node, value: Node, new: Any, column: int) -> str:
    """``key: value`` with another value; a comment behind it, on its line, stays there."""
    colon = text.index(":", int(key.end_mark.index)) + 1
    if value.start_mark.index < key.start_mark.index:
        # The marks of an alias are those of what it stands for.
        end = colon + len(text[colon:].split("#")[0].split("\n")[0].rstrip())
    elif _is_empty(value):
        end = colon
    else:
        begin = int(value.start_mark.index)
        end = _last(value)
        if text.count("\n", colon, begin):
            # A block below the line of the key: what is behind the colon is a comment.
            line_end = text.index("\n", colon)
            return text[:colon] + _laid_out(new, text[colon:line_end], column) + text[_line_end(text, end) :]
    line_end = _line_end(text, end)
    return text[:colon] + _laid_out(new, text[end:line_end].rstrip("\n"), column) + text[line_end:]


def _laid_out(value: Any, tail: str, column: int) -> str:
    """What is behind the colon, with the comment ``tail`` on its first line."""
    comment = tail.rstrip() if tail.lstrip().startswith("#") else ""
    first, end, rest = behind(value, comment).partition("\n")
    return first + end + textwrap.indent(rest, " " * column)


def _new_key(path: tuple[str, ...], value: Any, comment: str, column: int) -> str:
    """Lines for a key that is not there yet."""
    margin = " " * column
    for name in reversed(path[1:]):
        value = {name: value}
    above = "".join(f"{margin}# {line}".rstrip() + "\n" for line in comment.splitlines())
    space = "\n" if comment and not column else ""
    return f"{space}{above}{margin}{dump_inline(path[0])}:" + _laid_out(value, "", column)


def _entries(text: str, node: Node, new: list[Any], same: Same) -> str:
    """A list in lines, entry by entry: what stays keeps its lines and the comments above them."""
    column = int(node.start_mark.column)
    begin = top = _comments_above(text, _line_start(text, int(node.start_mark.index)))
    chunks: list[tuple[Any, str]] = []
    for entry in node.value:
        end = _line_end(text, max(_last(entry), begin))
        chunks.append((config_text.plain(entry), text[begin:end]))
        begin = end
    lines = ""
    for value in new:
        for number, (old, chunk) in enumerate(chunks):
            if same(old, value):
                lines += chunk
                del chunks[number]
                break
        else:
            lines += textwrap.indent(dump([value]), " " * column)
    return text[:top] + lines + text[begin:]


# --- places in the text ----------------------------------------------------------------------------


def _is_block_mapping(node: Node) -> bool:
    from ruamel.yaml.nodes import MappingNode

    return isinstance(node, MappingNode) and not node.flow_style


def _is_block_sequence(node: Node) -> bool:
    from ruamel.yaml.nodes import SequenceNode

    return isinstance(node, SequenceNode) and not node.flow_style


def _is_empty(node: Node) -> bool:
    return bool(node.start_mark.index == node.end_mark.index)


def _last(node: Node) -> int:
    """Where the last word of it ends. A block's own mark is where the next one begins, behind all comments."""
    if not getattr(node, "flow_style", True) and node.value:
        entry = node.value[-1]
        if not isinstance(entry, tuple):
            return max(_last(entry), int(node.start_mark.index))
        key, value = entry
        return int(key.end_mark.index) + 1 if _is_empty(value) else max(_last(value), int(key.end_mark.index))
    end = int(node.end_mark.index)
    if getattr(node, "style", None) in ("|", ">"):
        # Its mark is behind the empty lines and comments after it.
        written = node.start_mark.buffer[int(node.start_mark.index) : end]
        return end - (len(written) - len(written.rstrip()))
    return end


def _line_start(text: str, index: int) -> int:
    return text.rfind("\n", 0, index) + 1


def _line_end(text: str, index: int) -> int:
    """Behind the line that ``index`` is in."""
    found = text.find("\n", index)
    return len(text) if found < 0 else found + 1


def _comments_above(text: str, begin: int) -> int:
    """Where the lines of comment that stand directly above a line begin."""
    while begin:
        above = _line_start(text, begin - 1)
        if not text[above:begin].lstrip().startswith("#"):
            break
        begin = above
    return begin


def _with(values: dict[str, Any], path: Path, value: Any) -> dict[str, Any]:
    """``values`` with ``value`` at ``path``."""
    name = str(path[0])
    if len(path) == 1:
        return {**values, name: value}
    inner = values.get(name)
    return {**values, name: _with(inner if isinstance(inner, dict) else {}, path[1:], value)}
