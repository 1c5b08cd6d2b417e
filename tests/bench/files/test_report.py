from __future__ import annotations

import dataclasses
import json

import pytest

from tests.bench.files import report
from tests.bench.files.report import OURS, Cell, Freshness, Ratio, Report, Sample


def made(*samples: Sample, peers: list[str] | None = None) -> Report:
    return report.complete(
        Report(
            command=["bench"],
            started="2026-01-01T00:00:00Z",
            seconds=12.5,
            rounds=3,
            peers=peers or [OURS, "sshfs"],
            workloads=["grep cold", "stat"],
            environment={"accelerator": "tcg"},
            sizes={"many": 5},
            procedure="cold means cold",
            unavailable={},
            complete=True,
            samples=list(samples),
        )
    )


def sampled(workload: str, peer: str, *seconds: float, count: int = 7) -> list[Sample]:
    return [Sample(number, workload, peer, value, count) for number, value in enumerate(seconds, 1)]


def test_a_cell_is_the_median_and_the_extremes_of_its_samples() -> None:
    assert report.summarize(sampled("stat", "sshfs", 3.0, 1.0, 8.0)) == [
        Cell("stat", "sshfs", 3, 3.0, 1.0, 8.0)
    ]


def test_of_an_even_number_of_samples_the_median_lies_between() -> None:
    [cell] = report.summarize(sampled("stat", "sshfs", 1.0, 2.0, 4.0, 9.0))
    assert cell.median == 3.0


def test_failed_samples_count_for_nothing() -> None:
    samples = [*sampled("stat", "sshfs", 2.0), Sample(2, "stat", "sshfs", error="no answer")]
    assert report.summarize(samples) == [Cell("stat", "sshfs", 1, 2.0, 2.0, 2.0)]
    assert report.summarize(samples[1:]) == []


def test_ratios_are_ours_over_theirs() -> None:
    cells = report.summarize([*sampled("stat", OURS, 1.0), *sampled("stat", "sshfs", 4.0)])
    assert report.compare(cells) == [Ratio("stat", "sshfs", 0.25)]


def test_there_is_no_ratio_without_ours_or_over_nothing() -> None:
    assert report.compare(report.summarize(sampled("stat", "sshfs", 4.0))) == []
    cells = report.summarize([*sampled("stat", OURS, 1.0), *sampled("stat", "sshfs", 0.0)])
    assert report.compare(cells) == []


def test_a_peer_that_counts_otherwise_is_wrong() -> None:
    wrong = sampled("stat", "sshfs", 1.0, count=3)
    assert (
        report.disagreements([*sampled("stat", OURS, 1.0, 2.0), *wrong, *sampled("ls", OURS, 1.0, count=9)])
        == wrong
    )


def test_the_file_holds_everything() -> None:
    original = made(
        *sampled("stat", OURS, 1.0, 2.0), *sampled("stat", "sshfs", 4.0), Sample(1, "stat", "x", error="e")
    )
    assert report.load(report.dump(original)) == original


def test_whole_seconds_are_read_as_floats() -> None:
    text = report.dump(made(*sampled("stat", OURS, 1.0))).replace("1.0", "1")
    assert isinstance(report.load(text).samples[0].seconds, float)


@pytest.mark.parametrize(
    "change",
    [
        {"format": 1},
        {"samples": [{"round": 1}]},
        {"samples": [3]},
        {"seconds": "long"},
        {"rounds": True},
        {"peers": "sshfs"},
        {"sizes": {"many": "5"}},
        {"more": 1},
    ],
)
def test_what_is_no_report_is_refused(change: dict[str, object]) -> None:
    values = {**dataclasses.asdict(made(*sampled("stat", OURS, 1.0))), **change}
    with pytest.raises(ValueError):
        report.load(json.dumps(values))


def test_a_report_without_a_field_is_refused() -> None:
    values = dataclasses.asdict(made())
    del values["samples"]
    with pytest.raises(ValueError, match="samples"):
        report.load(json.dumps(values))


def test_the_table_has_a_row_for_each_workload_and_ratios_of_ours() -> None:
    found = made(*sampled("grep cold", OURS, 2.0, 2.0, 2.0), *sampled("grep cold", "sshfs", 8.0, 8.0, 8.0))
    header, _, grep, stat, *_ = report.table(found).splitlines()
    assert header.split("  ")[-1].strip() == "agentctl / sshfs"
    assert grep.split() == ["grep", "cold", "2.00", "8.00", "0.250x"]
    assert stat.split() == ["stat", "-", "-", "-"]


def test_the_table_has_no_ratios_without_ours() -> None:
    table = report.table(made(*sampled("stat", "sshfs", 1.0), peers=["sshfs", "ext4"]))
    assert "/" not in table.splitlines()[0]


def test_the_table_marks_samples_that_are_far_apart() -> None:
    table = report.table(made(*sampled("stat", OURS, 1.0, 2.1, 1.1)))
    assert "~1.10" in table
    assert "~ the slowest" in table
    assert "~" not in report.table(made(*sampled("stat", OURS, 1.0, 2.0, 1.1)))


def test_the_table_says_what_is_missing_failed_and_wrong() -> None:
    found = made(
        *sampled("stat", OURS, 1.0),
        *sampled("stat", "sshfs", 1.0, count=0),
        Sample(2, "stat", "sshfs", error="no answer"),
    )
    text = report.table(dataclasses.replace(found, unavailable={"virtiofs": "no virtiofsd"}))
    assert "virtiofs is missing: no virtiofsd" in text
    assert "failed: stat on sshfs: no answer" in text
    assert "wrong: stat on sshfs counted 0" in text
    assert "accelerator: tcg" in text


def test_the_table_tells_of_how_few_samples_a_median_is() -> None:
    table = report.table(made(*sampled("stat", OURS, 1.0, 1.0)))
    assert "(2) 1.00" in table
    assert "(n) of n samples only" in table
    assert "(n)" not in report.table(made(*sampled("stat", OURS, 1.0, 1.0, 1.0)))


def test_a_table_of_nothing_says_so() -> None:
    assert "nothing was timed" in report.table(made())


def test_the_table_says_when_edits_were_seen() -> None:
    fresh = [
        Freshness(OURS, 1000, 0.004, 0.03, 0.05, 0.0005),
        Freshness("sshfs", 2, error="not seen within 30 s"),
    ]
    found = dataclasses.replace(made(), freshness=fresh)
    lines = report.table(found).splitlines()
    [row] = [line for line in lines if line.startswith(OURS)]
    assert row.split() == [OURS, "4.00", "30.0", "50.0", "1,000", "0.500"]
    assert "failed: edits on sshfs: not seen within 30 s" in lines
    assert report.load(report.dump(found)) == found
