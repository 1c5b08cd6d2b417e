"""``python3 -m guest_agent``: the agent of a VM, on its virtio-serial port.

Options are few and read by hand: importing argparse takes a tenth of a second in an emulated guest.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import trio

from guest_agent.agent import OpenTransport, port_transport, run, unix_transport

CONTROL_PORT = Path("/dev/virtio-ports/org.agentctl.control")

USAGE = """usage: python3 -m guest_agent [PORT | --connect-unix PATH]

  PORT                 a virtio-serial port (default: /dev/virtio-ports/org.agentctl.control)
  --connect-unix PATH  a unix socket that stands in for the port

AGENTCTL_LOG=debug logs every stream and process."""


def transport_of(arguments: list[str]) -> OpenTransport:
    """The transport that the command line asks for. Raises ``ValueError``."""
    match arguments:
        case []:
            return port_transport(CONTROL_PORT)
        case ["--connect-unix", path]:
            return unix_transport(Path(path))
        case [path] if not path.startswith("-"):
            return port_transport(Path(path))
    raise ValueError(USAGE)


def main(arguments: list[str]) -> int:
    try:
        open_transport = transport_of(arguments)
    except ValueError as usage:
        print(usage, file=sys.stderr)
        return 2
    level = logging.DEBUG if os.environ.get("AGENTCTL_LOG") == "debug" else logging.INFO
    logging.basicConfig(level=level, format="%(levelname)s %(name)s %(message)s", stream=sys.stderr)
    logging.getLogger("pyroute2").setLevel(logging.WARNING)  # 0.9 logs every netlink message
    trio.run(run, open_transport)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
