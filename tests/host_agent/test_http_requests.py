"""Heads and the ends of bodies."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from host_agent.http_requests import MAX_LENGTH_DIGITS, MAX_LINE, Chunked, Head, Sized, SurpriseError


def head(*headers: str, line: str = "POST /x HTTP/1.1") -> bytes:
    return "\r\n".join([line, *headers, "", ""]).encode()


def chunked(*chunks: bytes, trailer: bytes = b"") -> bytes:
    coded = b"".join(b"%X;ext=1\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks)
    return coded + b"0\r\n" + trailer + b"\r\n"


def test_a_head_says_what_is_asked_and_how_long_the_body_is() -> None:
    parsed = Head.parse(head("Host: docker", "Content-Length: 5", "content-length:  5 "))
    assert (parsed.method, parsed.target, parsed.upgrade) == (b"POST", b"/x", False)
    assert parsed.body == Sized(5)


def test_no_length_is_no_body() -> None:
    assert Head.parse(head("Host: docker")).body.ended


def test_lines_may_end_in_a_bare_lf() -> None:
    assert Head.parse(b"GET / HTTP/1.1\nContent-Length: 3\n\n").body == Sized(3)


def test_chunks_win_over_a_length() -> None:
    parsed = Head.parse(head("Content-Length: 5", "Transfer-Encoding: Chunked"))
    assert isinstance(parsed.body, Chunked)


@pytest.mark.parametrize("options", ["Upgrade", "keep-alive, upgrade", "UPGRADE,HTTP2-Settings"])
def test_an_upgrade_is_seen(options: str) -> None:
    assert Head.parse(head(f"Connection: {options}", "Upgrade: tcp")).upgrade


def test_an_upgrade_that_the_connection_does_not_name_is_none() -> None:
    assert not Head.parse(head("Connection: keep-alive", "Upgrade: tcp")).upgrade


def test_a_tunnel_is_an_upgrade() -> None:
    assert Head.parse(head(line="CONNECT x:1 HTTP/1.1")).upgrade


@pytest.mark.parametrize(
    "odd",
    [
        head(line="POST /x"),
        head(line="POST /x y HTTP/1.1"),
        head(line="PRI * HTTP/2.0"),
        head("Content-Length: 5", "Content-Length: 6"),
        head("Content-Length: -5"),
        head("Content-Length: 5, 5"),
        head("Content-Length: " + "1" * (MAX_LENGTH_DIGITS + 1)),
        head("Content-Length:"),
        head("Transfer-Encoding: gzip, chunked"),
        head("Transfer-Encoding: chunked", "Transfer-Encoding: chunked"),
        head("Transfer-Encoding: chunked", line="POST /x HTTP/1.0"),
        head("Content-Length : 5"),
        head("A: b", " folded"),
        head("no colon"),
        head(": no name"),
    ],
)
def test_what_could_be_understood_otherwise_is_a_surprise(odd: bytes) -> None:
    with pytest.raises(SurpriseError):
        Head.parse(odd)


@given(
    chunks=st.lists(st.binary(min_size=1, max_size=40)),
    trailer=st.sampled_from([b"", b"Checksum: 1\r\n", b"A: b\r\nC: d\r\n"]),
    rest=st.binary(max_size=20),
    sizes=st.lists(st.integers(1, 9), min_size=1),
)
def test_a_chunked_body_ends_where_it_ends_however_it_comes(
    chunks: list[bytes], trailer: bytes, rest: bytes, sizes: list[int]
) -> None:
    coded = chunked(*chunks, trailer=trailer)
    stream, body = coded + rest, Chunked()
    at, turn = 0, 0
    while at < len(coded):
        piece = stream[at : at + sizes[turn % len(sizes)]]
        end = body.skip(piece, 0)
        assert end == len(piece) or body.ended
        at, turn = at + end, turn + 1
    assert at == len(coded)
    assert body.ended
    assert Chunked.content(coded) == b"".join(chunks)


@pytest.mark.parametrize("size", [b"", b"x", b"-1", b"+1", b"1_0", b"0x10", b"1" * 17, b"1 2"])
def test_an_odd_chunk_size_is_a_surprise(size: bytes) -> None:
    with pytest.raises(SurpriseError):
        Chunked().skip(size + b"\r\n", 0)


def test_a_line_between_chunks_is_bounded() -> None:
    body = Chunked()
    assert body.skip(b"5;" + b"x" * (MAX_LINE - 2), 0) == MAX_LINE
    with pytest.raises(SurpriseError):
        body.skip(b"x", 0)


def test_a_chunk_of_many_gigabytes_costs_nothing() -> None:
    body = Chunked()
    assert body.skip(b"%x\r\n" % (1 << 40), 0) == 13
    piece = bytes(1 << 16)
    assert body.skip(piece, 0) == len(piece)
    assert not body.ended
