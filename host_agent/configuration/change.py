"""``agentctl config set KEY=VALUE``: words of the command line, as a change of the text of a configuration.

The law: a value is read as it would be in the file, except that where only a text can be, no quotes are needed.
``KEY=`` takes it back to the default.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from host_agent.configuration import keys as config_keys
from host_agent.configuration import text as config_text
from host_agent.configuration.config import InstanceConfig, change_of
from host_agent.configuration.edit import Change, changed
from host_agent.configuration.keys import Key
from host_agent.configuration.kinds import Schema, meant
from host_agent.configuration.text import InvalidText
from host_agent.errors import ExitCode, UserError


@dataclass(frozen=True, slots=True)
class Assignment:
    """``inside`` of the value of ``key``, or all of it where that is (), becomes ``value``; as it is by default, if
    ``reset``."""

    key: Key
    inside: tuple[str, ...]
    value: Any = None
    reset: bool = False

    @property
    def path(self) -> tuple[str, ...]:
        return (*map(str, self.key.path), *self.inside)


def parse(word: str) -> Assignment:
    """``KEY=VALUE``. Raises ``UserError`` (USAGE)."""
    name, equals, text = word.partition("=")
    if not equals or not name:
        raise UserError(f"{word!r} is no KEY=VALUE", "for instance: cpus=2 ports.lan=true", ExitCode.USAGE)
    path, schema = _resolved(name)
    found = config_keys.find(path)
    if found is None:
        members = ", ".join(f"{name}.{member}" for member in schema.get("properties", {}))
        raise UserError(f"{name} is a group of keys", f"set one of {members}", ExitCode.USAGE)
    key = found[1]
    inside = tuple(str(part) for part in path[len(key.path) :])
    if not text:
        return Assignment(key, inside, reset=True)
    return Assignment(key, inside, text if schema.get("type") == "string" else _value(name, text))


def _value(name: str, text: str) -> Any:
    try:
        return config_text.parse(text).values
    except InvalidText as error:
        raise UserError(
            f"the value of {name} is not understood: {error}", "put quotes around it", ExitCode.USAGE
        ) from None


def _resolved(name: str) -> tuple[tuple[str, ...], Schema]:
    """The path that a dotted name is, and the schema of what is there."""
    path: tuple[str, ...] = ()
    schema, rest = config_keys.schema(), name
    while rest:
        properties = _properties(schema)
        head, _, tail = rest.partition(".")
        if head in properties:
            path, rest, schema = (*path, head), tail, properties[head]
        elif isinstance(schema.get("additionalProperties"), dict):
            # Names of the user's, which may have dots in them.
            return (*path, rest), schema["additionalProperties"]
        elif _is_free(schema):
            path, rest, schema = (*path, head), tail, {"type": ["object", "string"]}
        else:
            inner = meant(head, properties) if properties else f"{'.'.join(path)} has none in it"
            clause = inner if path else config_keys.meant_by((head,))
            raise UserError(f"{name} is no key; {clause}", "see: agentctl config show", ExitCode.USAGE)
    return path, schema


def _properties(schema: Schema) -> dict[str, Schema]:
    """The members that it may have, in whichever form it has some."""
    forms = [schema, *schema.get("anyOf", ()), *schema.get("oneOf", ())]
    return {name: part for form in forms for name, part in form.get("properties", {}).items()}


def _is_free(schema: Schema) -> bool:
    """A mapping that is somebody else's to understand."""
    return "object" in schema.get("type", ()) and schema.get("additionalProperties", True) is True


def applied(text: str, assignments: Iterable[Assignment], default: InstanceConfig) -> str:
    """``text`` after them. Raises ``InvalidText`` for a text that is not understood."""
    for assignment in assignments:
        if (change := _change(text, assignment, default)) is not None:
            text = changed(text, change)
    return text


def _change(text: str, assignment: Assignment, default: InstanceConfig) -> Change | None:
    key, inside = assignment.key, assignment.inside
    if not assignment.reset:
        return change_of(key, assignment.value, inside)
    if not inside:
        (name, _), *_ = (pair for pair in config_keys.keys().items() if pair[1] is key)
        return change_of(key, key.kind.plain(getattr(default, name)))
    holder = config_text.parse(text).values
    for part in assignment.path[:-1]:
        holder = holder.get(part) if isinstance(holder, dict) else None
    if not isinstance(holder, dict) or inside[-1] not in holder:
        return None
    rest = {name: value for name, value in holder.items() if name != inside[-1]}
    return replace(change_of(key, rest, inside[:-1]), comment="")
