"""``agentctl open``: what listens in the VM, in the browser of this machine."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress

from host_agent.errors import ExitCode, UserError
from host_agent.rules import EVERYWHERE, LOCALHOST
from protocol.api import Forward, ForwardState, Proto

#: A program that finds no browser says so within this time, seconds; one that has found one may stay with it.
PATIENCE = 2.0


def url(rows: Sequence[Forward], port: int) -> str:
    """Where ``port`` is: that of the host, or else the guest's. Raises ``UserError`` if it is nowhere."""
    tcp = [row for row in rows if row.proto is Proto.TCP]
    found = [row for row in tcp if row.host_port == port] or [row for row in tcp if row.guest_port == port]
    for row in found:
        if row.state is ForwardState.LISTENING and row.host_port:
            host = LOCALHOST if row.host_address == EVERYWHERE else row.host_address
            return f"http://[{host}]:{row.host_port}" if ":" in host else f"http://{host}:{row.host_port}"
    if not found:
        raise UserError(f"nothing in the VM listens on port {port}", "see: agentctl ports")
    row = found[0]
    if row.state is ForwardState.LISTENING:
        raise UserError(f"port {port} is at a unix socket, which no browser opens: {row.host_address}")
    raise UserError(
        f"port {port} is not on this machine: {row.reason or row.state.value}", "see: agentctl ports --all"
    )


def show(address: str) -> None:
    """Open ``address`` in the user's browser. Raises ``UserError``."""
    program = "open" if sys.platform == "darwin" else "xdg-open"
    path = shutil.which(program)
    if path is None:
        raise UserError(f"there is no {program} here", f"open it yourself: {address}", ExitCode.DEPENDENCY)
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(
        [path, address], stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True
    )
    with suppress(subprocess.TimeoutExpired):
        if process.wait(PATIENCE) != 0:
            raise UserError(f"{program} found no browser", f"open it yourself: {address}")
