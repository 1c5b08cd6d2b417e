from __future__ import annotations

import dataclasses
import json

import pytest

from tests.bench.ports import report
from tests.bench.ports.report import OURS, Cell, Ratio, Report, Row, Sample

ROWS = [Row("to guest x1", "MB/s"), Row("connect p50", "us")]


def made(*samples: Sample, peers: list[str] | None = None) -> Report:
    return report.complete(
        Report(
            command=["bench"],
            started="2026-01-01T00:00:00Z",
            seconds=12.5,
            rounds=3,
            peers=peers or [OURS, "ssh -L"],
            rows=ROWS,
            environment={"accelerator": "tcg"},
            effort={"seconds": 2.0},
            procedure="only what has arrived",
            unavailable={},
            complete=True,
            samples=list(samples),
        )
    )


def sampled(row: str, peer: str, *values: float) -> list[Sample]:
    return [Sample(number, row, peer, value) for number, value in enumerate(values, 1)]


def test_a_cell_is_the_median_and_the_extremes_of_the_good_samples() -> None:
    samples = [*sampled("connect p50", "x", 3.0, 1.0, 8.0), Sample(4, "connect p50", "x", error="no answer")]
    assert report.summarize(samples) == [Cell("connect p50", "x", 3, 3.0, 1.0, 8.0)]
    assert report.summarize(samples[3:]) == []


def test_ratios_are_ours_over_theirs() -> None:
    cells = report.summarize([*sampled("to guest x1", OURS, 40.0), *sampled("to guest x1", "ssh -L", 10.0)])
    assert report.compare(cells) == [Ratio("to guest x1", "ssh -L", 4.0)]


def test_there_is_no_ratio_without_ours_or_over_nothing() -> None:
    assert report.compare(report.summarize(sampled("to guest x1", "ssh -L", 4.0))) == []
    cells = report.summarize([*sampled("to guest x1", OURS, 1.0), *sampled("to guest x1", "ssh -L", 0.0)])
    assert report.compare(cells) == []


def test_the_file_holds_everything() -> None:
    original = made(*sampled("connect p50", OURS, 1.0), Sample(1, "connect p50", "ssh -L", error="no answer"))
    assert report.load(report.dump(original)) == original


@pytest.mark.parametrize(
    "change", [{"format": 2}, {"rows": ["x"]}, {"effort": {"seconds": "2"}}, {"more": 1}]
)
def test_what_is_no_report_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        report.load(json.dumps({**dataclasses.asdict(made()), **change}))


def test_the_table_has_units_and_ratios_of_ours() -> None:
    found = made(
        *sampled("to guest x1", OURS, 40.0, 41.0, 42.0), *sampled("to guest x1", "ssh -L", 10.0, 10.25, 10.5)
    )
    header, _, throughput, connect, *_ = report.table(found).splitlines()
    assert header.endswith("agentctl / ssh -L")
    assert throughput.split() == ["to", "guest", "x1", "MB/s", "41.0", "10.2", "4.00x"]
    assert connect.split() == ["connect", "p50", "us", "-", "-", "-"]


def test_the_table_has_no_ratios_without_ours() -> None:
    table = report.table(made(*sampled("connect p50", "ssh -L", 1.0), peers=["ssh -L", "hostfwd"]))
    assert "/" not in table.splitlines()[0]
    assert "ratios" not in table


def test_the_table_says_how_far_to_trust_it() -> None:
    found = made(
        *sampled("connect p50", OURS, 1.0, 2.1, 1.1),
        *sampled("to guest x1", "ssh -L", 7.0),
        Sample(2, "to guest x1", "ssh -L", error="nothing came for too long"),
    )
    text = report.table(dataclasses.replace(found, unavailable={"hostfwd": "it does not answer"}))
    assert "~1.10" in text
    assert "~ the greatest sample" in text
    assert "(1) 7.00" in text
    assert "(n) of n samples only" in text
    assert "failed: to guest x1 on ssh -L: nothing came for too long" in text
    assert "hostfwd is missing: it does not answer" in text
    assert "a sample: seconds 2" in text
    assert "accelerator: tcg" in text


def test_a_table_of_nothing_says_so() -> None:
    assert "nothing was measured" in report.table(made())
