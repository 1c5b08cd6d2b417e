"""States of machines that are tables, and what happens to them."""

from __future__ import annotations

from enum import Enum


class TableKey(Enum):
    """An ``Enum`` that is looked up for each frame: ``Enum``'s own hash is Python code, as slow as all else of that."""

    __hash__ = object.__hash__  # equality of members is identity, too
