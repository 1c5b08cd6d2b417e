"""``python3 -m guest_agent.view``: serves the guest's files to the host, on its virtio-serial port."""

from __future__ import annotations

import sys

from guest_agent.transports import run_agent
from guest_agent.view.agent import VIEW_PORT, run


def main(arguments: list[str]) -> int:
    return run_agent(arguments, "guest_agent.view", VIEW_PORT, run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
