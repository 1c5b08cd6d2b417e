from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import api, codec
from protocol.errors import DecodeError


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True, slots=True)
class Point:
    x: int
    y: int = 0


@dataclass(frozen=True, slots=True)
class Everything:
    whole: int
    real: float
    text: str
    raw: bytes
    flag: bool
    numbers: list[int]
    points: list[Point]
    labels: dict[str, str]
    colour: Colour
    point: Point
    maybe: Point | None = None
    maybe_text: str | None = None
    shades: list[Colour] = field(default_factory=list)
    anything: object = None


SAMPLE = Everything(
    whole=7,
    real=1.5,
    text="ü",
    raw=b"\xff",
    flag=True,
    numbers=[1, 2],
    points=[Point(1, 2)],
    labels={"a": "b"},
    colour=Colour.BLUE,
    point=Point(3, 4),
    maybe=Point(5, 6),
    maybe_text="t",
    shades=[Colour.RED],
    anything=[1, {}],
)
WIRE = [
    7,
    1.5,
    "ü",
    b"\xff",
    True,
    [1, 2],
    [[1, 2]],
    {"a": "b"},
    "blue",
    [3, 4],
    [5, 6],
    "t",
    ["red"],
    [1, {}],
]


def test_fields_go_in_order_and_enums_as_plain_text() -> None:
    assert codec.encode(SAMPLE) == WIRE
    assert type(codec.encode(SAMPLE)[8]) is str


def test_and_come_back() -> None:
    decoded = codec.decode(Everything, WIRE)
    assert decoded == SAMPLE
    assert isinstance(decoded.colour, Colour)


def test_none_is_for_optional_fields() -> None:
    bare = Everything(1, 1.0, "", b"", False, [], [], {}, Colour.RED, Point(0))
    assert codec.decode(Everything, codec.encode(bare)) == bare


def test_missing_trailing_fields_take_their_defaults() -> None:
    assert codec.decode(Point, [1]) == Point(1, 0)
    assert codec.decode(Everything, WIRE[:10]).shades == []


def test_surplus_trailing_fields_are_ignored() -> None:
    assert codec.decode(Point, [1, 2, "news from a later version"]) == Point(1, 2)


def test_a_record_without_fields() -> None:
    assert codec.encode(api.Done()) == []
    assert codec.decode(api.Done, []) == api.Done()


def test_an_int_is_good_for_a_float() -> None:
    decoded = codec.decode(Everything, [7, 2, *WIRE[2:]])
    assert decoded.real == 2.0
    assert type(decoded.real) is float


@pytest.mark.parametrize(
    ("index", "value", "complaint"),
    [
        (0, True, "Everything.whole: expected int, got bool"),
        (0, 1.0, "Everything.whole: expected int, got float"),
        (1, "1", "Everything.real: expected float, got str"),
        (1, True, "Everything.real: expected float, got bool"),
        (2, b"x", "Everything.text: expected str, got bytes"),
        (3, "x", "Everything.raw: expected bytes, got str"),
        (4, 1, "Everything.flag: expected bool, got int"),
        (5, 3, "Everything.numbers: expected an array, got int"),
        (5, [1, "2"], "Everything.numbers: expected int, got str"),
        (6, [[1, "2"]], "Point.y: expected int, got str"),
        (6, [7], "Everything.points: expected an array for Point, got int"),
        (7, {"a": 1}, "Everything.labels: expected a map of str to str, got int"),
        (7, [], "Everything.labels: expected a map, got list"),
        (8, "green", "Everything.colour: no Colour is called 'green'"),
        (8, [], "Everything.colour: expected str, got list"),
        (9, None, "Everything.point: expected an array for Point, got NoneType"),
        (9, [], "Point.x: missing"),
        (10, [None], "Point.x: expected int, got NoneType"),
        (11, 1, "Everything.maybe_text: expected str, got int"),
    ],
)
def test_a_wrong_shape_is_named(index: int, value: object, complaint: str) -> None:
    wire = [*WIRE[:index], value, *WIRE[index + 1 :]]
    with pytest.raises(DecodeError) as caught:
        codec.decode(Everything, wire)
    assert str(caught.value) == complaint


def test_the_record_itself_must_be_an_array() -> None:
    with pytest.raises(DecodeError, match="Point: expected an array"):
        codec.decode(Point, {"x": 1})
    with pytest.raises(DecodeError, match=r"Everything\.point: missing"):
        codec.decode(Everything, WIRE[:9])


@dataclass(frozen=True, slots=True)
class Unsupported:
    value: int | str


@dataclass(frozen=True, slots=True)
class UnsupportedSet:
    value: set[int]


@pytest.mark.parametrize("cls", [Unsupported, UnsupportedSet, int])
def test_a_type_that_cannot_travel_is_a_bug_here(cls: type) -> None:
    with pytest.raises(TypeError):
        codec.decode(cls, [1])


wire_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=20,
)


@given(wire_values)
def test_anything_decodes_or_is_a_decode_error(value: object) -> None:
    for cls in (api.Listeners, api.InstanceStatus, api.Exec, Everything):
        try:
            decoded = codec.decode(cls, value)
        except DecodeError:
            continue
        assert codec.decode(cls, codec.encode(decoded)) == decoded


messages = st.one_of(
    st.from_type(api.Listeners),
    st.from_type(api.InstanceStatus),
    st.from_type(api.Exec),
    st.from_type(api.Event),
    st.from_type(api.Forwards),
    st.from_type(api.UseHostNetwork),
)


@given(messages)
def test_every_message_comes_back_as_it_was(message: object) -> None:
    decoded = codec.decode(type(message), codec.encode(message))
    assert codec.encode(decoded) == codec.encode(message)  # not ==: there may be a NaN
    assert repr(decoded) == repr(message)
