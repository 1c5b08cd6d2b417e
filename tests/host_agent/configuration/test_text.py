"""What YAML means here: what stands in the file, with its line, and nothing that surprises."""

from __future__ import annotations

import pytest

from host_agent.configuration.text import MAX_TEXT, InvalidText, decode, parse


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("FALSE", False),
        ("~", None),
        ("", None),
        ("null", None),
        ("010", 10),
        ("0o10", 8),
        ("0x1F", 31),
        ("-3", -3),
        ("1.5", 1.5),
        ("1e3", 1000.0),
        ("1_000", "1_000"),
        ("12:30:45", "12:30:45"),
        ("2024-01-31", "2024-01-31"),
        ("8000-8010", "8000-8010"),
        ("192.0.2.53", "192.0.2.53"),
        ("4GiB", "4GiB"),
        ("=", "="),
        ("<<", "<<"),
        ("9" * 5000, "9" * 5000),
        ("'4'", "4"),
        ('"\\u00e9"', "é"),
        ("|\n  a\n  b\n", "a\nb\n"),
    ],
)
def test_a_word_is_what_the_core_schema_has_it_for(word: str, value: object) -> None:
    found = parse(f"key: {word}\n").values["key"]
    assert found == value
    assert type(found) is type(value)


def test_everything_has_its_line_also_where_it_is_an_alias() -> None:
    document = parse("a: &x\n  b:\n  - 1\n  -\n    c: 2\nd: {e: 1,\n  f: 2}\ng: *x\n")
    assert document.values["g"] == document.values["a"] == {"b": [1, {"c": 2}]}
    lines = {("a",): 1, ("a", "b"): 2, ("a", "b", 0): 3, ("a", "b", 1, "c"): 5, ("d", "f"): 7, ("g",): 8}
    assert {path: document.line(path) for path in lines} == lines
    assert document.line(("a", "b", 1, "none", "deeper")) == document.line(("a", "b", 1))
    assert document.line(("none",)) == 0


@pytest.mark.parametrize(("text", "values"), [("", None), ("# a\n", None), ("---\na: 1\n", {"a": 1})])
def test_a_file_may_be_empty(text: str, values: object) -> None:
    assert parse(text).values == values


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("a: 1\nb: [\n", 3, "this is not YAML"),
        ("a: 1\n\tb: 2\n", 2, "this is not YAML"),
        ("a: 1\n---\nb: 2\n", 2, "this is not YAML: but found another document"),
        ("a: 1\nb: *c\n", 2, "undefined alias"),
        ("a: 1\nb: \x01\n", 2, "this is not YAML"),
        ("a: 1\nb: 2\na: 3\n", 3, "a is there twice; it is in line 1, too"),
        ("a:\n  b: 1\n  b: 2\n", 3, "b is there twice"),
        ("a: 1\nb: !secret x\n", 2, "is a tag"),
        ("a: 1\n? [x]\n: 2\n", 2, "a key is a list or a mapping"),
        ("a: 1\nb: " + "[" * 90 + "]" * 90, 2, "nested too deeply"),
        ("b: " + "[" * 50_000, 0, "nested too deeply"),
    ],
)
def test_what_cannot_be_has_a_line_and_a_reason(text: str, line: int, reason: str) -> None:
    with pytest.raises(InvalidText) as caught:
        parse(text)
    assert reason in str(caught.value)
    assert caught.value.line in (line, 0)


def test_a_bomb_is_refused_before_it_goes_off() -> None:
    lines = ["a0: &a0 [x, x]"] + [f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 40)]
    with pytest.raises(InvalidText, match="more than 100000 values"):
        parse("\n".join(lines))


def test_bytes() -> None:
    assert decode("\ufeffa: é\n".encode()) == "a: é\n"
    with pytest.raises(InvalidText, match="not UTF-8") as caught:
        decode(b"a: 1\nb: \xff\n")
    assert caught.value.line == 2
    with pytest.raises(InvalidText, match="characters"):
        decode(b"#" * (MAX_TEXT + 1))
