from __future__ import annotations

import dataclasses
import json
import os
import tarfile
import time
from pathlib import Path

import pytest

from tests.bench.files import trees, workloads
from tests.bench.files.trees import Sizes
from tests.bench.files.workloads import GROUPS, WORKLOADS, Request, Server, Workload

TINY = Sizes(
    source=30, modules=30, many=30, repository=30, big=300_000, text=200_000, written=2 << 20,
    unpacked=30, stats=70, appends=5, opens=5,
)  # fmt: skip

# 30 things are in two folders of up to 25.
COUNTS = {
    "grep cold": 0,
    "grep warm": 0,
    "open+close": 5,
    "import warm": 33,
    "cat cold": 300_000,
    "cat text cold": 200_000,
    "cat warm": 300_000,
    "find cold": 33,
    "find warm": 33,
    "ls -lR": 40,
    "stat": 70,
    "git status cold": 30,
    "git status warm": 30,
    "cp -r cold": 0,
    "write+fsync": 2 << 20,
    "unpack": 30,
    "rm -r": 0,
    "append": 500,
}


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    trees.make(tmp_path / "share", ["plain"], TINY)
    return tmp_path / "share"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    for name in ("HOME", "LC_ALL", "GIT_DIR"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # what the server changes is put back
    (tmp_path / "scratch").mkdir()
    return Server(dataclasses.asdict(TINY), tmp_path / "scratch")


def request(name: str, shared: Path, *, warm_up: bool = False) -> Request:
    common, own = str(shared / "common"), str(shared / "plain")
    return Request(name, common, own, str(shared.parent), drop=False, warm_up=warm_up)


def test_every_workload_counts_what_it_saw(server: Server, shared: Path) -> None:
    answers = {name: server.perform(request(name, shared)) for name in WORKLOADS}
    assert {name: answer.get("error", answer.get("count")) for name, answer in answers.items()} == COUNTS
    assert all(answer["seconds"] > 0 for answer in answers.values())


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_workload_stands_alone_and_can_be_repeated(name: str, server: Server, shared: Path) -> None:
    for warm_up in (False, WORKLOADS[name].warm):
        assert server.perform(request(name, shared, warm_up=warm_up))["count"] == COUNTS[name]


def test_nothing_is_left_in_the_mount(server: Server, shared: Path) -> None:
    for name in WORKLOADS:
        server.perform(request(name, shared))
    assert sorted(path.name for path in (shared / "plain").iterdir()) == ["repository"]
    assert not (shared.parent / "copied").exists()


def test_a_wrong_mount_is_an_error_and_no_time(server: Server, shared: Path, tmp_path: Path) -> None:
    (shared / "plain" / "repository" / "folder_000" / "file_00000.txt").write_text("changed")
    answer = server.perform(request("git status warm", shared))
    assert "sees changes" in answer["error"]
    assert "FileNotFoundError" in server.perform(request("cat cold", tmp_path / "nowhere"))["error"]
    assert "error" in server.perform(request("no such workload", shared))


def test_only_the_run_is_timed(server: Server, shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def takes(seconds: float) -> int:
        nonlocal now
        now += seconds
        return 1

    slow = Workload(
        "slow", lambda place: takes(2), before=lambda place: takes(100), after=lambda place: takes(1000)
    )
    monkeypatch.setitem(WORKLOADS, "slow", slow)
    monkeypatch.setattr(time, "monotonic", lambda: now)
    assert server.perform(request("slow", shared, warm_up=True)) == {"seconds": 2.0, "count": 1}
    assert now == 1104


def test_caches_are_dropped_for_cold_workloads_and_only_where_that_is_allowed(
    server: Server, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropped = []
    monkeypatch.setattr(workloads, "drop_caches", lambda: dropped.append(True))
    for name in ("find cold", "find warm", "append"):
        server.perform(dataclasses.replace(request(name, shared), drop=True))
    assert len(dropped) == 1


def test_the_archive_has_the_same_files_every_time(tmp_path: Path) -> None:
    for name in ("a", "b"):
        workloads.make_archive(tmp_path / name, 60)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with tarfile.open(tmp_path / "a") as archive:
        assert sum(member.isfile() for member in archive) == 60


def test_requests_are_lines_of_json() -> None:
    one = Request("stat", "/c", "/o", "/g", drop=True, warm_up=False)
    import io

    line = json.dumps(dataclasses.asdict(one)) + "\n"
    assert list(workloads.requests(io.StringIO(line * 2))) == [one, one]


def test_a_group_begins_with_what_is_cold_or_needs_no_warmth() -> None:
    for group in GROUPS:
        assert all(not workload.cold for workload in group[1:])
    assert len(WORKLOADS) == sum(map(len, GROUPS))
