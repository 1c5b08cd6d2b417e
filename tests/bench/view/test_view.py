from __future__ import annotations

import importlib
import itertools
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.bench.files import report
from tests.bench.view import peers, workloads
from tests.bench.view.workloads import MAKE_TREE, WORKLOADS, PeerFailed, Plan, Run

# Importing a module of this name by statement would be taken for the program itself.
bench = importlib.import_module("tests.bench.view.__main__")


class Plain(peers.Mount):
    """A directory; what is made anew is counted."""

    def __init__(self, name: str, tree: Path) -> None:
        self.name, self.tree, self.renewed = name, tree, 0

    def renew(self) -> None:
        self.renewed += 1


class CopyOnly:
    name = "copies"
    tree = None

    def __init__(self, tree: Path) -> None:
        self._from = tree

    def renew(self) -> None:
        """It keeps nothing."""

    def copy(self, name: str, to: Path) -> None:
        source = self._from / name
        shutil.copytree(source, to) if source.is_dir() else shutil.copy(source, to)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    command = ["sh", "-euc", MAKE_TREE, "sh", str(tmp_path / "tree"), "60", "100000"]
    subprocess.run(command, check=True, timeout=60)
    return tmp_path / "tree"


def plan(tmp_path: Path, rounds: int = 2, limit: float = 1e9) -> Plan:
    (tmp_path / "scratch").mkdir()
    ticks = itertools.count()
    return Plan(rounds, tmp_path / "scratch", limit, lambda: float(next(ticks)))


def test_the_tree_is_what_it_says_and_the_same_each_time(tree: Path, tmp_path: Path) -> None:
    small = sorted(path for path in (tree / "small").rglob("*.txt"))
    assert len(small) == 60
    assert len(list((tree / "small").iterdir())) == 3
    assert all(path.read_text().count(workloads.NEEDLE) == 1 for path in small)
    assert (tree / workloads.BIG).stat().st_size == 100_000
    command = ["sh", "-euc", MAKE_TREE, "sh", str(tmp_path / "again"), "60", "100000"]
    subprocess.run(command, check=True, timeout=60)
    assert (
        subprocess.run(["diff", "-r", tree / "small", tmp_path / "again/small"], check=False).returncode == 0
    )


def test_all_peers_count_the_same_and_who_only_copies_is_asked_for_nothing_else(
    tree: Path, tmp_path: Path
) -> None:
    found = [Plain("agentctl", tree), CopyOnly(tree), Plain("sshfs", tree)]
    samples = list(Run(plan(tmp_path), found).samples())
    assert [sample.error for sample in samples if sample.error] == []
    assert report.disagreements(samples) == []
    assert {sample.workload for sample in samples} == {workload.name for workload in WORKLOADS}
    assert {sample.workload for sample in samples if sample.peer == "copies"} == {
        "copy the tree",
        "copy one file",
    }
    # Each but a warm one begins with a mount made anew.
    assert found[0].renewed == 2 * sum(not workload.warm for workload in WORKLOADS)
    assert [sample.peer for sample in samples if sample.workload == "find"] == [
        "agentctl",
        "sshfs",
        "sshfs",
        "agentctl",
    ]
    assert list((tmp_path / "scratch").iterdir()) == []


def test_a_failure_is_a_sample_and_the_others_go_on(tree: Path, tmp_path: Path) -> None:
    class Lost(Plain):
        def renew(self) -> None:
            raise PeerFailed("it is away")

    samples = list(
        Run(plan(tmp_path, 1), [Lost("agentctl", tree), Plain("sshfs", tmp_path / "none")]).samples()
    )
    assert {
        sample.error for sample in samples if sample.peer == "agentctl" and "warm" not in sample.workload
    } == {"it is away"}
    assert all("No such file" in sample.error for sample in samples if sample.peer == "sshfs")


def test_when_time_is_over_nothing_is_begun(tree: Path, tmp_path: Path) -> None:
    run = Run(plan(tmp_path, limit=-1), [Plain("agentctl", tree)])
    assert list(run.samples()) == []
    assert run.out_of_time


def test_who_cannot_be_had_is_said(monkeypatch: pytest.MonkeyPatch, tree: Path) -> None:
    monkeypatch.setattr(peers, "obstacle", lambda name: "no sshfs" if name == "sshfs" else "")
    found, missing = bench.offered(["agentctl", "sshfs"], lambda name: Plain(name, tree))
    assert [peer.name for peer in found] == ["agentctl"]
    assert missing == {"sshfs": "no sshfs"}


@pytest.mark.parametrize(
    "arguments", [["--peers", "nfs"], ["--rounds", "0"], ["--files", "0"], ["--big", "x"]]
)
def test_what_makes_no_sense_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        bench.parse(arguments)
    assert caught.value.code == 2
    assert "error:" in capsys.readouterr().err
