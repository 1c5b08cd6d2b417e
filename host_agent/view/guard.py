"""``python -m host_agent.view.guard PATH``: takes the view at PATH off when the process that serves it has ended.

It waits for the end of its standard input, which that process holds open, and for nothing else: so whatever kills that
one, a segmentation fault or a SIGKILL, nobody is left with a folder that answers "Transport endpoint is not connected".
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import Final

PROGRAM: Final = (sys.executable, "-m", "host_agent.view.guard")


def start(path: str) -> subprocess.Popen[bytes]:
    """To be called before anything is mounted. Its input ends with this process."""
    return subprocess.Popen([*PROGRAM, path], stdin=subprocess.PIPE, cwd="/", start_new_session=True)


def main(path: str) -> None:
    from host_agent.view.unmounting import unmount

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while os.read(0, 64):
        pass
    unmount(path)


if __name__ == "__main__":
    main(sys.argv[1])
