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


_ATTACHED_HEAD = """\
# yaml-language-server: $schema={schema}
#
# A machine that is attached with agentctl, which is what "the VM" means below; `agentctl attach` reads this, and what
# its flags ask for is remembered here. `agentctl config edit` checks it as you leave the editor.
"""

#: All others are of a VM.
ATTACHED_KEYS = frozenset({"mounts", "lan", "privileged_offset", "rules", "sockets"})


def template(config: InstanceConfig, schema: Path, *, attached: bool = False) -> str:
    """The text that says ``config``; ``schema`` is the JSON Schema for editors."""
    text = (_ATTACHED_HEAD if attached else _HEAD).format(schema=schema)
    said: set[str] = set()
    for name, key in config_keys.keys().items():
        if attached and name not in ATTACHED_KEYS:
            continue
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
