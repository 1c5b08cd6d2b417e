from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from host_agent.errors import ExitCode, UserError
from host_agent.remote.machine import (
    MAX_PROBLEMS,
    MAX_SENTENCE,
    Address,
    parse_check,
)
from protocol.capabilities import Capabilities, Docker, Mounts, Problem

CHECK: dict[str, Any] = {
    "format": 1,
    "python": "3.11.2",
    "uid": 1000,
    "user": "ada",
    "home": "/home/ada",
    "root": False,
    "kernel": "6.1.0",
    "mounts": {"ok": True, "how": "fusermount3", "allow_other": False, "problem": "", "fix": ""},
    "ports": "polling",
    "docker": {"socket": "", "problem": "no Docker", "fix": "install it"},
    "problems": [{"what": "no Docker", "fix": "install it"}],
}


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("box", Address("box")),
        ("ada@box", Address("box", "ada")),
        ("ada@box.example.org:2222", Address("box.example.org", "ada", 2222)),
        ("box:22", Address("box", None, 22)),
        ("10.0.0.7", Address("10.0.0.7")),
        ("::1", Address("::1")),
        ("ada@[fe80::1%eth0]:22", Address("fe80::1%eth0", "ada", 22)),
        ("[::1]", Address("::1")),
        ("my_build-box", Address("my_build-box")),
        ("ada@example.org@box", Address("box", "ada@example.org")),
        ("EXAMPLE\\ada@box", Address("box", "EXAMPLE\\ada")),
        ("ssh://ada@box:22", Address("box", "ada", 22)),
        ("ssh://box/", Address("box")),
    ],
)
def test_an_address_as_people_write_it(text: str, address: Address) -> None:
    assert Address.parse(text) == address
    assert Address.parse(str(address)) == address


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "@box",
            "ada@",
            "-oProxyCommand=x",
            "-l@box",
            "a b@box",
            "box ",
            "box/x",
            "$(x)@box",
            "`x`",
            "a;b",
        ),
        *("box:", "box:0", "box:65536", "box:x", "box:-1", "box:٣", "[box]:22", "[::1", "::x", "ada\\@box"),
        *("bo\nx", "ada\x1b@box", "a'b@box", 'a"@box', "box|x", "%h", "é", "x" * 300),
    ],
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(UserError) as refused:
        Address.parse(text)
    assert refused.value.exit_code is ExitCode.USAGE
    assert refused.value.message.isprintable()


def test_a_check_is_understood() -> None:
    found = parse_check(json.dumps(CHECK))
    assert found == Capabilities(
        python="3.11.2",
        uid=1000,
        user="ada",
        home="/home/ada",
        kernel="6.1.0",
        mounts=Mounts(True, "fusermount3"),
        ports="polling",
        docker=Docker("", "no Docker", "install it"),
        problems=(Problem("no Docker", "install it"),),
    )


def test_what_a_check_leaves_out_cannot_be_done() -> None:
    found = parse_check('{"format": 1, "uid": 0}')
    assert (found.mounts.ok, found.root, found.docker.socket, found.home) == (False, False, "", "")


def test_what_it_says_is_bounded_and_plain() -> None:
    found = parse_check(
        json.dumps(
            CHECK
            | {
                "user": "a\x1b]0;title\x07\x1b[31md\na",
                "kernel": "k" * 10_000,
                "home": "relative",
                "root": 1,
                "mounts": [],
                "docker": {"socket": "/run/\0/docker.sock", "problem": {}},
                "problems": [{"what": "x" * 5000}, {"fix": "y"}, 7] + [{"what": "z", "fix": None}] * 100,
            }
        )
    )
    assert found.user == "ad a"
    assert len(found.kernel) == MAX_SENTENCE
    assert (found.home, found.root, found.mounts, found.docker) == ("", False, Mounts(), Docker())
    assert len(found.problems) <= MAX_PROBLEMS
    assert found.problems[:2] == (Problem("x" * MAX_SENTENCE, ""), Problem("z", ""))


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{",
        b"\xff",
        b"[]",
        b"7",
        b'{"format": 2}',
        b'{"format": 1, "uid": true}',
        b'{"format": 1, "uid": -1}',
        b"[" * 100000,
        b'{"format": 1, "uid": ' + b"9" * 10000 + b"}",
    ],
)
def test_what_is_no_check_is_refused(line: bytes) -> None:
    with pytest.raises(ValueError):
        parse_check(line)


_values = st.none() | st.booleans() | st.integers() | st.text(max_size=20)
_names = st.sampled_from([*CHECK, "ok", "how", "socket", "problem", "what", "fix"])
_json = st.recursive(_values, lambda inner: st.lists(inner) | st.dictionaries(_names, inner), max_leaves=10)


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(list(CHECK)), _json))
def test_any_json_is_a_check_or_refused(found: dict[str, Any]) -> None:
    try:
        capabilities = parse_check(json.dumps({"format": 1, "uid": 7} | found))
    except ValueError:
        return
    for text in (
        capabilities.user,
        capabilities.kernel,
        capabilities.mounts.fix,
        capabilities.docker.problem,
    ):
        assert text == "" or (text.isprintable() and len(text) <= MAX_SENTENCE)
