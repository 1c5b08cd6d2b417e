"""The kernel's own header of the FUSE ABI, where it is installed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

HEADER = Path("/usr/include/linux/fuse.h")
needs_header = pytest.mark.skipif(not HEADER.exists(), reason="linux-libc-dev is not installed")

WIDTH = {"uint64_t": 8, "int64_t": 8, "uint32_t": 4, "int32_t": 4, "uint16_t": 2, "char": 1}


def header_structs() -> dict[str, int]:
    """Size in bytes of each struct of the header. Padding is explicit there, so it is the sum of its fields."""
    text = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.DOTALL)
    sizes: dict[str, int] = {}
    for name, body in re.findall(r"struct (\w+) \{(.*?)\n\};", text, re.DOTALL):
        size = 0
        for kind, count in re.findall(r"(\w+)\s+\w+(\[\w*\])?;", body):
            number = 1 if not count else int(count[1:-1] or 0)
            size += number * (WIDTH[kind] if kind in WIDTH else sizes[kind])
        sizes[name] = size
    return sizes
