"""A value is changed where it is; everything else of the text stays byte for byte."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from host_agent.configuration.dump import dump, dump_inline
from host_agent.configuration.edit import Change, changed
from host_agent.configuration.text import parse

TEXT = """\
# head
cpus: 4  # as many
mounts:  # folders
  # my home
  - "~"

  # data
  - host_path: /srv  # a
    read_only: true

# of ports
ports:
  # lan
  lan: false # no
  rules: []   # none
  # end
flow: {a: 1, b: 2}
empty:
script: |
  foo
  bar

# last
z: 1"""


def differing(text: str, new: str) -> tuple[list[str], list[str]]:
    """The lines that went, and those that came; all others are as they were, in their order."""
    before, after = text.splitlines(), new.splitlines()
    start = 0
    while start < min(len(before), len(after)) and before[start] == after[start]:
        start += 1
    end = 0
    while end < min(len(before), len(after)) - start and before[-1 - end] == after[-1 - end]:
        end += 1
    return before[start : len(before) - end], after[start : len(after) - end]


@pytest.mark.parametrize(
    ("path", "value", "gone", "come"),
    [
        (("cpus",), 2, ["cpus: 4  # as many"], ["cpus: 2  # as many"]),
        (("ports", "lan"), True, ["  lan: false # no"], ["  lan: true # no"]),
        (("empty",), "x", ["empty:"], ["empty: x"]),
        (("empty",), [1], [], ["  - 1"]),
        (("empty", "q"), "x", [], ["  q: x"]),
        (("ports", "rules"), [{"a": 1, "b": "2"}], ["  rules: []   # none"], ["  rules:   # none", "    - a: 1", "      b: \"2\""]),
        (("flow",), {"a": 1}, ["flow: {a: 1, b: 2}"], ["flow:", "  a: 1"]),
        (("flow", "b"), 3, ["flow: {a: 1, b: 2}"], ["flow:", "  a: 1", "  b: 3"]),
        (("script",), "foo\nbaz\n", ["  bar"], ["  baz"]),
        (("script",), "x", ["script: |", "  foo", "  bar"], ["script: x"]),
        (("z",), {"a": [1]}, ["z: 1"], ["z:", "  a:", "    - 1"]),
        (("ports", "new"), 5, [], ["  new: 5"]),
        (("new",), 5, [], ["", "# said", "# twice", "new: 5"]),
    ],
)  # fmt: skip
def test_only_the_lines_of_the_value_change(
    path: tuple[str, ...], value: object, gone: list[str], come: list[str]
) -> None:
    new = changed(TEXT, Change(path, value, "said\ntwice" if path == ("new",) else ""))
    assert differing(TEXT, new) == (gone, come)
    found = parse(new).values
    for name in path:
        found = found[name]
    assert found == value


def test_a_list_that_becomes_empty_leaves_the_comment_behind_its_key() -> None:
    new = changed(TEXT, Change(("mounts",), []))
    assert new.startswith("# head\ncpus: 4  # as many\nmounts:  # folders\n") is False
    assert "\nmounts: []  # folders\n\n# of ports\n" in new


def test_entries_keep_their_lines_and_the_comments_above_them() -> None:
    home, data = '  # my home\n  - "~"\n', "\n  # data\n  - host_path: /srv  # a\n    read_only: true\n"
    both = ["~", {"host_path": "/srv", "read_only": True}]
    cases: list[tuple[list[Any], str]] = [
        ([both[0]], home),
        ([both[1]], data),
        ([both[1], both[0]], data + home),
        (["/new", *both], "  - /new\n" + home + data),
        ([both[0], "/new", both[1]], home + "  - /new\n" + data),
        ([both[0], both[0]], home + '  - "~"\n'),
    ]
    for wanted, lines in cases:
        new = changed(TEXT, Change(("mounts",), wanted))
        assert new == TEXT.replace(home + data, lines) + "\n"
        assert parse(new).values["mounts"] == wanted


def test_entries_are_compared_as_they_are_meant() -> None:
    text = "a:\n- 'ONE'  # first\n- two\n"
    new = changed(text, Change(("a",), ["one", "three"], same=lambda old, new: old.lower() == new))
    assert new == "a:\n- 'ONE'  # first\n- three\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "\n# c\na:\n  b: 1\n"),
        ("# x\n", "# x\n\n# c\na:\n  b: 1\n"),
        ("{}\n", "\n# c\na:\n  b: 1\n"),
        ("{z: 1}\n", "z: 1\na:\n  b: 1\n"),
        ("a: &x {b: 0, c: 2}\n", "a:\n  b: 1\n  c: 2\n"),
    ],
)
def test_a_file_without_lines_for_its_keys(text: str, expected: str) -> None:
    assert changed(text, Change(("a", "b"), 1, "c")) == expected


def test_what_an_alias_stands_for_is_not_changed_with_it() -> None:
    assert changed("a: &x 4\nb: *x  # too\n", Change(("b",), 5)) == "a: &x 4\nb: 5  # too\n"


def test_members_of_a_mapping_come_and_go_one_by_one() -> None:
    text = "m:\n  # of a\n  a: 1  # one\n  b: {c: 1}\n  # of d\n  d:\n    - 1\n# end\n"
    new = changed(text, Change(("m",), {"a": 1, "d": [1, 2], "e": "x"}))
    assert new == "m:\n  # of a\n  a: 1  # one\n  # of d\n  d:\n    - 1\n    - 2\n  e: x\n# end\n"


NAMES = st.sampled_from(["a", "b", "c", "d e"])
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-9, 9)
    | st.sampled_from(["x", "~", "a: b", "#", "l\nm\n", " ", "l\n\n", "-"])
)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3), max_leaves=8
)  # fmt: skip


@given(
    st.dictionaries(NAMES, VALUES, max_size=4), st.booleans(), st.lists(NAMES, min_size=1, max_size=3), VALUES
)
def test_whatever_is_changed_is_there_and_nothing_else_is_different(
    values: dict[str, Any], inline: bool, path: list[str], value: Any
) -> None:
    text = "".join(f"# of {name}\n{name}: {dump_inline(part)}  # end\n" for name, part in values.items())
    if not inline:
        text = "".join(f"# of {name}\n{dump({name: part})}# end\n" for name, part in values.items())
    expected = parse(text).values or {}
    inner = expected
    for name in path[:-1]:
        if not isinstance(inner.get(name), dict):
            inner[name] = {}
        inner = inner[name]
    inner[path[-1]] = value
    new = changed(text, Change(tuple(path), value))
    assert parse(new).values == expected
    for name in values:
        assert f"# of {name}\n" in new
