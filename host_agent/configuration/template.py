"""The file that a new instance gets: every key with what it is, its comment above it."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from host_agent.configuration import keys as config_keys
from host_agent.configuration.edit import Change, changed
from host_agent.configuration.keys import SECTIONS, InstanceConfig

_HEAD = """\
# yaml-language-server: $schema={schema}
#
# An instance of agentctl; `agentctl up` reads this. `agentctl config edit` checks it as you leave the editor, and what
# `agentctl up --cpus 4` and the like ask for is remembered here. What is left out is as it is by default.
"""


def template(config: InstanceConfig, schema: Path) -> str:
    """The text that says ``config``; ``schema`` is the JSON Schema for editors."""
    text = _HEAD.format(schema=schema)
    said: set[str] = set()
    for name, key in config_keys.keys().items():
        section = key.name.rpartition(".")[0]
        if section and section not in said:
            said.add(section)
            text += f"\n{_comment(SECTIONS.get(section, ''))}{section}:\n"
        elif not section:
            text += "\n"
        text += textwrap.indent(
            _comment(key.comment) + _line(str(key.path[-1]), key.kind.plain(getattr(config, name))),
            "  " * bool(section),
        )
    return text


def _comment(text: str) -> str:
    return "".join(f"# {line}".rstrip() + "\n" for line in text.splitlines())


def _line(name: str, value: Any) -> str:
    return changed("", Change((name,), value))
