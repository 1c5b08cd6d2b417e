"""The open file descriptors of this process, for tests that look for leaks."""

from __future__ import annotations

import gc
import os


def open_descriptors() -> set[int]:
    """Without those that only garbage of earlier tests holds: it would be collected, and they closed, at any time."""
    gc.collect()
    return {int(name) for name in os.listdir("/proc/self/fd")}
