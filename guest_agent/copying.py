"""The guest's end of ``agentctl cp``: ``python3 -m guest_agent.copying`` and

  send PATH... | receive [--single] PATH           all of it, whatever is there
  offer [--total] -- PATH...                       what the other side does not have, which answers on stdin
  take [--single] -- PATH                          what is not here, which is answered on stdout

A process of its own, as the user whose files they are; the records of ``protocol.treecopy`` are on its stdout or
stdin. It says what it cannot copy on stderr, a line each, and then ends with 1. The law: when it is hung up on,
nothing that it had begun is left behind but parts of large files, which another attempt goes on with.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from typing import Final, NoReturn

from protocol.errors import DecodeError
from protocol.treecopy import MAX_PIECE, Cut
from protocol.treereceive import CannotReceive, Receiver
from protocol.treesend import Sender
from protocol.treesurvey import Survey

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


def _send(
    paths: list[str], problems: _Problems, *, asking: bool = False, total: bool = False, packed: bool = False
) -> None:
    named = [os.path.expanduser(path) for path in paths]
    with contextlib.ExitStack() as stack:
        answers = stack.enter_context(open(sys.stdin.fileno(), "rb", closefd=False)) if asking else None
        survey = stack.enter_context(Survey(named)) if total else None
        out = sys.stdout.fileno()
        if packed:
            from protocol import packedfile

            stream = stack.enter_context(packedfile.writer(out, closefd=False))
        else:
            stream = stack.enter_context(open(out, "wb", MAX_PIECE, closefd=False))
        sender = Sender(stream, problems.tell, answers=answers, survey=survey)
        try:
            for path in named:
                sender.send(path)
        except Cut:
            raise BrokenPipeError from None  # who answers no more has a reason, and tells it
        sender.finish()


def _receive(
    destination: str, problems: _Problems, *, single: bool, answering: bool = False, packed: bool = False
) -> None:
    with contextlib.ExitStack() as stack:
        answers = stack.enter_context(open(sys.stdout.fileno(), "wb", closefd=False)) if answering else None
        into = sys.stdin.fileno()
        if packed:
            from protocol import packedfile

            stream = stack.enter_context(packedfile.reader(into, closefd=False))
        else:
            stream = stack.enter_context(open(into, "rb", MAX_PIECE, closefd=False))
        place = os.path.expanduser(destination)
        Receiver(stream, place, problems.tell, single=single, answers=answers).run()


def main(arguments: list[str]) -> int:
    for number in _ENDING:
        signal.signal(number, _end)
    problems = _Problems()
    packed = arguments[:1] in (["offer"], ["take"]) and arguments[1:2] == ["--packed"]
    if packed:
        del arguments[1]
    try:
        match arguments:
            case ["send", *paths]:
                _send(paths, problems)
            case ["offer", "--total", "--", *paths]:
                _send(paths, problems, asking=True, total=True, packed=packed)
            case ["offer", "--", *paths]:
                _send(paths, problems, asking=True, packed=packed)
            case ["receive", "--single", destination]:
                _receive(destination, problems, single=True)
            case ["receive", destination]:
                _receive(destination, problems, single=False)
            case ["take", "--single", "--", destination]:
                _receive(destination, problems, single=True, answering=True, packed=packed)
            case ["take", "--", destination]:
                _receive(destination, problems, single=False, answering=True, packed=packed)
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
