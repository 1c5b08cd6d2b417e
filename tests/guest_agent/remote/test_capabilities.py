from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from guest_agent.fuse import fusermount, mounting
from guest_agent.fuse.mountinfo import mounted_shares, read_mounts
from guest_agent.fuse.mounting import MountError
from guest_agent.remote import capabilities
from guest_agent.remote.__main__ import main
from guest_agent.remote.capabilities import (
    find_docker,
    find_mounts,
    kills_processes,
    unseen_by_containers,
)
from protocol.capabilities import Docker, Mounts
from tests.guest_agent.remote.conftest import REPOSITORY, Machine


async def test_the_answer_is_one_line_behind_the_nonce(machine: Machine) -> None:
    done = await machine.run("check", "--nonce", "n0nce")
    assert (done.returncode, done.stderr) == (0, b"")
    word, nonce, said = done.stdout.decode("ascii").split(" ", 2)
    assert (word, nonce) == ("agentctl-check", "n0nce")
    assert said.count("\n") == 1
    found = json.loads(said)
    assert found["format"] == 1
    assert (found["uid"], found["root"], found["home"]) == (
        os.geteuid(),
        os.geteuid() == 0,
        str(machine.home),
    )
    assert found["ports"] in ("tracefs", "polling")
    assert found["mounts"]["ok"] == (not found["mounts"]["problem"])
    for problem in found["problems"]:
        assert problem["what"]
        assert problem["fix"]


def test_nothing_is_left_of_what_was_tried() -> None:
    before = read_mounts()
    found = find_mounts(os.geteuid() == 0)
    if not found.ok:
        pytest.skip(found.problem)
    assert mounted_shares(read_mounts()) == mounted_shares(before)


def test_a_kernel_that_does_not_let_us(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(spec: mounting.MountSpec) -> tuple[int, int]:
        raise MountError(f"{spec.path} cannot be mounted: Operation not permitted")

    monkeypatch.setattr(mounting, "mount_afresh", refuse)
    found = find_mounts(True)
    assert not found.ok
    assert "Operation not permitted" in found.problem
    assert "CAP_SYS_ADMIN" in found.fix


def test_a_machine_without_fuse(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(spec: mounting.MountSpec) -> tuple[int, int]:
        raise FileNotFoundError(2, "No such file or directory", "/dev/fuse")

    monkeypatch.setattr(mounting, "mount_afresh", refuse)
    found = find_mounts(True)
    assert found.problem.endswith("/dev/fuse: No such file or directory")
    assert "modprobe fuse" in found.fix


def test_what_is_in_an_ordinary_users_way_is_told_with_its_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusermount, "obstacle", lambda: fusermount.Obstacle("a problem", "do this"))
    assert find_mounts(False) == Mounts(
        False, problem="no folder can be mounted there: a problem", fix="there, do this"
    )


def test_docker_is_where_it_answers(tmp_path: Path) -> None:
    gone, here = tmp_path / "gone.sock", tmp_path / "docker.sock"
    with socket.socket(socket.AF_UNIX) as left, socket.socket(socket.AF_UNIX) as docker:
        left.bind(str(gone))
        docker.bind(str(here))
        docker.listen()
        assert find_docker([tmp_path / "none", gone, here]) == Docker(str(here))
    assert find_docker([tmp_path / "none", gone]) == Docker()


def test_docker_that_does_not_let_us_in_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refused(socket.socket):
        def connect(self, address: object) -> None:
            raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(capabilities.socket, "socket", Refused)
    found = find_docker([tmp_path / "docker.sock"])
    assert found.socket == ""
    assert "usermod -aG docker" in found.fix


def test_mounts_that_containers_do_not_see() -> None:
    docker = Docker("/run/docker.sock")
    (problem,) = unseen_by_containers(Mounts(True, "fusermount3"), docker)
    assert "user_allow_other" in problem.fix
    assert unseen_by_containers(Mounts(True, "fusermount3"), Docker()) == []
    assert unseen_by_containers(Mounts(True, "fusermount3", allow_other=True), docker) == []
    assert unseen_by_containers(Mounts(False), docker) == []


def test_a_machine_that_ends_what_a_login_leaves(tmp_path: Path) -> None:
    assert kills_processes(False, tmp_path) == []
    (tmp_path / "logind.conf").write_text("[Login]\n#KillUserProcesses=yes\nKillUserProcesses=no\n")
    assert kills_processes(False, tmp_path) == []
    (tmp_path / "logind.conf.d").mkdir()
    (tmp_path / "logind.conf.d" / "ours.conf").write_text("[Login]\nKillUserProcesses = Yes\n")
    (problem,) = kills_processes(False, tmp_path)
    assert "KillUserProcesses=no" in problem.fix
    assert kills_processes(True, tmp_path) == []


@pytest.mark.parametrize(
    "words",
    [[], ["check", "--nonce"], ["connect", "other", "one"], ["connect", "files", "one", "--grace", "soon"]],
)
def test_what_makes_no_sense(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err


def test_nothing_that_a_connection_waits_for_imports_trio() -> None:
    """Which takes 0.3 s to import, where it is compiled already."""
    program = (
        "import sys, guest_agent.remote.__main__\n"
        "from guest_agent.remote import capabilities, connector, ending\n"
        "assert not {'trio', 'msgpack', 'pyroute2', 'asyncio'} & set(sys.modules), sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=REPOSITORY, timeout=60)
