from __future__ import annotations

import importlib

import pytest

from tests.bench.attached import report
from tests.bench.attached.report import Attached, Line
from tests.bench.files.report import Report, Sample, complete
from tests.bench.files.workloads import WORKLOADS

# Importing a module of this name by statement would be taken for the program itself.
bench = importlib.import_module("tests.bench.attached.__main__")


def test_by_default_three_lines_are_compared() -> None:
    chosen = bench.parse([])
    assert chosen.lines == [0.0, 0.02, 0.1]
    assert chosen.names == ["agentctl", "sshfs"]
    assert chosen.workloads == bench.WORKLOADS


def test_a_line_with_a_rate_is_for_what_it_is_slow_for() -> None:
    chosen = bench.parse(["--rate", "2MB/s"])
    assert chosen.bytes_a_second == 2e6
    assert chosen.names == ["agentctl", "unpacked", "sshfs", "sshfs-C"]
    assert chosen.workloads == bench.PACKING_WORKLOADS
    assert set(chosen.workloads) <= set(WORKLOADS)
    assert bench.parse_rate("1.5kB") == 1500


@pytest.mark.parametrize(
    "arguments",
    [
        ["--round-trips", "x"],
        ["--round-trips", "-1"],
        ["--peers", "nfs"],
        ["--rounds", "0"],
        ["--rate", "0MB/s"],
        ["--rate", "2"],
        ["--only", "nothing", "--edits", "0"],
    ],
)
def test_what_makes_no_sense_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        bench.parse(arguments)
    assert caught.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_a_report_is_what_was_written() -> None:
    one = complete(
        Report(
            command=[],
            started="",
            seconds=1.0,
            rounds=1,
            peers=["agentctl", "sshfs"],
            workloads=["grep cold"],
            environment={},
            sizes={},
            procedure="",
            unavailable={},
            complete=True,
            samples=[Sample(1, "grep cold", "agentctl", 1.0), Sample(1, "grep cold", "sshfs", 4.0)],
        )
    )
    found = Attached([Line(0.02, one)])
    assert report.load(report.dump(found)) == found
    assert "20 ms" in report.tables(found.lines)
    assert "0.250x" in report.tables(found.lines)
    assert report.markdown(found).splitlines() == [
        "| seconds | agentctl, 20 ms | sshfs, 20 ms | / sshfs |",
        "|---|---|---|---|",
        "| grep cold | 1.00 | 4.00 | 0.250x |",
        "",
    ]
