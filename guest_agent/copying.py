"""The guest's end of ``agentctl cp``: ``python3 -m guest_agent.copying send PATH... | receive [--single] PATH``.

A process of its own, as the user whose files they are; the records of ``protocol.treecopy`` are on its stdout or
stdin. It says what it cannot copy on stderr, a line each, and then ends with 1. The law: when it is hung up on,
nothing that it had begun is left behind.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Final, NoReturn

from protocol.errors import DecodeError
from protocol.treecopy import MAX_PIECE, Cut
from protocol.treereceive import CannotReceive, Receiver
from protocol.treesend import Sender

#: How its command line begins; what comes before is the interpreter.
MODULE: Final = "guest_agent.copying"
_PROBLEMS: Final = 1
_ENDING: Final = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)


class _Problems:
    """What could not be copied; ``count`` of them."""

    def __init__(self) -> None:
        self.count = 0

    def tell(self, path: str, reason: str) -> None:
        self.count += 1
        self.say(f"{path}: {reason}")

    def say(self, text: str) -> None:
        """On one line, whatever characters a name has."""
        line = text.replace("\n", "\\n")
        sys.stderr.buffer.write(os.fsencode(line) + b"\n")
        sys.stderr.buffer.flush()


def _end(number: int, _: object) -> NoReturn:
    raise SystemExit(128 + number)


def _send(paths: list[str], problems: _Problems) -> None:
    with open(sys.stdout.fileno(), "wb", MAX_PIECE, closefd=False) as stream:
        sender = Sender(stream, problems.tell)
        for path in paths:
            sender.send(os.path.expanduser(path))
        sender.finish()


def _receive(destination: str, problems: _Problems, *, single: bool) -> None:
    with open(sys.stdin.fileno(), "rb", MAX_PIECE, closefd=False) as stream:
        Receiver(stream, os.path.expanduser(destination), problems.tell, single=single).run()


def main(arguments: list[str]) -> int:
    for number in _ENDING:
        signal.signal(number, _end)
    problems = _Problems()
    try:
        match arguments:
            case ["send", *paths]:
                _send(paths, problems)
            case ["receive", "--single", destination]:
                _receive(destination, problems, single=True)
            case ["receive", destination]:
                _receive(destination, problems, single=False)
            case _:
                problems.tell(MODULE, f"unknown words {arguments}")
    except BrokenPipeError:
        return _PROBLEMS  # nobody wants the rest
    except (CannotReceive, Cut, DecodeError) as error:
        problems.say(str(error))
        return _PROBLEMS
    return _PROBLEMS if problems.count else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
