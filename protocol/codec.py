"""Dataclasses to msgpack-able arrays and back, strictly.

A dataclass is the array of its fields in order. The law that lets two versions talk: missing trailing
fields take their defaults, surplus trailing ones are ignored; anything else that differs from the
declaration is a ``DecodeError`` that names ``Class.field``. Nothing is coerced, with one exception:
an int is good where a float is declared. A bool is not an int.

Field types: ``int``, ``float``, ``str``, ``bytes``, ``bool``, ``object`` (taken as it comes),
``list[T]``, ``dict[str, str]``, ``T | None``, string enums and nested dataclasses. The converters of a
class are built when it is first used; afterwards a message costs one pass over its fields, because
Python in an emulated guest is 10 to 20 times slower than here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from enum import StrEnum
from functools import cache
from operator import attrgetter
from types import NoneType, UnionType
from typing import Any, Final, TypeVar, Union, dataclass_transform, get_args, get_origin, get_type_hints

from protocol.errors import DecodeError

T = TypeVar("T")
# (wire value, "Class.field") -> Python value
_Decoder = Callable[[Any, str], Any]
# None stands for "goes on the wire as it is", so that plain fields cost nothing.
_Encoder = Callable[[Any], Any] | None

_EXACT: Final = (int, str, bytes, bool)
"""Types of fields of which a value is taken as it is, or not at all."""


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def record(cls: type[T]) -> type[T]:
    """A slotted dataclass of which mypy says that it is frozen, and Python does not: to make a frozen one takes three
    times as long, and of these thousands are made in a second."""
    return dataclasses.dataclass(slots=True, unsafe_hash=True)(cls)


def encode(message: Any) -> list[Any]:
    """The fields of a dataclass instance, ready for msgpack."""
    record: Any = type(message)  # mypy does not take type[Any] for hashable
    fields: list[Any] = _record_encoder(record)(message)
    return fields


def decode(cls: type[T], value: object) -> T:
    """The instance of the dataclass ``cls`` that ``value`` describes. Raises ``DecodeError``."""
    record: Any = cls  # (as above)
    message: T = _record_decoder(record)(value, cls.__name__)
    return message


def _wrong(where: str, expected: str, value: object) -> DecodeError:
    return DecodeError(f"{where}: expected {expected}, got {type(value).__name__}")


def _field_types(cls: Any) -> list[tuple[dataclasses.Field[Any], Any]]:
    if not dataclasses.is_dataclass(cls):
        raise TypeError(f"{cls!r} is not a dataclass")
    hints = get_type_hints(cls)
    return [(field, hints[field.name]) for field in dataclasses.fields(cls)]


def _optional(tp: Any) -> Any | None:
    """``T`` of ``T | None``; None for any other type."""
    if get_origin(tp) not in (Union, UnionType):
        return None
    members = [member for member in get_args(tp) if member is not NoneType]
    if len(members) != 1 or len(get_args(tp)) != 2:
        raise TypeError(f"unsupported union {tp!r}")
    return members[0]


# --- to the wire -----------------------------------------------------------------------------------


@cache
def _record_encoder(cls: Any) -> Callable[[Any], list[Any]]:
    fields = _field_types(cls)
    names = [field.name for field, _ in fields]
    encoders = [(index, encoder) for index, (_, tp) in enumerate(fields) if (encoder := _encoder(tp))]
    values = _getter(names)
    if not encoders:
        return values

    def encode_record(message: Any) -> list[Any]:
        row = values(message)
        for index, encoder in encoders:
            row[index] = encoder(row[index])
        return row

    return encode_record


def _getter(names: list[str]) -> Callable[[Any], list[Any]]:
    """Like ``attrgetter``, but always a list."""
    if len(names) < 2:
        return lambda message: [getattr(message, name) for name in names]
    getter = attrgetter(*names)
    return lambda message: list(getter(message))


def _encoder(tp: Any) -> _Encoder:
    if (inner := _optional(tp)) is not None:
        return _optional_encoder(_encoder(inner))
    if get_origin(tp) is list:
        return _list_encoder(_encoder(get_args(tp)[0]))
    if dataclasses.is_dataclass(tp) and isinstance(tp, type):
        return _record_encoder(tp)
    if isinstance(tp, type) and issubclass(tp, StrEnum):
        return attrgetter("value")
    _plain_decoder(tp)  # raises TypeError for a type that could not be read back
    return None


def _optional_encoder(encoder: _Encoder) -> _Encoder:
    if encoder is None:
        return None
    return lambda value: None if value is None else encoder(value)


def _list_encoder(encoder: _Encoder) -> _Encoder:
    if encoder is None:
        return None
    return lambda values: [encoder(value) for value in values]


# --- from the wire ---------------------------------------------------------------------------------


@cache
def _record_decoder(cls: Any) -> _Decoder:
    fields = _field_types(cls)
    missing = dataclasses.MISSING
    required = sum(field.default is missing and field.default_factory is missing for field, _ in fields)
    columns = [(_decoder(tp), f"{cls.__name__}.{field.name}") for field, tp in fields]
    # Most of what comes by the thousand has nothing but these, and is taken as it is.
    exact = [tp for _, tp in fields if tp in _EXACT]
    exact = exact if len(exact) == len(fields) else [None]

    def decode_record(value: Any, where: str) -> Any:
        if type(value) is list and [*map(type, value)] == exact:
            return cls(*value)
        if type(value) is not list:
            raise _wrong(where, f"an array for {cls.__name__}", value)
        if len(value) < required:
            raise DecodeError(f"{columns[len(value)][1]}: missing")
        # zip stops at the shorter one, which is exactly the law of change.
        return cls(*[convert(item, name) for (convert, name), item in zip(columns, value, strict=False)])

    return decode_record


def _decoder(tp: Any) -> _Decoder:
    if (inner := _optional(tp)) is not None:
        return _optional_decoder(_decoder(inner))
    if get_origin(tp) is list:
        return _list_decoder(_decoder(get_args(tp)[0]))
    if dataclasses.is_dataclass(tp) and isinstance(tp, type):
        return _record_decoder(tp)
    if isinstance(tp, type) and issubclass(tp, StrEnum):
        return _enum_decoder(tp)
    return _plain_decoder(tp)


def _plain_decoder(tp: Any) -> _Decoder:
    if tp is object:
        return lambda value, where: value
    if tp is float:
        return _decode_float
    if tp in _EXACT:
        return _exact_decoder(tp)
    if get_origin(tp) is dict and get_args(tp) == (str, str):
        return _decode_text_map
    raise TypeError(f"unsupported field type {tp!r}")


def _exact_decoder(tp: type) -> _Decoder:
    def decode_exact(value: Any, where: str) -> Any:
        if type(value) is not tp:
            raise _wrong(where, tp.__name__, value)
        return value

    return decode_exact


def _decode_float(value: Any, where: str) -> float:
    if type(value) is float:
        return value
    if type(value) is int:
        return float(value)
    raise _wrong(where, "float", value)


def _decode_text_map(value: Any, where: str) -> dict[str, str]:
    if type(value) is not dict:
        raise _wrong(where, "a map", value)
    for key, item in value.items():
        if type(key) is not str or type(item) is not str:
            raise _wrong(where, "a map of str to str", key if type(key) is not str else item)
    return value


def _enum_decoder(tp: type[StrEnum]) -> _Decoder:
    members = {member.value: member for member in tp}

    def decode_enum(value: Any, where: str) -> StrEnum:
        if type(value) is not str:
            raise _wrong(where, "str", value)
        try:
            return members[value]
        except KeyError:
            raise DecodeError(f"{where}: no {tp.__name__} is called {value[:64]!r}") from None

    return decode_enum


def _optional_decoder(decoder: _Decoder) -> _Decoder:
    return lambda value, where: None if value is None else decoder(value, where)


def _list_decoder(decoder: _Decoder) -> _Decoder:
    def decode_list(value: Any, where: str) -> list[Any]:
        if type(value) is not list:
            raise _wrong(where, "an array", value)
        return [decoder(item, where) for item in value]

    return decode_list
