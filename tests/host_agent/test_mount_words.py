from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from host_agent.errors import ExitCode, UserError
from host_agent.mount_words import Words, parse


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("/a", Words("/a")),
        ("~", Words("~")),
        (".", Words(".")),
        ("ro", Words("ro")),
        ("/a:ro", Words("/a", read_only=True)),
        ("/a:rw", Words("/a")),
        ("/a:/b", Words("/a", "/b")),
        ("a b:/c d:ro", Words("a b", "/c d", read_only=True)),
        ("/a,locks=host", Words("/a", host_locks=True)),
        ("/a,locks=guest", Words("/a")),
        ("/a:/b,locks=host", Words("/a", "/b", host_locks=True)),
        ("/a:/b:ro,locks=host", Words("/a", "/b", read_only=True, host_locks=True)),
        ("/a:locks=host", Words("/a", host_locks=True)),
        ("/a:locks=host,ro", Words("/a", read_only=True, host_locks=True)),
        ("/a,b", Words("/a,b")),
        ("/a,b:/c,d", Words("/a,b", "/c,d")),
        ("/a:ro,ro", Words("/a", read_only=True)),
    ],
)
def test_words_are_understood(text: str, words: Words) -> None:
    assert parse(text) == words


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "there is no folder in --mount ''"),
        (":/a", "there is no folder in --mount ':/a'"),
        (":ro", "there is no folder"),
        ("/a:b", "'b' is neither a place in the VM"),
        ("/a:b:ro", "'b' is neither a place in the VM"),
        ("/a:/b:/c", "more than one place in the VM"),
        ("/a:ro:/b", "'ro' is neither a place"),
        ("/a:", "'' is neither a place"),
        ("/a:ro,fast", "'fast' is not an option"),
        ("/a:ro,rw", "contradicts itself"),
        ("/a:rw,locks=host,locks=guest", "contradicts itself"),
        ("/a,locks=everywhere", "'locks=everywhere' is not an option"),
    ],
)
def test_words_that_mean_nothing_are_refused_in_a_sentence(text: str, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(text)
    assert sentence in caught.value.message
    assert "PATH[:GUESTPATH][:ro|:rw][,locks=host]" in caught.value.hint
    assert caught.value.exit_code is ExitCode.USAGE


@given(st.text(alphabet="/:,=abrow locks=host~.", max_size=30))
def test_any_words_are_understood_or_refused(text: str) -> None:
    try:
        words = parse(text)
    except UserError:
        return
    assert words.host_path
    assert not words.guest_path or words.guest_path.startswith("/")
