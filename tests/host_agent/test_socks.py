from __future__ import annotations

import itertools
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from host_agent.socks import Connect, Event, Negotiation, Refuse, ReplyCode, Send, reply, reply_code
from protocol.errors import ErrorCode

HELLO = b"\x05\x01\x00"
WELCOME = Send(b"\x05\x00")
TO_IPV4 = b"\x05\x01\x00\x01" + socket.inet_aton("172.17.0.2") + b"\x00\x50"
TO_IPV6 = b"\x05\x01\x00\x04" + socket.inet_pton(socket.AF_INET6, "fd00::2") + b"\x1f\x90"
TO_NAME = b"\x05\x01\x00\x03\x0bexample.com\x01\xbb"


def received(*pieces: bytes) -> list[Event]:
    negotiation = Negotiation()
    return [event for piece in pieces for event in negotiation.receive(piece)]


@pytest.mark.parametrize(
    ("request_bytes", "expected"),
    [
        (TO_IPV4, Connect("172.17.0.2", 80, True, b"")),
        (TO_IPV6, Connect("fd00::2", 8080, True, b"")),
        (TO_NAME, Connect("example.com", 443, False, b"")),
        (b"\x05\x01\x00\x03\x06b\xc3\xbcxyz\x00\x01", Connect("büxyz", 1, False, b"")),
        (b"\x05\x01\xff\x03\x01x\xff\xff", Connect("x", 65535, False, b"")),
    ],
)
def test_a_request_is_understood(request_bytes: bytes, expected: Connect) -> None:
    assert received(HELLO, request_bytes) == [WELCOME, expected]


@pytest.mark.parametrize("request_bytes", [TO_IPV4, TO_IPV6, TO_NAME])
def test_it_does_not_matter_how_it_is_cut(request_bytes: bytes) -> None:
    whole = received(HELLO, request_bytes)
    said = HELLO + request_bytes
    assert received(*(said[i : i + 1] for i in range(len(said)))) == whole
    assert received(said) == whole


def test_what_is_said_behind_the_request_is_kept_for_whom_it_is_meant() -> None:
    [_, connect] = received(HELLO + TO_IPV4 + b"GET / HTTP/1.0\r\n\r\n")
    assert isinstance(connect, Connect)
    assert connect.early == b"GET / HTTP/1.0\r\n\r\n"


def test_one_of_many_methods_is_enough() -> None:
    assert received(b"\x05\x03\x02\x01\x00") == [WELCOME]


@pytest.mark.parametrize("methods", [b"\x00", b"\x01\x02", b"\x02\x01\x02"])
def test_a_client_that_insists_on_authentication_is_told(methods: bytes) -> None:
    [event] = received(b"\x05" + methods)
    assert event == Refuse(b"\x05\xff", "the client insists on authentication")


@pytest.mark.parametrize("first", [b"\x04\x01\x00\x50", b"GET / HTTP/1.1", b"\x16\x03\x01"])
def test_another_protocol_is_hung_up_on(first: bytes) -> None:
    [event] = received(first)
    assert isinstance(event, Refuse)
    assert event.data == b""
    assert "does not speak SOCKS5" in event.reason


@pytest.mark.parametrize(
    ("request_bytes", "code"),
    [
        (b"\x05\x02\x00\x01", ReplyCode.COMMAND_NOT_SUPPORTED),  # BIND
        (b"\x05\x03\x00\x01", ReplyCode.COMMAND_NOT_SUPPORTED),  # UDP ASSOCIATE
        (b"\x05\x01\x00\x02", ReplyCode.ADDRESS_TYPE_NOT_SUPPORTED),
        (b"\x05\x01\x00\x00", ReplyCode.ADDRESS_TYPE_NOT_SUPPORTED),
        (TO_IPV4[:-2] + b"\x00\x00", ReplyCode.FAILURE),  # port 0
        (b"\x05\x01\x00\x03\x00\x00\x50", ReplyCode.FAILURE),  # no name
        (b"\x05\x01\x00\x03\x03a\x00b\x00\x50", ReplyCode.FAILURE),
        (b"\x05\x01\x00\x03\x03a b\x00\x50", ReplyCode.FAILURE),
        (b"\x05\x01\x00\x03\x02\xff\xfe\x00\x50", ReplyCode.FAILURE),
        (b"\x04\x01\x00\x01", ReplyCode.FAILURE),
    ],
)
def test_what_cannot_be_granted_is_refused_with_its_code(request_bytes: bytes, code: ReplyCode) -> None:
    [welcome, refusal] = received(HELLO, request_bytes)
    assert welcome == WELCOME
    assert isinstance(refusal, Refuse)
    assert refusal.data == reply(code)
    assert refusal.reason


def test_after_the_end_nothing_follows() -> None:
    assert received(HELLO + TO_IPV4, HELLO + TO_IPV4) == received(HELLO + TO_IPV4)
    assert len(received(b"\x04", HELLO, TO_IPV4)) == 1


def test_replies_are_as_the_rfc_has_them() -> None:
    assert reply(ReplyCode.SUCCEEDED) == bytes.fromhex("05 00 00 01 00000000 0000")
    assert reply(ReplyCode.REFUSED)[1] == 5


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ErrorCode.REFUSED, ReplyCode.REFUSED),
        (ErrorCode.UNREACHABLE, ReplyCode.HOST_UNREACHABLE),
        (ErrorCode.NOT_FOUND, ReplyCode.HOST_UNREACHABLE),
        (ErrorCode.TIMEOUT, ReplyCode.HOST_UNREACHABLE),
        (ErrorCode.DENIED, ReplyCode.NOT_ALLOWED),
        (ErrorCode.INTERNAL, ReplyCode.FAILURE),
        (ErrorCode.LIMIT, ReplyCode.FAILURE),
    ],
)
def test_every_refusal_has_a_code(error: ErrorCode, code: ReplyCode) -> None:
    assert reply_code(error) is code


def plausible() -> st.SearchStrategy[bytes]:
    """Garbage, some of which begins well."""
    begins = st.sampled_from([b"", HELLO, HELLO + b"\x05\x01\x00", HELLO + b"\x05\x01\x00\x03", b"\x05\xff"])
    return st.builds(lambda begin, rest: begin + rest, begins, st.binary(max_size=600))


@given(said=plausible(), cuts=st.lists(st.integers(0, 600), max_size=8))
def test_garbage_is_refused_or_waited_for_and_never_piles_up(said: bytes, cuts: list[int]) -> None:
    edges = [0, *sorted(min(cut, len(said)) for cut in cuts), len(said)]
    pieces = [said[start:end] for start, end in itertools.pairwise(edges)]
    negotiation = Negotiation()
    events = [event for piece in pieces for event in negotiation.receive(piece)]
    assert len(negotiation._received) <= 2 + 255 + 4 + 1 + 255 + 2
    assert sum(isinstance(event, Send) for event in events) <= 1
    assert all(isinstance(event, Send) for event in events[:-1])
    last = events[-1] if events else None
    if isinstance(last, Connect):
        assert said.endswith(last.early)
        assert 0 < last.port < 65536
        assert last.host
    # Early data is what had come when the request was whole; all else does not depend on the cuts.
    [whole] = received(said)[-1:] or [None]
    if isinstance(whole, Connect) and isinstance(last, Connect):
        assert (last.host, last.port) == (whole.host, whole.port)
    else:
        assert last == whole
