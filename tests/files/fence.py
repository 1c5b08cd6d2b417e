"""Waiting, in a program of the guest, until all that it was answered for is on the host: as the guest agent does before it
says anything (``guest_agent.fence``). Only the standard library: it is imported by programs that are run by path, too."""

from __future__ import annotations

import struct
import time

_NUMBERS = struct.Struct("=QQ")


def wait_landed(fence: str, patience: float = 60.0) -> None:
    """``fence``: the file, "" for none. Raises ``TimeoutError``."""
    if not fence:
        return
    end = time.monotonic() + patience
    with open(fence, "rb", buffering=0) as file:
        mark, landed = _NUMBERS.unpack(file.read(_NUMBERS.size))
        while landed < mark:
            if time.monotonic() > end:
                raise TimeoutError(f"what was answered is not on the host: {landed} of {mark}")
            time.sleep(0.0002)
            file.seek(0)
            _, landed = _NUMBERS.unpack(file.read(_NUMBERS.size))
