"""What is written is read as the same, and looks as a person would have written it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from host_agent.configuration.dump import behind, dump, dump_inline
from host_agent.configuration.text import parse

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
LINES = st.lists(st.sampled_from(["", " ", "a", "  b", "# c", "- d", "\t", "e:", "..."])).map("\n".join)


@given(VALUES | LINES | st.dictionaries(LINES, LINES))
def test_what_is_dumped_is_read_as_the_same(values: Any) -> None:
    assert parse(dump({"key": values})).values == {"key": values}
    assert parse(f"key: {dump_inline(values)}\n").values == {"key": values}
    assert parse(f"key:{behind(values, '  # why')}# end\n").values == {"key": values}


def test_how_it_looks() -> None:
    values = {
        "size": "4GiB",
        "range": "8000-8010",
        "address": "127.0.0.1:5353",
        "url": "http://proxy.example:3128/",
        "home": "~",
        "word": "no",
        "number": "4",
        "path": "/srv/a b",
        "script": "#!/bin/sh\nset -e\n",
        "tail": "a\nb",
        "none": [],
        "list": [{"a": 1, "b": [True]}, "x", {}],
        "map": {"a": {"b": 1}},
    }
    assert (
        dump(values)
        == """\
size: 4GiB
range: 8000-8010
address: 127.0.0.1:5353
url: http://proxy.example:3128/
home: "~"
word: no
number: "4"
path: "/srv/a b"
script: |
  #!/bin/sh
  set -e
tail: |-
  a
  b
none: []
list:
  - a: 1
    b:
      - true
  - x
  - {}
map:
  a:
    b: 1
"""
    )
    assert dump_inline(values["list"]) == "[{a: 1, b: [true]}, x, {}]"


@pytest.mark.parametrize(
    "text", ["\x85", "\u2028", "\ufeff", "\x7f", "\ud800", "\U0001f600", "\U000e0001", "a:", ":a", "..."]
)
def test_characters_that_yaml_has_other_plans_for(text: str) -> None:
    assert parse(f"{dump_inline(text)}: {dump_inline(text)}\n").values == {text: text}
