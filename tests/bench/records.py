"""A report as JSON: a dataclass and what is in it, nothing more and nothing less.

The law: ``load`` refuses what is not what ``dump`` writes, so that who compares two runs can trust their fields.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

DataclassT = TypeVar("DataclassT")


def dump(record: Any) -> str:
    """``record``: a dataclass of dataclasses, lists, dicts, strings and numbers."""
    return json.dumps(dataclasses.asdict(record), indent=1) + "\n"


def load(kind: type[DataclassT], text: str, number: int) -> DataclassT:
    """The ``kind`` that ``dump`` wrote, whose field ``format`` is ``number``; raises ``ValueError`` for anything else."""
    values = json.loads(text)
    if not isinstance(values, dict) or values.get("format") != number:
        raise ValueError(f"not a report of format {number}")
    return _load(kind, values)


def _load(kind: type[DataclassT], values: object) -> DataclassT:
    if not isinstance(values, dict):
        raise ValueError(f"{kind.__name__} is {values!r}")  # noqa: TRY004
    hints = get_type_hints(kind)
    if values.keys() != hints.keys():
        raise ValueError(f"{kind.__name__} has other fields: {sorted(values.keys() ^ hints.keys())}")
    return kind(**{name: _convert(hint, values[name], name) for name, hint in hints.items()})


def _convert(hint: Any, value: object, name: str) -> object:
    if get_origin(hint) is list and isinstance(value, list):
        return [_convert(get_args(hint)[0], item, name) for item in value]
    if get_origin(hint) is dict and isinstance(value, dict):
        return {key: _convert(get_args(hint)[1], item, name) for key, item in value.items()}
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _load(hint, value)
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise ValueError(f"{name} is {value!r}")
    return value
