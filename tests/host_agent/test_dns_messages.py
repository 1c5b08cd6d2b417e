from __future__ import annotations

import ipaddress
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from host_agent import dns_messages
from host_agent.dns_messages import Code, Malformed, Query, Type, parse
from tests.host_agent.dns_client import OPTION, ask, read

PLAIN = ask("Host.Example", Type.A, ident=4711)


def test_a_query() -> None:
    query = parse(PLAIN)
    assert (query.ident, query.name, query.kind, query.internet) == (4711, "host.example", Type.A, True)
    assert (query.max_size, query.edns) == (512, False)


@pytest.mark.parametrize(("offered", "taken"), [(100, 512), (1000, 1000), (65535, 1232)])
def test_what_a_client_takes(offered: int, taken: int) -> None:
    query = parse(ask("a", Type.A, option=offered))
    assert (query.edns, query.max_size) == (True, taken)


@pytest.mark.parametrize("labels", [[], [b"a.b"], [b"a b"], [b"\xff"], [b"a", b"\0"]])
def test_names_that_no_host_has(labels: list[bytes]) -> None:
    name = b"".join(bytes([len(label)]) + label for label in labels) + b"\0"
    assert parse(PLAIN[:12] + name + struct.pack("!HH", 1, 1)).name == ""


@pytest.mark.parametrize(
    ("message", "code"),
    [
        (PLAIN[:11], None),
        (b"", None),
        (PLAIN[:2] + b"\x81\x80" + PLAIN[4:], None),  # a response
        (PLAIN[:2] + b"\x28\x00" + PLAIN[4:], Code.NOT_IMPLEMENTED),  # an update
        (PLAIN[:5] + b"\x00" + PLAIN[6:], Code.FORMAT_ERROR),
        (PLAIN[:5] + b"\x02" + PLAIN[6:], Code.FORMAT_ERROR),
        (PLAIN[:7] + b"\x01" + PLAIN[8:], Code.FORMAT_ERROR),
        (PLAIN[:-1], Code.FORMAT_ERROR),
        (PLAIN[:14], Code.FORMAT_ERROR),
        (PLAIN[:12] + b"\xc0\x0c\x00\x01\x00\x01", Code.FORMAT_ERROR),
        (PLAIN[:12] + (b"\x3f" + b"a" * 63) * 4 + b"\0\0\1\0\1", Code.FORMAT_ERROR),
    ],
)
def test_what_is_not_a_query(message: bytes, code: Code | None) -> None:
    with pytest.raises(Malformed) as caught:
        parse(message)
    if code is None:
        assert caught.value.answer == b""
    else:
        assert caught.value.answer[:2] == message[:2]
        assert caught.value.answer[3] & 0xF == code


def test_addresses() -> None:
    for kind, addresses in ((Type.A, ["192.0.2.1", "192.0.2.2"]), (Type.AAAA, ["2001:db8::1"])):
        answer = read(dns_messages.answer(parse(ask("a.example", kind)), addresses, 5, 512))
        assert (answer.code, answer.addresses, answer.truncated) == (0, addresses, False)
        assert set(answer.ttls) == {5}


def test_none_of_this_type() -> None:
    answer = read(dns_messages.answer(parse(PLAIN), [], 5, 512))
    assert (answer.code, answer.addresses) == (Code.NO_ERROR, [])


def test_more_than_fits() -> None:
    addresses = [str(ipaddress.ip_address("192.0.2.0") + number) for number in range(64)]
    query = parse(PLAIN)
    short = dns_messages.answer(query, addresses, 5, query.max_size)
    assert len(short) <= 512
    assert read(short).truncated
    whole = read(dns_messages.answer(query, addresses, 5, dns_messages.MAX_SIZE))
    assert (whole.addresses, whole.truncated) == (addresses, False)


def test_who_offers_edns_is_answered_with_it() -> None:
    query = parse(ask("a.example", Type.A, option=4096))
    assert dns_messages.failure(query, Code.NO_SUCH_NAME).endswith(OPTION.pack(0, 41, 1232, 0, 0))
    assert not dns_messages.failure(parse(PLAIN), Code.NO_SUCH_NAME).endswith(OPTION.pack(0, 41, 1232, 0, 0))


def test_which_replies_are_believed() -> None:
    query = parse(PLAIN)
    reply = dns_messages.failure(query, Code.NO_ERROR)
    assert dns_messages.answers(reply, 4711, query)
    assert dns_messages.answers(reply[:12] + reply[12:].lower(), 4711, query)
    assert not dns_messages.answers(reply, 4712, query)
    assert not dns_messages.answers(PLAIN, 4711, query)
    assert not dns_messages.answers(reply[:11], 4711, query)
    other = dns_messages.failure(parse(ask("other.example", Type.A, ident=4711)), Code.NO_ERROR)
    assert not dns_messages.answers(other, 4711, query)
    assert dns_messages.answers(reply[:4] + bytes(8), 4711, query)  # REFUSED, without a question


@given(st.binary(max_size=600))
def test_any_bytes_are_a_query_or_malformed(data: bytes) -> None:
    _survives(data)


@given(st.binary(max_size=60), st.integers(0, 3))
def test_any_bytes_behind_a_header_are_a_query_or_malformed(data: bytes, additionals: int) -> None:
    _survives(PLAIN[:11] + bytes([additionals]) + data)


def _survives(data: bytes) -> None:
    outcome = _parsed(data)
    if isinstance(outcome, Malformed):
        assert len(outcome.answer) in (0, 12)
        return
    answer = dns_messages.answer(outcome, ["192.0.2.1"], 5, outcome.max_size)
    assert len(answer) <= outcome.max_size <= 1232
    assert dns_messages.answers(answer, outcome.ident, outcome)


def _parsed(data: bytes) -> Query | Malformed:
    try:
        return parse(data)
    except Malformed as error:
        return error


@given(
    st.lists(st.from_regex(r"[A-Za-z0-9_-]{1,20}", fullmatch=True), min_size=1, max_size=8),
    st.integers(0, 65535),
    st.integers(0, 65535),
)
def test_each_name_is_read_as_it_was_asked(labels: list[str], kind: int, ident: int) -> None:
    query = parse(ask(".".join(labels), kind, ident=ident))
    assert (query.ident, query.name, query.kind) == (ident, ".".join(labels).lower(), kind)
