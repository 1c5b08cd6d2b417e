from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guest_agent.edges import MAX_LINE, Edge, EdgeReader, matters, parse_line

# As printed by Linux 6.18.
STATE = (
    "         python3-14745   [001] .....  1288.694729: inet_sock_set_state: "
    "family=AF_INET protocol=IPPROTO_TCP sport={port} dport=0 saddr=127.0.0.1 daddr=0.0.0.0 "
    "saddrv6=::ffff:127.0.0.1 daddrv6=::ffff:0.0.0.0 oldstate={old} newstate={new}"
)
OPENED = STATE.format(port=8080, old="TCP_CLOSE", new="TCP_LISTEN")
CLOSED = STATE.format(port=8080, old="TCP_LISTEN", new="TCP_CLOSE")
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


@pytest.mark.parametrize(
    ("edge", "expected"),
    [
        (None, True),
        (Edge(1), True),
        (Edge(2), False),
        (Edge(1, closed_port=80), True),
        (Edge(2, closed_port=80), True),  # an inherited listener may be closed by anybody
        (Edge(1, closed_port=81), False),
    ],
)
def test_what_matters(edge: Edge | None, expected: bool) -> None:
    assert matters(edge, {80}, foreign=lambda pid: pid == 2) is expected
