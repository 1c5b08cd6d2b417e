"""What a log says is text, and nothing else reaches a terminal."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from host_agent.plain_text import PlainText

HOSTILE = (
    b"\x1b[0;32m  OK  \x1b[0m started\r\n"
    b"\x1b]0;title\x07\x1b[2J\x9b2J\xc2\x9b2J\xe2\x80\xae \xff gr\xc3\xbc\xc3\x9fe\tend\n"
    b"\x1bP never ended\nnext\n"
)
HARMLESS = "  OK   started\n\\x9b2J\\u202e \\xff grüße\tend\n\nnext\n"


def plain(*pieces: bytes) -> str:
    text = PlainText()
    return "".join(text.receive_data(piece) for piece in pieces)


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"a\x00b\x08c\x7fd\re\tf\n", "abcde\tf\n"),
        (b"\x1b[1;31mred\x1b[0m \x1b[?25l\x1b[ qon", "red on"),
        (b"\x1b]52;c;ZWNobw==\x07a \x1b]0;title\x1b\\b \x1bPq#\x1b\\c \x1b_x\xc2\x9cd", "a b c d"),
        ("\x9b31mred \x9dtitle\x07a \x85b".encode(), "red a b"),
        (b"\x1bca\x1b(Bb\x1b7c", "abc"),
        ("\x1bé\x1b[3é".encode(), "éé"),
        (b"\x1b\x1b[1ma \x1b[1\x1b[2mb", "a b"),
        (b"\x1b]hidden\nseen\n\x1b[12\nseen\n\x1b\nseen", "\nseen\n\nseen\n\nseen"),
        ("世界 \u202e\u2028\u200b".encode(), "世界 \\u202e\\u2028\\u200b"),
        (b"\xff\xc3(", "\\xff\\xc3("),
        (HOSTILE, HARMLESS),
    ],
)
def test_only_text_is_left(raw: bytes, text: str) -> None:
    assert plain(raw) == text
    assert plain(*(raw[at : at + 1] for at in range(len(raw)))) == text


_PIECES = st.sampled_from(
    [
        b"\x1b",
        b"[",
        b"]",
        b"P",
        b"\\",
        b"31m",
        b"\x07",
        b"\n",
        b"\r",
        b"x",
        b" ",
        b"\xc2\x9b",
        b"\x9c",
        b"\xe2\x80\xae",
    ]
)


@given(st.lists(_PIECES | st.binary(max_size=4)).map(b"".join), st.data())
def test_no_bytes_and_no_split_of_them_reach_the_terminal_as_more_than_text(
    raw: bytes, data: st.DataObject
) -> None:
    whole = plain(raw)
    assert all(character.isprintable() or character in "\n\t" for character in whole)
    assert whole.count("\n") == raw.count(b"\n"), "no line hides another"
    cut = data.draw(st.integers(0, len(raw)))
    assert plain(raw[:cut], raw[cut:]) == whole
