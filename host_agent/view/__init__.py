"""The guest's files on this machine (``agentctl view``): a process of its own, which is the FUSE side of the view.

``tree``, ``symlinks``, ``listing`` and ``lookups`` are pure; ``files`` are the operations, of anybody who can ask, with
``data`` and ``directories`` for what is open, and ``reach`` from a path to what the guest has there. ``asking`` asks
over the link, in a thread beside the one that serves; ``mounting`` is mfusepy, imported nowhere else.
"""

from __future__ import annotations

import sys
from typing import Final

PROGRAM: Final = (sys.executable, "-m", "host_agent.view")
