from __future__ import annotations

import pytest

from host_agent.errors import ExitCode, UserError
from host_agent.socket_rules import MAX_SOCKETS, MAX_UNIX_PATH, check, parse, tcp_address, text
from protocol.api import SocketForward


@pytest.mark.parametrize(
    ("word", "reverse", "forward"),
    [
        ("/tmp/db.sock:/run/db.sock", False, SocketForward("/run/db.sock", "/tmp/db.sock")),
        ("/a:b/c:/run/g", False, SocketForward("/run/g", "/a:b/c")),
        ("/tmp/agent.1:/run/agent", True, SocketForward("/run/agent", "/tmp/agent.1", True)),
        ("5432:/run/db", True, SocketForward("/run/db", "localhost:5432", True)),
        ("localhost:5432:/run/db", True, SocketForward("/run/db", "localhost:5432", True)),
        ("192.168.1.5:5432:/run/db", True, SocketForward("/run/db", "192.168.1.5:5432", True)),
        ("[fd00::5]:5432:/run/db", True, SocketForward("/run/db", "[fd00::5]:5432", True)),
    ],
)
def test_what_people_write(word: str, reverse: bool, forward: SocketForward) -> None:
    assert parse(word, reverse) == forward
    assert parse(text(forward), reverse) == forward


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    "word",
    [
        "",
        "/only/one",
        "8080",
        "relative:/run/x",
        "/tmp/x:relative",
        "/tmp/../etc/x:/run/x",
        "/tmp/x/:/run/x",
        "/tmp/x:/",
        "/tmp/x:/run//x",
        "/tmp/\n:/run/x",
        "0:/run/x",
        "70000:/run/x",
        "999.0.0.1:80:/run/x",
        "[::g]:80:/run/x",
        "example.com:80:/run/x",
        "-1:/run/x",
        ":/run/x",
    ],
)
def test_what_makes_no_sense_is_refused_with_how_to_write_it(word: str, reverse: bool) -> None:
    with pytest.raises(UserError) as caught:
        parse(word, reverse)
    assert caught.value.exit_code is ExitCode.USAGE
    assert "/HOST/SOCKET:/GUEST/SOCKET" in caught.value.hint


def test_a_port_is_only_for_reverse() -> None:
    with pytest.raises(UserError):
        parse("8080:/run/x", False)


@pytest.mark.parametrize("word", ["/{}:/run/x", "/tmp/x:/{}"])
def test_a_path_that_the_system_cannot_have_is_refused(word: str) -> None:
    parse(word.format("x" * (MAX_UNIX_PATH - 1)), False)
    with pytest.raises(UserError) as caught:
        parse(word.format("x" * MAX_UNIX_PATH), False)
    assert "too long" in caught.value.message


def test_two_cannot_appear_at_one_place() -> None:
    check([SocketForward("/g", "/h"), SocketForward("/g", "/i"), SocketForward("/g", "/h", True)])
    for other in (SocketForward("/other", "/h"), SocketForward("/g", "/h")):
        with pytest.raises(UserError) as caught:
            check([SocketForward("/g", "/h"), other])
        assert "/h" in caught.value.message
    with pytest.raises(UserError):
        check([SocketForward("/g", "/h", True), SocketForward("/g", "/i", True)])


def test_there_are_not_too_many() -> None:
    many = [SocketForward("/g", f"/h{number}") for number in range(MAX_SOCKETS + 1)]
    check(many[1:])
    with pytest.raises(UserError):
        check(many)


@pytest.mark.parametrize("host", ["localhost", "localhost:x", "[::1]", "a:1", "::1:80", ""])
def test_a_list_that_somebody_has_edited_is_checked_as_well(host: str) -> None:
    with pytest.raises(UserError):
        check([SocketForward("/g", host, True)])


@pytest.mark.parametrize(
    ("host", "address"),
    [("/run/x:1", None), ("localhost:80", ("localhost", 80)), ("[::1]:80", ("::1", 80))],
)
def test_where_the_host_is_dialled(host: str, address: tuple[str, int] | None) -> None:
    assert tcp_address(host) == address
