from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from guest_agent.blocks import BEGIN, END, with_block, without_block

LINES = st.lists(st.from_regex(r"[a-z=]{0,5}", fullmatch=True))


def test_lines_of_ours_come_last_and_go() -> None:
    once = with_block("a\nb", ["x", "y"])
    assert once == f"a\nb\n{BEGIN}\nx\ny\n{END}\n"
    assert with_block(once, ["z"]) == f"a\nb\n{BEGIN}\nz\n{END}\n"
    assert with_block(once + "c\n", []) == "a\nb\nc\n"


def test_a_file_that_was_not_there() -> None:
    assert with_block("", []) == ""
    assert with_block("", ["x"]) == f"{BEGIN}\nx\n{END}\n"


@given(LINES, LINES, LINES)
def test_twice_is_once_and_others_keep_theirs(theirs: list[str], first: list[str], second: list[str]) -> None:
    text = "".join(f"{line}\n" for line in theirs)
    once = with_block(text, first)
    assert with_block(once, first) == once
    assert without_block(once) == text
    assert with_block(once, second) == with_block(text, second)
