"""How a host that has lost its port comes to the agent of a VM all the same: over SSH.

    SSH ── sshd ── python3 -m guest_agent.ssh_door ··· hands its stdin and stdout over ···> the agent that runs

The law: whoever comes gets the agent that systemd keeps, or nothing; none is started for it. The folder with the socket
is root's alone, and so is the way there: sshd lets root in with the instance's key.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from guest_agent.remote.rundir import Place, RunDir
from protocol.build import digest

if TYPE_CHECKING:  # who hands stdio over does without trio, and is there sooner
    from collections.abc import AsyncIterator

    from guest_agent.remote.door import Door

log = logging.getLogger(__name__)

FOLDER: Final = Path("/run/agentctl/door")

PLANE: Final = "control"

PATIENCE: Final = 20.0
"""Seconds for an agent that was killed to be there again; the host waits a little longer."""

LOOK_AGAIN: Final = 0.2
"""Seconds."""

DONE: Final = 0
IMPOSSIBLE: Final = 3
"""The exit status, as those of ``guest_agent.remote``."""


@asynccontextmanager
async def opened(folder: Path) -> AsyncIterator[Door]:
    """What is handed over in ``folder``, from now on. Raises ``OSError`` or ``RunDirError`` if it cannot be had."""
    import trio

    from guest_agent.remote.door import Door

    RunDir(folder).make()
    async with trio.open_nursery() as nursery:
        door = Door(_place(folder).listen(), digest(), math.inf)
        nursery.start_soon(door.run)
        yield door
        nursery.cancel_scope.cancel()


def _place(folder: Path) -> Place:
    return RunDir(folder).plane(PLANE)


def main(folder: Path = FOLDER) -> int:
    """Hand this process's stdin and stdout to the agent; returns when that has done with them."""
    from guest_agent.remote.connector import CannotConnect, hand_over, is_hung_up, stay
    from guest_agent.remote.handover import Offer

    offer = Offer(digest(), math.inf).encode()
    deadline = time.monotonic() + PATIENCE
    try:
        while time.monotonic() < deadline and not is_hung_up():
            if (connection := hand_over(_place(folder), offer, deadline)) is not None:
                with connection:
                    stay(connection)
                return DONE
            time.sleep(LOOK_AGAIN)
    except ConnectionError:
        return DONE  # the agent was killed
    except (CannotConnect, OSError) as error:
        print(error, file=sys.stderr)
        return IMPOSSIBLE
    print(f"the guest agent does not run, or does not answer within {PATIENCE:.0f} s", file=sys.stderr)
    return IMPOSSIBLE


if __name__ == "__main__":
    sys.exit(main(*(Path(word) for word in sys.argv[1:2])))
