"""``python3 agent.pyz COMMAND``: what a host runs over SSH on a machine that is not a VM of ours.

  check [--nonce N]                             what the machine can do, as one line
  connect PLANE SESSION [--grace SECONDS]       be the transport of a plane's agent (control, files, view)
  end SESSION                                   end the agents of a session, and leave nothing of them
  copying ...                                   the far end of a copy (guest_agent.copying)

Exit status: 0; 2 for a command line that makes no sense; 3 if what was asked for cannot be, with a sentence on stderr.
Nothing but its answer is ever written to stdout.
"""

from __future__ import annotations

import sys
from typing import Final

DONE: Final = 0
USAGE: Final = 2
IMPOSSIBLE: Final = 3

GRACE: Final = 600.0
"""Seconds that agents wait for their host to come back, if it does not say."""


def main(argv: list[str]) -> int:
    """``argv``: without the program's name. Returns the exit status."""
    # Each imports what it needs: a command of which the connection waits does not wait for another's modules.
    match argv:
        case ["check"]:
            return _check("")
        case ["check", "--nonce", nonce]:
            return _check(nonce)
        case ["connect", "control" | "files" | "view" as plane, session]:
            return _connect(plane, session, str(GRACE))
        case ["connect", "control" | "files" | "view" as plane, session, "--grace", seconds]:
            return _connect(plane, session, seconds)
        case ["end", session]:
            return _end(session)
        case ["copying", *arguments]:
            from guest_agent import copying

            return copying.main(arguments)
        case ["daemon", "control" | "files" | "view" as plane, session, lock, listener]:
            from guest_agent.remote import daemon

            return daemon.main(plane, session, int(lock), int(listener))
    print(__doc__, file=sys.stderr)
    return USAGE


def _check(nonce: str) -> int:
    from guest_agent.remote import capabilities

    print(capabilities.line(nonce), flush=True)
    return DONE


def _connect(plane: str, session: str, seconds: str) -> int:
    from guest_agent.remote.connector import CannotConnect, connect
    from guest_agent.remote.handover import parse_grace

    try:
        grace = parse_grace(seconds)
    except ValueError as error:
        print(error, file=sys.stderr)
        return USAGE
    try:
        connect(session, plane, grace)
    except CannotConnect as error:
        print(error, file=sys.stderr)
        return IMPOSSIBLE
    return DONE


def _end(session: str) -> int:
    from guest_agent.remote.ending import CannotEnd, end

    try:
        end(session)
    except CannotEnd as error:
        print(error, file=sys.stderr)
        return IMPOSSIBLE
    return DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
