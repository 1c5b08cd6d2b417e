"""``python -m host_agent.view.guard PATH SOURCE``: takes the view at PATH off when its process has ended.

It waits for the end of its standard input, which that process holds open, and for nothing else: so whatever kills that
one, a segmentation fault or a SIGKILL, nobody is left with a folder that answers "Transport endpoint is not connected".
Any other view that is at the place when it gets to run is spared.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import Final

PROGRAM: Final = (sys.executable, "-m", "host_agent.view.guard")


def start(path: str, source: str) -> subprocess.Popen[bytes]:
    """To be called before anything is mounted. Its input ends with this process."""
    return subprocess.Popen([*PROGRAM, path, source], stdin=subprocess.PIPE, cwd="/", start_new_session=True)


def main(path: str, source: str) -> None:
    from host_agent.view.unmounting import unmount

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while os.read(0, 64):
        pass
    unmount(path, source)


if __name__ == "__main__":
    main(*sys.argv[1:])
