"""Sees when an edit has come, as a script of its own: it runs beside the mount, and knows the time there.

    python3 -u watcher.py

Requests are lines of JSON on stdin (``Watch``), answers on stdout. The first comes when the file has been looked at once, so
that whatever caches it has it cached; the second when it has ``content``. Both are ``{"clock": C}``, seconds of this
machine's monotonic clock, or ``{"error": "..."}`` if it was not seen in time. Without a ``path`` there is only the first.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass

STEP = 0.0005
"""Seconds between two looks."""


@dataclass(frozen=True, slots=True)
class Watch:
    """Wait until the file at ``path`` has ``content``, for ``limit`` seconds at the most."""

    path: str = ""
    content: str = ""
    limit: float = 0.0


def look(path: str) -> str:
    """Its content; while it is replaced, on some filesystems there is none."""
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return ""


def arrival(watch: Watch) -> float:
    """When it was seen; raises ``TimeoutError``."""
    end = time.monotonic() + watch.limit
    while look(watch.path) != watch.content:
        if time.monotonic() > end:
            raise TimeoutError(f"not seen within {watch.limit:g} s")
        time.sleep(STEP)
    return time.monotonic()


def main() -> None:
    for line in sys.stdin:
        watch = Watch(**json.loads(line))
        if watch.path:
            look(watch.path)
        print(json.dumps({"clock": time.monotonic()}), flush=True)
        if watch.path:
            try:
                print(json.dumps({"clock": arrival(watch)}), flush=True)
            except TimeoutError as error:
                print(json.dumps({"error": str(error)}), flush=True)


if __name__ == "__main__":
    main()
