"""Lines with the moments at which they were written, from any split of the bytes."""

from __future__ import annotations

import itertools
import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from host_agent import log_lines
from host_agent.log_lines import JournalLines, Lines, LogLine, by_time, local_time, since, unknown

NOON = time.mktime((2026, 1, 31, 12, 0, 0, 0, 0, -1))
HOST = b"""Traceback of before
2026-01-31 12:00:00,250 host_agent.events INFO stage: ready
2026-01-31 12:00:01,000 host_agent.daemon ERROR it broke
Traceback (most recent call last):
  File "x", line 1
2026-01-31 12:00:00,500 host_agent.events INFO the clock was set back
2026-99-99 99:99:99,000 no date
"""


def test_lines_of_this_machines_logs() -> None:
    lines = Lines("host", local_time, 5.0).receive_data(HOST)
    assert [(line.time, line.text) for line in lines] == [
        (5.0, "Traceback of before"),
        (NOON + 0.25, "host_agent.events INFO stage: ready"),
        (NOON + 1, "host_agent.daemon ERROR it broke"),
        (NOON + 1, "Traceback (most recent call last):"),
        (NOON + 1, '  File "x", line 1'),
        (NOON + 1, "host_agent.events INFO the clock was set back"),
        (NOON + 1, "2026-99-99 99:99:99,000 no date"),
    ]
    assert {line.component for line in lines} == {"host"}


def test_lines_of_a_kernel() -> None:
    content = b"SeaBIOS\r\n\x1b[31m[    0.500000] Linux version\r\nagentctl-stage: init\n[   12.000000] done\nno end"
    console = Lines("console", since(1000.0), 5.0)
    assert [(line.time, line.text) for line in (*console.receive_data(content), *console.end())] == [
        (5.0, "SeaBIOS"),
        (1000.5, "Linux version"),
        (1000.5, "agentctl-stage: init"),
        (1012.0, "done"),
        (1012.0, "no end"),
    ]
    assert console.end() == []
    assert log_lines.last_stamp(content) == 12.0
    assert log_lines.last_stamp(b"nothing [1.5] ") is None


@pytest.mark.parametrize(
    ("stamp", "line", "moment"),
    [
        (unknown, b"text\n", 77.0),
        (since(1000.0), b"[    1.000000] text\n", 77.0),
        (local_time, b"2026-01-31 12:00:00,000 text\n", NOON),
        (local_time, b"text\n", 77.0),
    ],
)
def test_what_is_read_as_it_is_written_is_of_now(stamp: log_lines.Stamp, line: bytes, moment: float) -> None:
    assert Lines("qemu", stamp, 5.0).receive_data(line, 77.0) == [LogLine(moment, "qemu", "text")]


def test_a_line_without_an_end_does_not_fill_the_memory() -> None:
    lines = Lines("qemu", unknown, 5.0)
    found = [line for _ in range(100) for line in lines.receive_data(b"x" * 1000)]
    assert found
    assert all(len(line.text) <= log_lines.MAX_LINE for line in found)


@given(st.lists(st.integers(0, len(HOST)), max_size=5))
def test_any_split_of_a_file_gives_the_same_lines(cuts: list[int]) -> None:
    lines = Lines("host", local_time, 5.0)
    places = [0, *sorted(cuts), len(HOST)]
    pieces = (HOST[a:b] for a, b in itertools.pairwise(places))
    found = [line for piece in pieces for line in lines.receive_data(piece)]
    assert found == Lines("host", local_time, 5.0).receive_data(HOST)


# --- the journal -----------------------------------------------------------------------------------


def entry(message: Any, second: float = 1.0, unit: str = "docker.service", **fields: Any) -> bytes:
    usual = {
        "__REALTIME_TIMESTAMP": str(int(second * 1e6)),
        "__CURSOR": f"at-{second}",
        "_SYSTEMD_UNIT": unit,
        "SYSLOG_IDENTIFIER": "dockerd",
        "MESSAGE": message,
    }
    return json.dumps({**usual, **fields}).encode() + b"\n"


def component_of(unit: str) -> str:
    return "guest" if unit.startswith("agentctl-") else "docker"


def journal(*entries: bytes) -> list[LogLine]:
    return JournalLines(component_of).receive_data(b"".join(entries))


def test_lines_of_the_journal() -> None:
    assert journal(
        entry("starting\nand more", 1.5),
        entry("set back", 1.0, "agentctl-agent.service", SYSLOG_IDENTIFIER=None),
        entry("Started.", 2.0, "init.scope", UNIT="agentctl-files.service", SYSLOG_IDENTIFIER="systemd"),
    ) == [
        LogLine(1.5, "docker", "dockerd: starting"),
        LogLine(1.5, "docker", "dockerd: and more"),
        LogLine(1.5, "guest", "set back"),
        LogLine(2.0, "guest", "systemd: Started."),
    ]


@pytest.mark.parametrize(
    ("message", "texts"),
    [
        ("\x1b[31mred\x1b[0m \x1b]0;title", ["dockerd: red "]),
        ([104, 105, 255], ["dockerd: hi\\xff"]),
        (["first", "second"], ["dockerd: first"]),
        (None, []),
        ({"a": 1}, []),
        ([300, -1], []),
        ("\udc80", ["dockerd: ?"]),
        ("\n\n", []),
        ("x" * 1_000_000, ["dockerd: " + "x" * (log_lines.MAX_LINE - 9)]),
    ],
)
def test_whatever_a_message_is(message: Any, texts: list[str]) -> None:
    assert [line.text for line in journal(entry(message))] == texts


@pytest.mark.parametrize(
    "nonsense",
    [
        b"not json\n",
        b"[]\n",
        b"7\n",
        b"{}\n",
        b'{"__REALTIME_TIMESTAMP": "x", "__CURSOR": "y"}\n',
        b"\xff\xfe\n",
        b"[" * 100_000 + b"\n",
    ],
)
def test_what_is_no_entry_is_left_out(nonsense: bytes) -> None:
    assert [line.text for line in journal(entry("one"), nonsense, entry("two"))] == [
        "dockerd: one",
        "dockerd: two",
    ]


def test_where_it_goes_on() -> None:
    lines = JournalLines(component_of)
    data = entry("one", 1.0) + entry("two", 2.0)
    assert lines.cursor == ""
    found = [line for at in range(len(data)) for line in lines.receive_data(data[at : at + 1])]
    assert [line.text for line in found] == ["dockerd: one", "dockerd: two"]
    assert lines.cursor == "at-2.0"


def test_an_entry_without_an_end_is_given_up() -> None:
    lines = JournalLines(component_of)
    for _ in range(20):
        assert lines.receive_data(b"x" * (log_lines.MAX_ENTRY // 10)) == []
    assert lines.receive_data(b"\n" + entry("again"))[0].text == "dockerd: again"


def test_lines_of_several_sources_by_time() -> None:
    one = [LogLine(1.0, "b", "x"), LogLine(1.0, "b", "a"), LogLine(3.0, "b", "z")]
    other = [LogLine(0.5, "a", "y"), LogLine(2.0, "a", "y")]
    assert "".join(line.text for line in by_time([*one, *other])) == "yxayz"
