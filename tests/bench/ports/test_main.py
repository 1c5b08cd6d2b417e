from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bench.instance import SOURCES
from tests.bench.ports import peers, report
from tests.bench.ports.measurements import MEASUREMENTS
from tests.bench.ports.report import OURS

# Importing a module of this name by statement would be taken for the program itself.
bench = importlib.import_module("tests.bench.ports.__main__")


def test_by_default_everything_is_compared_five_times() -> None:
    chosen = bench.parse([])
    assert chosen.names == [OURS, "ssh -L", "hostfwd"]
    assert chosen.measurements == MEASUREMENTS
    assert chosen.rounds == 5


def test_without_a_vm_there_are_other_peers() -> None:
    assert bench.parse(["--without-vm"]).names == [OURS, "ssh -L", "direct"]


@pytest.mark.parametrize(
    "arguments",
    [["--peers", "nc"], ["--without-vm", "--peers", "hostfwd"], ["--only", "nothing"], ["--rounds", "0"]],
)
def test_what_makes_no_sense_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        bench.parse(arguments)
    assert caught.value.code == 2
    assert "error:" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.skipif(bool(reason), reason=reason))
        for name in peers.LOCAL_PEERS
        for reason in [peers.obstacle(name, vm=False)]
    ],
)
def test_a_run_ends_in_a_table_and_a_file(name: str, tmp_path: Path) -> None:
    """The whole program with each peer that this host has."""
    command = [sys.executable, "-m", "tests.bench.ports", "--without-vm", "--peers", name, "--effort", "tiny"]
    command += ["--rounds", "2", "--only", "*x8", "--only", "connect", "--only", "round trip"]
    command += ["--work", str(tmp_path / "work"), "--json", str(tmp_path / "out.json")]
    done = subprocess.run(command, cwd=SOURCES, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = report.load((tmp_path / "out.json").read_text())
    assert report.table(found) in done.stdout
    assert found.complete
    assert {(cell.row, cell.samples) for cell in found.cells} == {(row.name, 2) for row in found.rows}
    assert all(cell.least > 0 for cell in found.cells)
