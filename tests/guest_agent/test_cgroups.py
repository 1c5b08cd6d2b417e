from __future__ import annotations

from pathlib import Path

import pytest

from guest_agent import cgroups
from guest_agent.cgroups import Units, unit_of


@pytest.mark.parametrize(
    ("path", "unit"),
    [
        ("/system.slice/docker.service", "docker.service"),
        ("/system.slice/docker.service/init", "docker.service"),
        ("/system.slice/docker-0123abcd.scope", "docker-0123abcd.scope"),
        ("/user.slice/user-1000.slice/session-1.scope", "session-1.scope"),
        ("/user.slice/user-1000.slice/user@1000.service/app.slice/x.service", "user@1000.service"),
        ("/init.scope", "init.scope"),
        ("/docker/0123abcd", ""),
        ("/system.slice", ""),
        ("", ""),
    ],
)
def test_unit_of_a_path(path: str, unit: str) -> None:
    assert unit_of(path) == unit


def test_ids_are_inode_numbers_and_one_walk_learns_all(tmp_path: Path) -> None:
    docker = tmp_path / "system.slice/docker.service"
    ssh = tmp_path / "system.slice/ssh.service"
    docker.mkdir(parents=True)
    ssh.mkdir()
    units = Units(tmp_path)
    assert units.name(docker.stat().st_ino) == "docker.service"
    assert units.name(ssh.stat().st_ino) == "ssh.service"
    assert units.walks == 1


def test_a_new_cgroup_is_found_and_a_gone_one_is_not_looked_for_twice(tmp_path: Path) -> None:
    units = Units(tmp_path)
    assert units.name(1) == ""
    assert units.name(1) == ""
    assert units.walks == 1
    late = tmp_path / "late.scope"
    late.mkdir()
    assert units.name(late.stat().st_ino) == "late.scope"


def test_the_cache_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroups, "MAX_CACHED", 10)
    units = Units(tmp_path)
    for absent in range(1, 50):
        units.name(absent)
    assert len(units._names) <= 12


def test_without_cgroup2_nothing_is_known() -> None:
    assert Units(None).name(5) == ""
