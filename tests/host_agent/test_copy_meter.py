"""The line that says how far a copy is."""

from __future__ import annotations

import pytest

from host_agent.copy_meter import Meter, lasting
from protocol.treegauge import Gauge

MIB = 1 << 20


def test_what_is_known_is_told() -> None:
    gauge, meter = Gauge(), Meter()
    gauge.at("/a/big")
    assert meter.line(gauge, 100.0, 80) == "0 B: /a/big"
    gauge.moved(10 * MIB, stays=True)
    assert meter.line(gauge, 102.0, 80) == "10 MiB, 5 MiB/s: /a/big"
    gauge.total = 100 * MIB
    gauge.moved(10 * MIB, stays=True)
    assert meter.line(gauge, 104.0, 80) == "20 MiB of 100 MiB, 20%, 5 MiB/s, 16 s left: /a/big"
    gauge.at("/a/next")
    assert meter.line(gauge, 104.0, 80) == "2 files, 20 MiB of 100 MiB, 20%, 5 MiB/s, 16 s left: /a/next"


def test_what_was_there_is_of_the_whole_and_not_of_the_rate() -> None:
    gauge, meter = Gauge(total=100 * MIB), Meter()
    gauge.at("big")
    gauge.had(50 * MIB)
    meter.line(gauge, 0.0, 80)
    gauge.moved(10 * MIB, stays=True)
    assert meter.line(gauge, 1.0, 80) == "60 MiB of 100 MiB, 60%, 10 MiB/s, 4 s left: big"


def test_the_rate_is_of_the_last_seconds() -> None:
    gauge, meter = Gauge(), Meter()
    gauge.at("big")
    for second in range(20):
        gauge.moved(100 * MIB if second < 10 else MIB, stays=True)
        line = meter.line(gauge, float(second), 80)
    assert line == "1010 MiB, 1 MiB/s: big"


def test_one_that_stands_still_says_no_rate_and_no_end() -> None:
    gauge, meter = Gauge(total=100 * MIB), Meter()
    gauge.at("big")
    gauge.moved(MIB, stays=True)
    for second in range(20):
        line = meter.line(gauge, float(second), 80)
    assert line == "1 MiB of 100 MiB, 1%: big"


def test_more_than_there_seemed_to_be_is_no_more_than_all() -> None:
    gauge = Gauge(total=MIB)
    gauge.at("growing")
    gauge.moved(2 * MIB, stays=True)
    assert Meter().line(gauge, 0.0, 80) == "2 MiB of 2 MiB, 100%: growing"


def test_comparing_is_told() -> None:
    gauge, meter = Gauge(total=100 * MIB), Meter()
    gauge.path = "big"
    meter.line(gauge, 0.0, 80)
    gauge.compared(64 * MIB)
    for now in (2.0, 9.0):
        assert meter.line(gauge, now, 80) == "0 B of 100 MiB, 0%, comparing what is there: big"
    gauge.had(64 * MIB)
    gauge.moved(MIB, stays=True)
    assert meter.line(gauge, 10.0, 80).startswith("65 MiB of 100 MiB, 65%, 1 MiB/s, 35 s left")


def test_another_attempt_has_a_rate_of_its_own() -> None:
    meter, first = Meter(), Gauge(size=100 * MIB)
    meter.line(first, 0.0, 80)
    second = Gauge(size=MIB)
    second.at("big")
    assert meter.line(second, 1.0, 80) == "1 MiB: big"


@pytest.mark.parametrize("width", [10, 30, 40, 60, 79])
def test_it_is_one_line(width: int) -> None:
    gauge = Gauge(total=100 * MIB)
    gauge.at("/home/somebody/" + "deep/" * 30 + "name.iso")
    gauge.moved(MIB, stays=True)
    line = Meter().line(gauge, 0.0, width)
    assert len(line) <= width
    if width > 45:
        assert line.endswith("name.iso")
        assert "..." in line


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "1 s"),
        (42.4, "42 s"),
        (99.4, "99 s"),
        (100, "2 min"),
        (3600, "60 min"),
        (8000, "2 h 13 min"),
        (1e7, "days"),
    ],
)
def test_how_long(seconds: float, text: str) -> None:
    assert lasting(seconds) == text
