"""Small files that are either whole or not there, and records kept in them as JSON."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

RecordT = TypeVar("RecordT")


def write_atomically(path: Path, content: bytes, mode: int = 0o600, *, inherit: bool = False) -> None:
    """Replace ``path`` with ``content``; after a crash it holds the old content or the new, whole.

    With ``inherit``, an existing file passes its mode and, where possible, its owner on to the new one.
    Raises ``OSError``; the old file is then untouched.
    """
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            if inherit:
                mode = _inherit(path, file.fileno(), mode)
            os.fchmod(file.fileno(), mode)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(temporary).unlink()
        raise


def _inherit(path: Path, descriptor: int, mode: int) -> int:
    """Give the file of ``descriptor`` the owner of ``path``; the mode of ``path``, or ``mode`` without one."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return mode
    with contextlib.suppress(PermissionError):
        os.fchown(descriptor, status.st_uid, status.st_gid)
    return status.st_mode & 0o7777


def parse_record(cls: type[RecordT], content: bytes) -> RecordT:
    """The dataclass ``cls``, of plain fields, from its JSON object.

    Raises ``ValueError`` with a clause: a power cut may damage such files.
    """
    values = parse_json(content)
    if not isinstance(values, dict):
        raise ValueError("it is not a JSON object")  # noqa: TRY004 (the content is wrong, not our call)
    hints = get_type_hints(cls)
    for field in fields(cls):  # type: ignore[arg-type]
        if not _is_plain(values.get(field.name, field.default), hints[field.name]):
            raise ValueError(f"{field.name} is not there or not what it should be")
    try:
        return cls(**values)
    except TypeError as error:
        raise ValueError(str(error).partition("() ")[2] or str(error)) from None


def parse_json(content: bytes) -> Any:
    """What is in ``content``. Raises ``ValueError`` with a clause."""
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _is_plain(value: object, expected: Any) -> bool:
    # To Python a bool is an int and an int is no float; to whoever wrote the file neither is so.
    allowed = (float, int) if expected is float else expected
    return isinstance(value, allowed) and (not isinstance(value, bool) or expected is bool)
