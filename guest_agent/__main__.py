"""``python3 -m guest_agent``: the agent of a VM, on its virtio-serial port."""

from __future__ import annotations

import logging
import sys
from typing import Final

from guest_agent.agent import run
from guest_agent.transports import PORTS, run_agent

CONTROL_PORT: Final = PORTS / "org.agentctl.control"


def main(arguments: list[str]) -> int:
    logging.getLogger("pyroute2").setLevel(logging.WARNING)  # 0.9 logs every netlink message
    return run_agent(arguments, "guest_agent", CONTROL_PORT, run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
