"""Sizes as people write and read them: ``4``, ``4GiB``, ``512M`` are bytes, and back."""

from __future__ import annotations

import re

_UNITS = {"": 30, "b": 0, "k": 10, "m": 20, "g": 30, "t": 40}
_PATTERN = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(?:i?b)?|(b))?", re.IGNORECASE)


#: Sizes are 64-bit numbers in the kernel's interfaces; nothing that is asked for comes near.
LIMIT = 1 << 62


def parse(text: str) -> int:
    """Bytes of a size like ``4`` (GiB when there is no unit), ``4GiB``, ``4g``, ``512MB`` (binary units).

    Raises ``ValueError`` with a sentence.
    """
    match = _PATTERN.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a size; write it like 4GiB or 512MiB")
    number, unit, plain = match.groups()
    size = float(number) * (1 << _UNITS[(unit or plain or "").lower()])
    if size >= LIMIT:
        raise ValueError(f"{text!r} is more than any machine has")
    return int(size)


def flag(size: int) -> str:
    """``60GiB``: a size as ``parse`` reads it back, exactly."""
    for unit, suffix in ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if size % unit == 0 and size >= unit:
            return f"{size // unit}{suffix}"
    return f"{size}B"


def show(size: float) -> str:
    """``4 GiB``, ``1.5 GiB``, ``512 MiB``: at most one decimal, and none where it says nothing."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = 0
    # Not 1024: what rounds to 1024.0 is one of the next unit.
    while size >= 1023.95 and power < len(units) - 1:
        size /= 1024
        power += 1
    return f"{size:.1f}".removesuffix(".0") + f" {units[power]}"
