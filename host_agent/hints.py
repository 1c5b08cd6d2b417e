"""Which instance a hint is about.

Hints are written as for the default instance, wherever in the program they arise: "start it: agentctl up". The
law: who types what a hint says does it to the instance that the sentence is about. So a process that is about
another one says so once (``choose``), and the sentences name it as they are shown: "start it: agentctl --instance
dev up".
"""

from __future__ import annotations

import re

from host_agent.commands.places import OF_NO_INSTANCE, PLACES
from host_agent.paths import DEFAULT_INSTANCE

# "agentctl is" is prose.
_NAMED = re.compile(rf"\bagentctl (?=(?:{'|'.join(sorted(PLACES.keys() - OF_NO_INSTANCE))})(?![\w-]))")

_chosen = DEFAULT_INSTANCE


def choose(instance: str) -> None:
    """From now on hints of this process are about ``instance``."""
    global _chosen
    _chosen = instance


def addressed(text: str) -> str:
    """``text`` with the commands in it as they have to be typed."""
    if _chosen == DEFAULT_INSTANCE or "agentctl " not in text:
        return text
    return _NAMED.sub(f"agentctl --instance {_chosen} ", text)
