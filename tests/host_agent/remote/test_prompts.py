"""What is typed at a terminal, which is a pseudo terminal here; and what was answered before."""

from __future__ import annotations

import os
import pty
import termios
from collections.abc import Iterator

import pytest

from host_agent.remote import answers
from host_agent.remote.prompts import Remembered, Terminal, typed


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """The user's end, and ours."""
    user, ours = pty.openpty()
    yield user, ours
    os.close(user)
    os.close(ours)


@pytest.mark.parametrize(
    ("keys", "answer"),
    [
        (b"secret\r", "secret"),
        (b"secret\n", "secret"),
        (b"wrong\x15right\n", "right"),
        ("a\u00e9\x7fb\n".encode(), "ab"),
        (b"\n", ""),
        (b"half\x03", None),
        (b"\x04", None),
    ],
)
@pytest.mark.parametrize("shown", [False, True])
def test_a_line_is_read_and_a_secret_never_shown(
    terminal: tuple[int, int], keys: bytes, answer: str | None, shown: bool
) -> None:
    user, ours = terminal
    before = termios.tcgetattr(ours)
    # Before it is typed: a terminal keeps what comes early, in the mode that it has then.
    raw = termios.tcgetattr(ours)
    raw[3] &= ~(termios.ICANON | termios.ECHO | termios.ISIG)
    termios.tcsetattr(ours, termios.TCSANOW, raw)
    os.write(user, keys)
    said: list[str] = []
    assert typed(ours, "Passphrase \x1b[2J: ", said.append, shown=shown) == answer
    assert said[0] == "Passphrase ?[2J: "
    assert said[-1] == "\n"
    if not shown:
        assert len(said) == 2
    after = termios.tcgetattr(ours)
    assert after[3] == raw[3]
    assert before[3] != after[3]


def test_where_nobody_looks_nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Terminal, "is_there", staticmethod(lambda: False))
    there = Terminal()
    assert there.ask("Password", secret=True) is None
    assert not there.trust("machine", "ssh-ed25519", "SHA256:x")
    assert not there.interrupted


def test_what_was_answered_is_remembered_and_no_key_is_trusted_from_that() -> None:
    given = answers.keep({"Passphrase": "a\u00e9"})
    assert given is not None
    there = Remembered(answers.read(given))
    assert there.ask("Passphrase", secret=True) == "a\u00e9"
    assert there.ask("another", secret=True) is None
    assert not there.trust("machine", "ssh-ed25519", "SHA256:x")
    os.close(given)
    assert answers.read(given) == {}
    assert answers.keep({}) is None
    assert answers.read(None) == {}


PASSWORD, CODE = "me@box asks: (me@box) Password:", "me@box asks: Verification code:"


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        (PASSWORD, False),
        ("Password of me@box", False),
        ("Passphrase of the key ~/.ssh/id_ed25519", False),
        (CODE, True),
        ("me@box asks: One-time password (OATH) for `me':", True),
        ("me@box asks: Duo two-factor login for me\nme@box asks: Passcode or option (1-3):", True),
    ],
)
def test_what_is_for_one_login(question: str, expected: bool) -> None:
    assert answers.is_for_one_login(question) is expected


def test_a_code_is_said_once_and_only_by_who_was_first() -> None:
    given = answers.keep({PASSWORD: "open sesame", CODE: "123456"})
    assert given is not None
    first, successor = Remembered(answers.take(given)), Remembered(answers.take(given))
    os.close(given)
    for expected in ("123456", None):
        assert first.ask(CODE, secret=True) == expected
        assert first.ask(PASSWORD, secret=True) == "open sesame"
        assert successor.ask(PASSWORD, secret=True) == "open sesame"
        assert successor.ask(CODE, secret=True) is None
