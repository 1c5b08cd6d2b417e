"""Host folders in the VM and its containers, as a user meets them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.harness import NO_NETWORK, SOURCES, Instance, eventually

pytestmark = pytest.mark.vm

WRITERS = 4

#: What a container does while an agent is killed: numbered lines of each writer, each reported once the write has
#: returned. It ends well if they all do.
WRITING = """
write() {
    i=0
    while [ ! -e /src/stop ]; do
        i=$((i + 1))
        echo "$1 $i" >>/src/log-$1 || { echo "$1 failed"; exit 1; }
        echo "$1 $i"
    done
}
pids=
for name; do
    write $name &
    pids="$pids $!"
done
for pid in $pids; do
    wait $pid || exit 1
done
"""


def run(vm: Instance, image: str, project: Path, script: str, *options: str) -> str:
    """The output of a shell script in a container that has ``project`` at /src."""
    command = ("run", "--rm", *NO_NETWORK, *options, "-v", f"{project}:/src")
    return vm.docker(*command, image, "/bin/sh", "-c", script)


def mounts(vm: Instance) -> dict[str, dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(vm.agentctl("mounts", "--json").stdout)
    return {row["guest_path"]: row for row in rows}


def in_guest(vm: Instance, project: Path, *command: str) -> str:
    """The output of one of tests/files' scripts, which need nothing but Python, run in the guest."""
    scripts = project / ".scripts"
    if not scripts.exists():
        shutil.copytree(SOURCES / "tests" / "files", scripts)
    done = vm.agentctl("exec", "-u", "root", "-w", str(scripts), "python3", "-B", *command, timeout=1200)
    return done.stdout.decode()


def files_agent_pid(vm: Instance) -> int:
    return int(vm.guest("systemctl show -P MainPID agentctl-files.service"))


def file_server_pid(vm: Instance) -> int:
    """0 while there is none."""
    for pid in vm.processes():
        with contextlib.suppress(OSError):
            if b"host_agent.fileserver" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
    return 0


def test_the_home_is_there_at_its_own_path(vm: Instance) -> None:
    home = mounts(vm)[str(Path.home())]
    assert (home["state"], home["read_only"]) == ("mounted", False)
    assert vm.guest("echo ~", user="").strip() != str(Path.home()), "the guest's own home is elsewhere"


def test_a_container_and_the_host_see_each_others_files(vm: Instance, image: str, project: Path) -> None:
    (project / "in").mkdir()
    (project / "in" / "hello.txt").write_text("from the host\n")
    said = run(vm, image, project, "cat /src/in/hello.txt && echo from the container >/src/in/answer")
    assert said == "from the host"
    answer = project / "in" / "answer"
    assert answer.read_text() == "from the container\n"
    assert answer.stat().st_uid == os.getuid()


def test_a_running_container_sees_an_edit(vm: Instance, image: str, project: Path) -> None:
    page = project / "index.html"
    page.write_text("one\n")
    options = ("-d", "--name", "watcher", *NO_NETWORK, "-v", f"{project}:/src")
    vm.docker("run", *options, image, "/bin/sh", "-c", "sleep 600")
    try:

        def seen() -> str:
            return vm.docker("exec", "watcher", "/bin/busybox", "cat", "/src/index.html")

        assert seen() == "one"
        page.write_text("two, in place\n")
        assert seen() == "two, in place"
        # As editors save: a new file over the old name.
        (project / ".index.html.swp").write_text("three\n")
        (project / ".index.html.swp").rename(page)
        assert seen() == "three"
        page.unlink()
        assert vm.docker("exec", "watcher", "/bin/busybox", "ls", "/src") == ""
    finally:
        vm.docker("rm", "-f", "watcher")


def test_build_and_compose_from_the_mount(vm: Instance, image: str, project: Path) -> None:
    (project / "Dockerfile").write_text(f"FROM {image}\nCOPY page /www/index.html\n")
    (project / "page").write_text("built\n")
    vm.docker("build", "-t", "built-on-host", str(project))
    # By a docker command line in the guest: there the context is read through the mount.
    vm.guest(f"cd {project} && docker build -t built-in-guest .")
    for built in ("built-on-host", "built-in-guest"):
        assert vm.docker("run", "--rm", built, "/bin/busybox", "cat", "/www/index.html") == "built"
    (project / "compose.yaml").write_text(
        f"services:\n  one:\n    image: {image}\n    command: /bin/busybox cat /data/page\n    volumes: ['.:/data']\n"
    )
    compose = ("compose", "-f", str(project / "compose.yaml"))
    try:
        assert "built" in vm.docker(*compose, "up", "--no-log-prefix")
    finally:
        vm.docker(*compose, "down")
        vm.docker("rmi", "built-on-host", "built-in-guest")


def test_git_in_the_guest(vm: Instance, project: Path) -> None:
    vm.guest(
        f"""set -e
        export GIT_CONFIG_GLOBAL=/dev/null GIT_AUTHOR_NAME=a GIT_AUTHOR_EMAIL=a@b GIT_COMMITTER_NAME=a GIT_COMMITTER_EMAIL=a@b
        cd {project} && git init -q . && mkdir -p a/b && echo one >a/b/c && ln -s b a/link && git add . && git commit -qm one
        echo two >>a/b/c && git commit -qam two && git gc -q && git clone -q . ../{project.name}/copy && git -C copy fsck --strict""",
        user="",
    )
    log = subprocess.run(
        ["git", "-c", "safe.directory=*", "-C", str(project / "copy"), "log", "--format=%s"],
        capture_output=True,
        check=True,
    )
    assert log.stdout.split() == [b"two", b"one"]
    assert os.readlink(project / "copy" / "a" / "link") == "b"


def test_posix_on_the_mount_is_what_it_is_on_ext4(
    vm: Instance, project: Path, request: pytest.FixtureRequest
) -> None:
    """A sample of the rows: an emulated guest is slow, and all of them are compared on this host's own kernel."""
    from tests.files.accepted import ACCEPTED, BY_AN_ORDINARY_USER

    shared = project / "table"
    shared.mkdir(mode=0o755)
    project.chmod(0o755)
    local = "/var/lib/agentctl/table"
    vm.guest(f"mkdir -p -m 755 {local}")
    every = 1 if request.config.getoption("--long") else 6
    options = ("--names", "300", "--every", str(every))
    below = json.loads(in_guest(vm, project, "posix_table.py", local, *options))
    mounted = json.loads(in_guest(vm, project, "posix_table.py", str(shared), *options))
    assert len(below) > 600 // every
    assert mounted.keys() == below.keys()
    wrong = {
        row: (below[row], outcome)
        for row, outcome in mounted.items()
        if outcome != below[row]
        and outcome != ACCEPTED.get(row, (below[row],))[0]
        and not row.startswith(BY_AN_ORDINARY_USER)
    }
    assert not wrong, json.dumps(wrong, indent=1)


def test_random_operations_in_the_guest(vm: Instance, project: Path, request: pytest.FixtureRequest) -> None:
    count = 20_000 if request.config.getoption("--long") else 1_000
    said = in_guest(vm, project, "fsx.py", str(project), "--operations", str(count))
    slowest = re.search(r"the slowest ([\d.]+) s \((\w+)\)", said)
    assert slowest, said
    # **Seen:** what waits for a message that nobody has been told of goes on with the next one, up to 5 s later.
    assert float(slowest[1]) < 2, f"{slowest[2]} stood still for {slowest[1]} s"


@pytest.mark.parametrize("victim", ["file server", "files agent", "host agent"])
def test_writes_survive_a_killed_agent(vm: Instance, image: str, project: Path, victim: str) -> None:
    """Programs keep writing; what was reported as written is there, once and in order."""
    names = [f"writer{number}" for number in range(WRITERS)]
    options = ("-d", "--name", "writers", *NO_NETWORK, "-v", f"{project}:/src")
    vm.docker("run", *options, image, "/bin/sh", "-c", WRITING, "sh", *names)
    try:
        for name in names:
            eventually(lambda name=name: lines(project / f"log-{name}") > 20)
        for _ in range(3):
            kill(vm, victim)
            grows(project, names)
        (project / "stop").touch()
        assert vm.docker("wait", "writers") == "0", vm.docker("logs", "writers")
        reported = vm.docker("logs", "writers").splitlines()
        assert {line.split()[0] for line in reported} == set(names)
        for name in names:
            mine = [line for line in reported if line.split()[0] == name]
            assert mine == [f"{name} {number}" for number in range(1, len(mine) + 1)]
            assert (project / f"log-{name}").read_text().splitlines() == mine
    finally:
        vm.docker("rm", "-f", "writers")


def grows(project: Path, names: list[str]) -> None:
    def count() -> int:
        return sum(lines(project / f"log-{name}") for name in names)

    before = count()
    eventually(lambda: count() > before + 20)


def lines(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


def kill(vm: Instance, victim: str) -> None:
    """SIGKILL, and wait for a successor."""
    if victim == "file server":
        pid = file_server_pid(vm)
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: file_server_pid(vm) not in (0, pid))
    elif victim == "host agent":
        pid, server = vm.status()["agent_pid"], file_server_pid(vm)
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: vm.status()["agent_pid"] not in (0, pid))
        eventually(lambda: file_server_pid(vm) not in (0, server))
    else:
        pid = files_agent_pid(vm)
        vm.guest(f"kill -9 {pid}")
        eventually(lambda: files_agent_pid(vm) not in (0, pid))


def test_what_a_program_says_comes_after_what_it_has_written(vm: Instance, project: Path) -> None:
    """Writes that follow each other are answered before they are here; the exit status and the output wait for them."""
    script = f"exec 3>>{project}/said; i=0; while [ $i -lt 500 ]; do i=$((i + 1)); echo $i >&3; echo $i; done"
    with vm.popen("exec", "-u", "root", "sh", "-c", script, stdout=subprocess.PIPE) as program:
        assert program.stdout is not None
        for number in map(int, program.stdout):
            assert lines(project / "said") >= number
    assert program.returncode == 0
    assert (project / "said").read_text() == "".join(f"{number}\n" for number in range(1, 501))
    large = f"head -c 20000000 /dev/zero >{project}/large && stat -c %s {project}/large"
    assert int(vm.guest(large)) == (project / "large").stat().st_size == 20_000_000


@pytest.mark.parametrize("victim", ["file server", "files agent", "host agent"])
def test_a_file_without_a_name_survives_a_killed_agent(
    vm: Instance, image: str, project: Path, victim: str
) -> None:
    """A container has it open, and nobody else anything of it."""
    script = (
        "echo before >/src/file; exec 3</src/file 4>>/src/file; rm /src/file; touch /src/ready;"
        " while [ ! -e /src/go ]; do sleep 0.2; done; echo after >&4 && cat <&3"
    )
    options = ("-d", "--name", "nameless", *NO_NETWORK, "-v", f"{project}:/src")
    vm.docker("run", *options, image, "/bin/sh", "-c", script)
    try:
        eventually((project / "ready").exists)
        kill(vm, victim)
        (project / "go").touch()
        assert vm.docker("wait", "nameless") == "0", vm.docker("logs", "nameless")
        assert vm.docker("logs", "nameless") == "before\nafter"
        assert not (project / "file").exists()
    finally:
        vm.docker("rm", "-f", "nameless")


def test_the_working_directory_is_shared_if_nothing_else_shares_it(vm: Instance, image: str) -> None:
    with tempfile.TemporaryDirectory(prefix="agentctl-e2e-") as folder:
        (Path(folder) / "file").write_text("shared\n")
        done = vm.agentctl("up", cwd=folder)
        assert folder in done.stderr.decode()
        eventually(lambda: mounts(vm)[folder]["state"] == "mounted")
        assert (
            vm.docker(
                "run", "--rm", *NO_NETWORK, "-v", f"{folder}:/src", image, "/bin/busybox", "cat", "/src/file"
            )
            == "shared"
        )


def test_a_folder_that_is_deleted_and_comes_back(vm: Instance) -> None:
    folder = Path(tempfile.mkdtemp(prefix="agentctl-e2e-"))
    vm.agentctl("up", cwd=str(folder))
    eventually(lambda: mounts(vm)[str(folder)]["state"] == "mounted")
    folder.rmdir()
    eventually(lambda: mounts(vm)[str(folder)]["state"] == "missing")
    assert mounts(vm)[str(folder)]["reason"]
    assert vm.guest(f"timeout 20 touch {folder}/x 2>&1 || echo failed", check=False).endswith("failed\n")
    folder.mkdir()
    eventually(lambda: mounts(vm)[str(folder)]["state"] == "mounted")
    vm.guest(f"touch {folder}/x")
    assert (folder / "x").exists()
    shutil.rmtree(folder)


def test_a_share_that_is_read_only_and_one_whose_locks_reach_the_host(vm: Instance, project: Path) -> None:
    read_only, locked = project / "ro", project / "locks"
    read_only.mkdir()
    locked.mkdir()
    (locked / "lock").touch()
    vm.agentctl(
        "up",
        f"--mount={Path.home()}",
        f"--mount={read_only}:/mnt/ro:ro",
        f"--mount={locked}:/mnt/locks:rw,locks=host",
    )
    eventually(lambda: mounts(vm)["/mnt/locks"]["state"] == mounts(vm)["/mnt/ro"]["state"] == "mounted")
    assert "Read-only file system" in vm.guest("touch /mnt/ro/x 2>&1", check=False)
    assert not (read_only / "x").exists()
    # Held in the guest, refused here; the holder is killed, and it is ours.
    vm.guest("systemd-run --unit=holder -q flock /mnt/locks/lock sleep 600")
    held = ["flock", "--nonblock", str(locked / "lock"), "true"]
    eventually(lambda: subprocess.run(held).returncode == 1)
    kill(vm, "host agent")
    assert subprocess.run(held).returncode == 1, "it is held whoever of ours is killed"
    vm.guest("systemctl kill -s KILL holder")
    eventually(lambda: subprocess.run(held).returncode == 0)
    # And the other way round.
    with subprocess.Popen(["flock", str(locked / "lock"), "sleep", "600"]) as holder:
        eventually(lambda: "busy" in vm.guest("flock -n /mnt/locks/lock true || echo busy"))
        for pid in children(holder.pid):
            os.kill(pid, signal.SIGKILL)
        holder.kill()
    eventually(lambda: "mine" in vm.guest("flock -n /mnt/locks/lock echo mine || true"))


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_file_server_that_hangs_is_replaced(vm: Instance, project: Path) -> None:
    """Who reads meanwhile waits, and gets the content."""
    (project / "file").write_text("x")
    pid = file_server_pid(vm)
    os.kill(pid, signal.SIGSTOP)
    assert vm.guest(f"timeout 100 cat {project}/file") == "x"
    assert file_server_pid(vm) not in (0, pid)
    assert vm.status()["file_server_restarts"] >= 1
