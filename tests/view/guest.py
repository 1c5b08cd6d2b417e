"""The process that serves the view, with what there is to see read from a file: ``python -m tests.view.guest FILE ...``.

FILE is a JSON array of places, as their dataclass has them; a new one is taken up within a moment.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

from guest_agent.transports import run_agent
from guest_agent.view.agent import VIEW_PORT, run
from guest_agent.view.places import Place
from guest_agent.view.watching import Watch


def read(path: Path) -> list[Place]:
    found = []
    for each in json.loads(path.read_text()):
        layers, hidden = tuple(each.pop("layers", ())), tuple(each.pop("hidden", ()))
        found.append(Place(**each, layers=layers, hidden=hidden))
    return found


def main(path: str, *arguments: str) -> int:
    watch = Watch(partial(read, Path(path)), [])
    return run_agent(list(arguments), "tests.view.guest", VIEW_PORT, partial(run, watch=watch))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
