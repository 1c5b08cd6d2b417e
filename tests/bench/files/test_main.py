from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bench.files import local, report
from tests.bench.files.runner import select
from tests.bench.instance import SOURCES, InstanceFailed

# Importing a module of this name by statement would be taken for the program itself.
bench = importlib.import_module("tests.bench.files.__main__")


def test_by_default_everything_is_compared_five_times() -> None:
    chosen = bench.parse([])
    assert chosen.names == ["agentctl", "sshfs", "virtiofs", "ext4"]
    assert chosen.workloads == select([])
    assert chosen.rounds == 5


def test_peers_and_workloads_can_be_chosen() -> None:
    chosen = bench.parse(["--peers", "ext4,sshfs", "--only", "git*", "--only", "stat", "--rounds", "2"])
    assert chosen.names == ["ext4", "sshfs"]
    assert chosen.workloads == ("stat", "git status cold", "git status warm")


def test_edits_are_measured_unless_something_else_is_named() -> None:
    assert bench.parse([]).edits == 1000
    assert bench.parse(["--only", "stat"]).edits == 0
    chosen = bench.parse(["--only", "edits", "--edits", "7"])
    assert chosen.workloads == ()
    assert chosen.edits == 7


def test_without_a_vm_there_are_other_peers() -> None:
    assert bench.parse(["--without-vm"]).names == list(local.PEERS)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--peers", "nfs"],
        ["--without-vm", "--peers", "virtiofs"],
        ["--only", "nothing"],
        ["--rounds", "0"],
        ["--only", "edits", "--edits", "0"],
        ["--full", "--small"],
    ],
)
def test_what_makes_no_sense_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        bench.parse(arguments)
    assert caught.value.code == 2
    assert "error:" in capsys.readouterr().err


def can_make_namespaces() -> bool:
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    return (
        subprocess.run(["unshare", *user, "--mount", "true"], capture_output=True, check=False).returncode
        == 0
    )


@pytest.mark.skipif(not can_make_namespaces(), reason="no mount namespaces here")
def test_a_run_on_the_plain_directory_ends_in_a_table_and_a_file(tmp_path: Path) -> None:
    """The whole program, with the one peer that needs no mount."""
    command = [sys.executable, "-m", "tests.bench.files", "--without-vm", "--peers", "plain", "--small"]
    command += ["--only", "find", "--only", "append", "--rounds", "2", "--work", str(tmp_path / "work")]
    command += ["--only", "edits", "--edits", "30"]
    command += ["--json", str(tmp_path / "out.json")]
    done = subprocess.run(command, cwd=SOURCES, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found = report.load((tmp_path / "out.json").read_text())
    assert report.table(found) in done.stdout
    assert found.complete
    assert [(cell.workload, cell.samples) for cell in found.cells] == [
        ("find cold", 2), ("find warm", 2), ("append", 2),
    ]  # fmt: skip
    [fresh] = found.freshness
    assert (fresh.peer, fresh.edits, fresh.error) == ("plain", 30, "")
    assert -fresh.doubt <= fresh.p50 <= fresh.p99 <= fresh.worst < 1
    assert json.loads(json.dumps(found.sizes))["many"] > 0
    assert not (tmp_path / "work" / "share").exists()


def test_two_runs_do_not_share_a_directory(tmp_path: Path) -> None:
    chosen = bench.parse(["--work", str(tmp_path / "work")])
    with bench.directory(chosen):
        with pytest.raises(InstanceFailed, match="another run"):
            with bench.directory(chosen):
                pass
        assert (tmp_path / "work" / "share").is_dir()
    with bench.directory(chosen):
        pass
