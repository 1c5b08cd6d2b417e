from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guest_agent.edges import MAX_BINDING, MAX_LINE, Edge, EdgeReader, concerns, parse_line
from guest_agent.listeners import ALL_PROTOS
from protocol.api import Proto

# As printed by Linux 6.18.
STATE = (
    "         python3-14745   [001] .....  1288.694729: inet_sock_set_state: "
    "family=AF_INET protocol=IPPROTO_TCP sport={port} dport=0 saddr=127.0.0.1 daddr=0.0.0.0 "
    "saddrv6=::ffff:127.0.0.1 daddrv6=::ffff:0.0.0.0 oldstate={old} newstate={new}"
)
OPENED = STATE.format(port=8080, old="TCP_CLOSE", new="TCP_LISTEN")
CLOSED = STATE.format(port=8080, old="TCP_LISTEN", new="TCP_CLOSE")
ENTERED = "         python3-14745   [001] .....  1288.6: sys_bind(fd: 3, umyaddr: 7ffe2c0d9f60, addrlen: 10)"
BOUND = "         python3-14745   [000] .....  1288.7: sys_bind -> 0x0"
RETURNED = "         python3-14745   [001] .....  1288.694724: sys_listen -> 0x0"


@pytest.mark.parametrize(
    ("line", "edge"),
    [
        (OPENED, Edge(14745)),
        (RETURNED, Edge(14745)),
        (CLOSED, Edge(14745, closed_port=8080)),
        ("CPU:1 [LOST 3 EVENTS]", None),
        ("", None),
        # A task may call itself nearly anything.
        (
            CLOSED.replace("python3-14745", "evil-7 [001] x: sys_listen -> -14745"),
            Edge(14745, closed_port=8080),
        ),
        (RETURNED.replace("python3", "a b: c-9"), Edge(14745)),
    ],
)
def test_lines(line: str, edge: Edge | None) -> None:
    assert parse_line(line) == edge


@given(st.lists(st.integers(1, 400), max_size=20))
def test_any_split_gives_the_same_edges(cuts: list[int]) -> None:
    text = f"{OPENED}\n{RETURNED}\n{CLOSED}\n".encode()
    reader, edges = EdgeReader(), []
    for cut in cuts:
        edges += reader.receive_data(text[:cut])
        text = text[cut:]
    edges += reader.receive_data(text)
    assert edges == [Edge(14745), Edge(14745), Edge(14745, closed_port=8080)]


def test_an_endless_line_costs_no_memory_and_counts() -> None:
    reader = EdgeReader()
    assert reader.receive_data(b"x" * (MAX_LINE + 1)) == [None]
    assert reader.receive_data(b"\n") == [None]


def read(*lines: str) -> list[Edge | None]:
    return EdgeReader().receive_data("".join(f"{line}\n" for line in lines).encode())


def test_a_bind_counts_when_it_returns_if_its_entry_did() -> None:
    udp = Edge(14745, proto=Proto.UDP)
    assert read(ENTERED) == []
    assert read(BOUND) == []  # netlink, or what was bound before anyone looked
    assert read(ENTERED, BOUND) == [udp]
    assert read(ENTERED, BOUND, BOUND) == [udp]
    assert read(ENTERED, BOUND.replace("14745", "14746")) == []


def test_entries_that_never_return_cost_no_memory_and_count() -> None:
    entries = [ENTERED.replace("14745", str(pid)) for pid in range(MAX_BINDING + 1)]
    assert read(*entries) == [None]


TCP_ONLY, UDP_ONLY, NEITHER = frozenset({Proto.TCP}), frozenset({Proto.UDP}), frozenset[Proto]()


@pytest.mark.parametrize(
    ("edge", "expected"),
    [
        (None, ALL_PROTOS),
        (Edge(1), TCP_ONLY),
        (Edge(2), NEITHER),
        (Edge(1, closed_port=80), TCP_ONLY),
        (Edge(2, closed_port=80), TCP_ONLY),  # an inherited listener may be closed by anybody
        (Edge(1, closed_port=81), NEITHER),
        (Edge(1, closed_port=53), NEITHER),  # that is UDP's
        (Edge(1, proto=Proto.UDP), UDP_ONLY),
        (Edge(2, proto=Proto.UDP), NEITHER),
        (Edge(0, closed_port=53, proto=Proto.UDP), UDP_ONLY),
        (Edge(0, closed_port=80, proto=Proto.UDP), NEITHER),
    ],
)
def test_what_is_concerned(edge: Edge | None, expected: frozenset[Proto]) -> None:
    known = {(Proto.TCP, 80), (Proto.UDP, 53)}
    assert concerns(edge, known, foreign=lambda pid: pid == 2) == expected
