"""What the command line prints for programs; without rich, which takes its time."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Any

from host_agent import kind
from protocol.api import InstanceStatus


def as_json(value: Any) -> None:
    """Print ``value`` (of dataclasses, lists, enums) as one JSON document."""
    json.dump(kind.in_json(value), sys.stdout, indent=2, default=str)
    sys.stdout.write("\n")


def as_line(value: Any) -> None:
    """Print ``value`` as a line of its own, at once."""
    sys.stdout.write(json.dumps(kind.in_json(value)) + "\n")
    sys.stdout.flush()


def status_json(status: InstanceStatus) -> None:
    as_json(asdict(status))
