"""``python3 -m guest_agent [--door FOLDER]``: the agent of a VM, on its virtio-serial port.

It takes another transport in the folder (``ssh_door``): the usual one, if it is on the usual port and none is named.
"""

from __future__ import annotations

import logging
import sys
from functools import partial
from pathlib import Path
from typing import Final

from guest_agent import ssh_door
from guest_agent.agent import run
from guest_agent.transports import PORTS, run_agent

CONTROL_PORT: Final = PORTS / "org.agentctl.control"


def main(arguments: list[str]) -> int:
    door = None if arguments else ssh_door.FOLDER
    if arguments[:1] == ["--door"] and len(arguments) > 1:
        door, arguments = Path(arguments[1]), arguments[2:]
    logging.getLogger("pyroute2").setLevel(logging.WARNING)  # 0.9 logs every netlink message
    return run_agent(arguments, "guest_agent", CONTROL_PORT, partial(run, door=door))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
